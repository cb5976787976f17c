// Matrix products whose right factor is packed once and used by many tiles of rows.
//
// C [m, n] = A [m, k] B [k, n]: A is read by two strides (so that Aᵀ costs nothing), B lies in the panels of gemm.h,
// and the rows of C are padded to whole panels, so that no column is special. One panel of B stays in the first-level
// cache while all rows of A pass by.
#pragma once

#include "cpu/gemm.h"
#include "cpu/simd.h"

namespace anomem::cpu::ANOMEM_ISA {

// Rows of A at a time: with two vectors per row, the sums fill the registers but for the panel's two and one factor.
constexpr int tall = ANOMEM_VECTOR_BYTES == 64 ? 14 : 6;

// How a product's sums reach C: as they are, added to what is there, or through a function of their row.
struct Overwrite {
  template <class T>
  ANOMEM_INLINE void operator()(int64_t, T* to, vec<T> sum) const {
    store(to, sum);
  }
};

struct Accumulate {
  template <class T>
  ANOMEM_INLINE void operator()(int64_t, T* to, vec<T> sum) const {
    store(to, load(to) + sum);
  }
};

// Factors that are summed in one chain: rounding errors grow with the root of its length. Longer sums are sums of chains.
constexpr int64_t chain = 256;

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // `total` is read from the second chain on
template <int rows, class F, class T, class Finish>
inline void product_rows(int64_t first, int64_t k, const F* a, int64_t row, int64_t step, const F* panel, T* c,
                         int64_t c_row, const Finish& finish) {
  vec<T> total[rows][2];  // of the chains before the last; the registers are full of one chain's sums
  for (int64_t start = 0;; start += chain) {
    const bool last = k - start <= chain;
    vec<T> sums[rows][2] = {};
    multiply<F, rows>(last ? k - start : chain, a + first * row + start * step, row, step,
                      panel + start * Block<T>::width, sums);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        if (start > 0) sums[i][half] += total[i][half];
        if (last) finish.template operator()<T>(first + i, c + (first + i) * c_row + half * lanes<T>, sums[i][half]);
        else total[i][half] = sums[i][half];
      }
    if (last) return;
  }
}
#pragma GCC diagnostic pop

// The last rows, fewer than `tall`, in one piece.
template <int rows, class F, class T, class Finish>
inline void product_last(int64_t left, int64_t first, int64_t k, const F* a, int64_t row, int64_t step, const F* panel,
                         T* c, int64_t c_row, const Finish& finish) {
  if constexpr (rows > 0) {
    if (left == rows) return product_rows<rows>(first, k, a, row, step, panel, c, c_row, finish);
    product_last<rows - 1>(left, first, k, a, row, step, panel, c, c_row, finish);
  }
}

// C = A B on the calling thread, k factors long; `finish(i, to, sums)` stores one vector of row i.
template <class F, class T, class Finish>
inline void product_with(int64_t m, int64_t n, int64_t k, const F* a, int64_t row, int64_t step, const F* packed, T* c,
                         int64_t c_row, const Finish& finish) {
  constexpr int width = Block<T>::width;
  for (int64_t column = 0; column < n; column += width, packed += k * width, c += width) {
    int64_t i = 0;
    for (; i + tall <= m; i += tall) product_rows<tall>(i, k, a, row, step, packed, c, c_row, finish);
    product_last<tall - 1>(m - i, i, k, a, row, step, packed, c, c_row, finish);
  }
}

// C = A B, or C += A B.
template <class F, class T>
inline void product(int64_t m, int64_t n, int64_t k, const F* a, int64_t row, int64_t step, const F* packed, T* c,
                    int64_t c_row, bool accumulate) {
  if (accumulate) return product_with(m, n, k, a, row, step, packed, c, c_row, Accumulate());
  product_with(m, n, k, a, row, step, packed, c, c_row, Overwrite());
}

}  // namespace anomem::cpu::ANOMEM_ISA
