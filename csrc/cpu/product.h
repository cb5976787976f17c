// Matrix products of packed factors (factors.h). What follows a product, such as an exponential or a row sum, works on
// the sums while they are in registers. The library's products (library_product.h) take the place of the blocks where
// they are faster; what follows then works on a panel of sums in the second-level cache.
//
// Rows of C are padded to whole panels, so no column is special. One panel of B stays in the first-level cache while
// all rows of A pass by.
#pragma once

#include "cpu/factors.h"
#include "cpu/library_product.h"
#include "cpu/simd.h"
#include "cpu/tile_product.h"

namespace anomem::cpu::ANOMEM_ISA {

// sums[i][j] += Σ_p A[i, p] B[p, j] over k factors F: A[i, p] = a[i * row_stride + p * term_stride] and, in one panel,
// B[p, j] = b[p * width + j].
template <class F, int kRows>
ANOMEM_INLINE void multiply(int64_t k, const F* a, int64_t row_stride, int64_t term_stride, const F* b,
                            vec<sum_t<F>> (&sums)[kRows][2]) {
  using T = sum_t<F>;
  constexpr int width = Block<T>::kWidth;
  for (int64_t p = 0; p < k; ++p, a += term_stride, b += width) {
    const auto left = load(b), right = load(b + kLanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const auto factor = broadcast(a[i * row_stride]);
      sums[i][0] = multiply_add(factor, left, sums[i][0]);
      sums[i][1] = multiply_add(factor, right, sums[i][1]);
    }
  }
}

// Rows of A at a time. Two vectors of sums per row fill the registers, except two for the panel and one for a factor.
constexpr int kTall = ANOMEM_VECTOR_BYTES == 64 ? 14 : 6;

// How sums reach C: stored, added to C, or through another function of their row.
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

// Factors summed in one chain. Rounding errors grow with the root of its length; longer sums are sums of chains.
constexpr int64_t kChain = 256;

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // `total` is read from the second chain on
template <int kRows, class F, class T, class Finish>
inline void product_rows(int64_t first, int64_t k, const F* a, int64_t row_stride, int64_t term_stride, const F* panel,
                         T* c, int64_t c_stride, const Finish& finish) {
  vec<T> total[kRows][2];  // of the chains before the last; the registers are full of one chain's sums
  for (int64_t start = 0;; start += kChain) {
    const bool last = k - start <= kChain;
    vec<T> sums[kRows][2] = {};
    multiply<F, kRows>(last ? k - start : kChain, a + first * row_stride + start * term_stride, row_stride, term_stride,
                       panel + start * Block<T>::kWidth, sums);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        if (start > 0) sums[i][half] += total[i][half];
        T* to = c + (first + i) * c_stride + half * kLanes<T>;
        if (last) finish.template operator()<T>(first + i, to, sums[i][half]);
        else total[i][half] = sums[i][half];
      }
    if (last) return;
  }
}
#pragma GCC diagnostic pop

// The last rows, fewer than `kTall`, in one piece.
template <int kRows, class F, class T, class Finish>
inline void product_last(int64_t left, int64_t first, int64_t k, const F* a, int64_t row_stride, int64_t term_stride,
                         const F* panel, T* c, int64_t c_stride, const Finish& finish) {
  if constexpr (kRows > 0) {
    if (left == kRows) return product_rows<kRows>(first, k, a, row_stride, term_stride, panel, c, c_stride, finish);
    product_last<kRows - 1>(left, first, k, a, row_stride, term_stride, panel, c, c_stride, finish);
  }
}

// Factors as the library's products take them.
template <class F>
using library_element_t = std::conditional_t<std::is_same_v<F, sum_t<F>>, F, Bfloat16>;
template <class F>
constexpr bool kInLibrary = ANOMEM_VECTOR_BYTES == 64 && std::is_same_v<sum_t<F>, float>;

template <class F>
ANOMEM_INLINE const library_element_t<F>* library_elements(const F* factors) {
  return reinterpret_cast<const library_element_t<F>*>(factors);
}

// A packed right factor, and its parts where they were made before (panels.h); or a block of one.
template <class F>
struct RightFactor {
  const F* packed;
  const Bfloat16* parts = nullptr;
  bool in_tiles = true;  // where the processor has them
  int64_t first = 0;     // of its terms that a product takes
  int64_t all = 0;       // its terms, if a product takes some of them

  RightFactor(const F* packed, const Bfloat16* parts = nullptr, bool in_tiles = true)
      : packed(packed), parts(parts), in_tiles(in_tiles) {}

  // From a column on, a multiple of kLibraryPanel, of a factor of k terms.
  RightFactor columns(int64_t column, int64_t k) const {
    RightFactor block = *this;
    block.packed += column * k;
    if (parts != nullptr) block.parts += parts_size(column, k);
    return block;
  }

  // From a term on, a multiple of 32, of a factor of k terms.
  RightFactor terms(int64_t term, int64_t k) const {
    RightFactor block = *this;
    block.first = term;
    block.all = k;
    return block;
  }
};

// Names its argument without taking part in deduction.
template <class F>
struct Named {
  using type = F;
};

