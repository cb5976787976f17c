// Matrix products on tiles that stay in cache, written so that what follows a product (an exponential, a row sum) works
// on the accumulators while they are still in registers.
//
// C [m, n] = A [m, k] B [k, n]. A is read element by element with any two strides (so that Aᵀ costs nothing); B is
// packed into panels of `width` columns: [n / width][k][width], the last panel padded with zeros.
#pragma once

#include "cpu/pairs.h"
#include "cpu/simd.h"

namespace anomem::cpu::ANOMEM_ISA {

// The register block: `height` rows of `width` columns, as two vectors each. Enough independent sums to hide the
// latency of a multiply-add on every instruction set, and few enough to stay in its registers.
template <class T>
struct Block {
  static constexpr int height = ANOMEM_VECTOR_BYTES == 64 ? 8 : 4;
  static constexpr int width = 2 * lanes<T>;
};

// Workspaces are padded to this many rows, a multiple of every block's width and height.
constexpr int64_t padding = 64;

// sums[i][j] += Σ_p A[i, p] B[p, j], k factors F long. A at a[i * row + p * step]; one panel of B at b[p * width + j].
template <class F, int rows>
ANOMEM_INLINE void multiply(int64_t k, const F* a, int64_t row, int64_t step, const F* b,
                            vec<sum_t<F>> (&sums)[rows][2]) {
  using T = sum_t<F>;
  constexpr int width = Block<T>::width;
  for (int64_t p = 0; p < k; ++p, a += step, b += width) {
    const auto left = load(b), right = load(b + lanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const auto factor = broadcast(a[i * row]);
      sums[i][0] = multiply_add(factor, left, sums[i][0]);
      sums[i][1] = multiply_add(factor, right, sums[i][1]);
    }
  }
}

// Packs B = rowsᵀ: row r of the source [count, k] becomes column r of B. Up to `padded` columns are written (0: to the
// end of the last panel), those past `count` with zeros.
template <class S>
inline void pack_transposed(const S* source, int64_t stride, int64_t count, int64_t k, accumulator_t<S>* packed,
                            int64_t padded = 0) {
  using T = accumulator_t<S>;
  constexpr int width = Block<T>::width;
  for (int64_t first = 0; first < (padded > count ? padded : count); first += width, packed += k * width) {
    const int64_t here = count - first < width ? count - first : width;
    for (int64_t p0 = 0; p0 < k; p0 += lanes<T>) {
      const int64_t n = k - p0 < lanes<T> ? k - p0 : lanes<T>;
      for (int64_t r = 0; r < width; ++r) {
        T piece[lanes<T>] = {};
        if (r < here) {
          const S* from = source + (first + r) * stride + p0;
          store(piece, n == lanes<T> ? load(from) : load_first(from, n));
        }
        for (int64_t p = 0; p < n; ++p) packed[(p0 + p) * width + r] = piece[p];
      }
    }
  }
}

// Packs B = source [k, n] as it lies; columns past n become zeros. Panels lie `panel` elements apart (0: k · width), and
// rows of zeros are added up to `padded`.
template <class S>
inline void pack(const S* source, int64_t stride, int64_t k, int64_t n, accumulator_t<S>* packed, int64_t panel = 0,
                 int64_t padded = 0) {
  using T = accumulator_t<S>;
  constexpr int width = Block<T>::width;
  for (int64_t first = 0; first < n; first += width, packed += panel > 0 ? panel : k * width)
    for (int64_t half = 0; half < width; half += lanes<T>) {
      const int64_t left = n - first - half;
      for (int64_t p = 0; p < (padded > k ? padded : k); ++p) {
        if (p >= k || left <= 0) {
          store(packed + p * width + half, vec<T>{});
          continue;
        }
        const S* from = source + p * stride + first + half;
        const vec<T> x = left >= lanes<T> ? load(from) : load_first(from, left);
        store(packed + p * width + half, x);
      }
    }
}

// Number of elements of a packed B.
template <class T>
constexpr int64_t packed_size(int64_t k, int64_t n) {
  return k * round_up(n, Block<T>::width);
}

// `rows` rows of C, all columns.
template <int rows, class T>
inline void multiply_rows(int64_t n, int64_t k, const T* a, int64_t row, int64_t step, const T* packed, T* c,
                          int64_t c_row, bool accumulate) {
  constexpr int width = Block<T>::width;
  for (int64_t first = 0; first < n; first += width, packed += k * width) {
    vec<T> sums[rows][2] = {};
    multiply<T, rows>(k, a, row, step, packed, sums);
    const int64_t here = n - first < width ? n - first : width;
    for (int i = 0; i < rows; ++i) {
      T* to = c + i * c_row + first;
      if (here == width) {
        for (int h = 0; h < 2; ++h) {
          T* p = to + h * lanes<T>;
          store(p, accumulate ? load(p) + sums[i][h] : sums[i][h]);
        }
      } else {
        T line[width];
        for (int h = 0; h < 2; ++h) store(line + h * lanes<T>, sums[i][h]);
        for (int64_t j = 0; j < here; ++j) to[j] = accumulate ? to[j] + line[j] : line[j];
      }
    }
  }
}

// C = A B, or C += A B. Any m, n, k; C is row-major with rows `c_row` apart. Meant for k up to a few hundred (a panel
// of B should stay in the first-level cache) and called inside parallel regions: it uses one thread.
template <class T>
inline void gemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t row, int64_t step, const T* packed, T* c,
                 int64_t c_row, bool accumulate) {
  constexpr int height = Block<T>::height;
  const int64_t whole = m / height * height;
  for (int64_t i = 0; i < whole; i += height)
    multiply_rows<height>(n, k, a + i * row, row, step, packed, c + i * c_row, c_row, accumulate);
  for (int64_t i = whole; i < m; ++i)
    multiply_rows<1>(n, k, a + i * row, row, step, packed, c + i * c_row, c_row, accumulate);
}

}  // namespace anomem::cpu::ANOMEM_ISA
