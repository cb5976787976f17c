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

template <int rows, class T>
inline void product_rows(int64_t k, const T* a, int64_t row, int64_t step, const T* panel, T* c, int64_t c_row,
                         bool accumulate) {
  vec<T> sums[rows][2] = {};
  multiply<T, rows>(k, a, row, step, panel, sums);
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      T* to = c + i * c_row + half * lanes<T>;
      store(to, accumulate ? load(to) + sums[i][half] : sums[i][half]);
    }
}

// The last rows, fewer than `tall`, in one piece.
template <int rows, class T>
inline void product_last(int64_t left, int64_t k, const T* a, int64_t row, int64_t step, const T* panel, T* c,
                         int64_t c_row, bool accumulate) {
  if constexpr (rows > 0) {
    if (left == rows) return product_rows<rows>(k, a, row, step, panel, c, c_row, accumulate);
    product_last<rows - 1>(left, k, a, row, step, panel, c, c_row, accumulate);
  }
}

// C = A B, or C += A B, on the calling thread.
template <class T>
inline void product(int64_t m, int64_t n, int64_t k, const T* a, int64_t row, int64_t step, const T* packed, T* c,
                    int64_t c_row, bool accumulate) {
  constexpr int width = Block<T>::width;
  for (int64_t first = 0; first < n; first += width, packed += k * width, c += width) {
    int64_t i = 0;
    for (; i + tall <= m; i += tall)
      product_rows<tall>(k, a + i * row, row, step, packed, c + i * c_row, c_row, accumulate);
    product_last<tall - 1>(m - i, k, a + i * row, row, step, packed, c + i * c_row, c_row, accumulate);
  }
}

// Packs factor · source [k, n] as it lies, for products with k = rows of the source.
template <class T>
inline void pack_scaled(const T* source, int64_t stride, int64_t k, int64_t n, T factor, T* packed) {
  constexpr int width = Block<T>::width;
  for (int64_t first = 0; first < n; first += width, packed += k * width)
    for (int64_t half = 0; half < width; half += lanes<T>) {
      const int64_t left = n - first - half;
      for (int64_t p = 0; p < k; ++p) {
        const T* from = source + p * stride + first + half;
        const vec<T> x = left >= lanes<T> ? load(from) : left > 0 ? load_first(from, left) : vec<T>{};
        store(packed + p * width + half, x * factor);
      }
    }
}

// Row length, in elements, of a tile with n columns: whole panels, and not a multiple of 1 KiB, which would put every
// row of a tile into the same few sets of the cache.
template <class T>
inline int64_t padded_row(int64_t n) {
  const int64_t padded = round_up(n, Block<T>::width);
  return padded * int64_t(sizeof(T)) % 1024 == 0 ? padded + 64 / int64_t(sizeof(T)) : padded;
}

}  // namespace anomem::cpu::ANOMEM_ISA