// One panel of B, k terms, by the library. With bfloat16 `k` and strides count elements.
template <class E>
inline void library_panel(int64_t m, int64_t width, int64_t k, const E* a, int64_t a_stride, const E* panel,
                          int64_t panel_stride, float* c, int64_t c_stride, bool accumulate) {
  constexpr int64_t terms = sizeof(E) == 2 ? 2 : 1;
  for (int64_t start = 0; start < k; start += terms * kChain)
    library_product(m, width, at_most(terms * kChain, k - start), a + start, a_stride, panel + start * panel_stride,
                    panel_stride, c, c_stride, accumulate || start > 0);
}

// Whether float32 products of the library may be made in tiles. Kernels of bfloat16 leave the tiles to its products.
#if ANOMEM_BFLOAT16_PAIRS
constexpr bool kSplits = false;
#else
constexpr bool kSplits = ANOMEM_VECTOR_BYTES == 64;
#endif

// C = A B by the library, a panel of B at a time.
template <class F, class Finish>
inline void library_product_with(int64_t m, int64_t n, int64_t k, const F* a, int64_t row_stride,
                                 const RightFactor<F>& b, float* c, int64_t c_stride, const Finish& finish,
                                 const Bfloat16* a_parts) {
  constexpr int64_t terms = static_cast<int64_t>(sizeof(F) / sizeof(library_element_t<F>));
  constexpr bool accumulate = std::is_same_v<Finish, Accumulate>;
  const auto done = [&](int64_t column, int64_t width) ANOMEM_ALWAYS {
    if constexpr (!accumulate && !std::is_same_v<Finish, Overwrite>)
      for (int64_t i = 0; i < m; ++i)
        for (int64_t half = 0; half < width; half += kLanes<float>) {
          float* to = c + i * c_stride + column + half;
          finish.template operator()<float>(i, to, load(to));
        }
  };
  const int64_t all = b.all > 0 ? b.all : k;
  if constexpr (kSplits && std::is_same_v<F, float>)
    if (b.in_tiles && splits_products()) {
      product_in_tiles(m, n, k, a, row_stride, a_parts, {b.packed, all, 0, b.parts, b.first, all, kLibraryPanel}, c,
                       c_stride, accumulate);
      return done(0, round_up(n, kLanes<float>));
    }
  for (int64_t column = 0; column < n; column += kLibraryPanel) {
    const int64_t width = panel_width<float>(column, n, kLibraryPanel);
    library_panel(m, width, terms * k, library_elements(a), terms * row_stride,
                  library_elements(b.packed + column * all + b.first * width), width, c + column, c_stride, accumulate);
    done(column, width);
  }
}

// C = A B or C += A B by the library, for A [m, k] of elements, `a_stride` between its rows, and B, k terms long, as
// `in_columns` leaves a tile or as rows in one panel.
template <class S>
inline void library_product_of_tile(int64_t m, int64_t n, int64_t k, const factor_t<S>* a, int64_t a_stride,
                                    const factor_t<S>* tile, int64_t tile_stride, accumulator_t<S>* c, int64_t c_stride,
                                    bool accumulate, const Bfloat16* a_parts = nullptr) {
  if constexpr (kSplits && std::is_same_v<S, float>)
    if (splits_products())
      return product_in_tiles(m, n, k, a, a_stride, a_parts, {tile, 1, tile_stride, nullptr, 0, k, kLibraryPanel}, c,
                              c_stride, accumulate);
  if constexpr (kInLibrary<factor_t<S>>) {
    for (int64_t column = 0; column < n; column += kLibraryPanel)
      library_product(m, panel_width<float>(column, n, kLibraryPanel), k, library_elements(a), a_stride,
                      library_elements(tile + column), tile_stride, c + column, c_stride, accumulate);
  }
}

// C = A B on the calling thread, k factors long; `finish(i, to, sums)` stores one vector of row i. `library`: with the
// library's products; the terms of A are then adjacent.
template <class F, class T, class Finish>
inline void product_with(int64_t m, int64_t n, int64_t k, const F* a, int64_t row_stride, int64_t term_stride,
                         const typename Named<RightFactor<F>>::type& right, T* c, int64_t c_stride,
                         const Finish& finish, bool library = false, const Bfloat16* a_parts = nullptr) {
  constexpr int width = Block<T>::kWidth;
  if constexpr (kInLibrary<F>)
    if (library) return library_product_with(m, n, k, a, row_stride, right, c, c_stride, finish, a_parts);
  const F* packed = right.packed;
  for (int64_t column = 0; column < n; column += width, packed += k * width, c += width) {
    int64_t i = 0;
    for (; i + kTall <= m; i += kTall)
      product_rows<kTall>(i, k, a, row_stride, term_stride, packed, c, c_stride, finish);
    product_last<kTall - 1>(m - i, i, k, a, row_stride, term_stride, packed, c, c_stride, finish);
  }
}

// C = A B, or C += A B.
template <class F, class T>
inline void product(int64_t m, int64_t n, int64_t k, const F* a, int64_t row_stride, int64_t term_stride,
                    const typename Named<RightFactor<F>>::type& right, T* c, int64_t c_stride, bool accumulate,
                    bool library = false, const Bfloat16* a_parts = nullptr) {
  if (accumulate)
    return product_with(m, n, k, a, row_stride, term_stride, right, c, c_stride, Accumulate(), library, a_parts);
  product_with(m, n, k, a, row_stride, term_stride, right, c, c_stride, Overwrite(), library, a_parts);
}

}  // namespace anomem::cpu::ANOMEM_ISA
