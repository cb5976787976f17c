// Factors of matrix products: their element type, and how rows are packed as left and right factor.
//
// C [m, n] = A [m, k] B [k, n]. A is read through two strides: Aᵀ needs no copy. B lies in panels of `width` columns,
// [n / width][k][width], the last one padded with zeros. The width is Block::kWidth, for the library's products
// kLibraryPanel.
//
// Factors are numbers of the accumulation type. On processors with AVX512-BF16 they are pairs of neighbouring bfloat16
// terms of a sum: twice the multiplications of float32, each product exact in a float32 sum.
#pragma once

#include "cpu/rows.h"
#include "cpu/simd.h"

namespace anomem::cpu::ANOMEM_ISA {

// The type of factors made of elements S, and the terms of a sum that one factor holds.
template <class S>
struct Factor {
  using type = accumulator_t<S>;
  static constexpr int kTerms = 1;
};

// The type of the sums that products of factors F are added to.
template <class F>
struct SumOf {
  using type = F;
};

#if ANOMEM_BFLOAT16_PAIRS
struct __attribute__((may_alias)) Pair {
  uint32_t bits;  // the first term in the lower half
};

template <>
struct Factor<Bfloat16> {
  using type = Pair;
  static constexpr int kTerms = 2;
};

ANOMEM_INLINE __m512bh load(const Pair* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }

ANOMEM_INLINE __m512bh broadcast(Pair x) {
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(x.bits)));
}

// c + a.first · b.first + a.second · b.second in every lane.
ANOMEM_INLINE vec<float> multiply_add(__m512bh a, __m512bh b, vec<float> c) {
  return reinterpret_cast<vec<float>>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(c), a, b));
}

// Both rounded to nearest, `first` in the lower half.
ANOMEM_INLINE __m512bh round_both(vec<float> first, vec<float> second) {
  return _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first));
}

// Pairs of two rows' numbers, rounded to nearest.
ANOMEM_INLINE void store(Pair* p, vec<float> first, vec<float> second) {
  typedef int16_t halves __attribute__((vector_size(64)));
  const halves rounded = reinterpret_cast<halves>(round_both(first, second));
  constexpr halves interleave = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  _mm512_storeu_si512(p, reinterpret_cast<__m512i>(__builtin_shuffle(rounded, interleave)));
}

// Pairs of neighbours in 2 · lanes numbers, rounded to nearest.
ANOMEM_INLINE void store_neighbours(Pair* p, vec<float> first, vec<float> rest) {
  _mm512_storeu_si512(p, reinterpret_cast<__m512i>(round_both(first, rest)));
}

template <>
struct SumOf<Pair> {
  using type = float;
};
#endif

template <class S>
using factor_t = typename Factor<S>::type;
template <class S>
constexpr bool kInPairs = Factor<S>::kTerms == 2;
template <class F>
using sum_t = typename SumOf<F>::type;

// Factors in a sum of n terms.
template <class S>
constexpr int64_t factors(int64_t n) {
  return (n + Factor<S>::kTerms - 1) / Factor<S>::kTerms;
}

// The register block: kHeight rows of kWidth columns, two vectors each. Its independent sums hide the latency of a
// multiply-add and stay in registers.
template <class T>
struct Block {
  static constexpr int kHeight = ANOMEM_VECTOR_BYTES == 64 ? 8 : 4;
  static constexpr int kWidth = 2 * kLanes<T>;
};

// Widest panel of the library's products, which are slower on narrower ones. The last panel of a matrix may be
// narrower.
constexpr int64_t kLibraryPanel = 128;

// Width of the panel whose first column is `first`, of a matrix of n columns in panels of at most `widest`.
template <class T>
constexpr int64_t panel_width(int64_t first, int64_t n, int64_t widest) {
  const int64_t left = round_up(n, Block<T>::kWidth) - first;
  return left < widest ? left : widest;
}

// The first `count` rows of `length` elements become columns, to [length, rows] with `to_stride` between rows; columns
// of zeros follow. A vector x of row r becomes scale(r, x).
template <class S, class To, class Scale>
inline void transpose_scaled(const S* source, int64_t stride, int64_t count, int64_t length, int64_t rows, To* to,
                             int64_t to_stride, const Scale& scale) {
  using T = accumulator_t<S>;
  constexpr int64_t block = kLanes<T>;
  for (int64_t first = 0; first < rows; first += block) {
    const int64_t height = rows - first < block ? rows - first : block;
    for (int64_t p = 0; p < length; p += block) {
      const int64_t width = length - p < block ? length - p : block;
      vec<T> square[block];
      for (int64_t r = 0; r < block; ++r)
        square[r] =
            first + r < count ? scale(first + r, load_some(source + (first + r) * stride + p, width)) : vec<T>{};
      transpose_square<T>(square);
      for (int64_t j = 0; j < width; ++j) store_some(to + (p + j) * to_stride + first, square[j], height);
    }
  }
}

struct Unscaled {
  template <class V>
  ANOMEM_INLINE V operator()(int64_t, V x) const {
    return x;
  }
};

template <class S, class To>
inline void transpose(const S* source, int64_t stride, int64_t count, int64_t length, int64_t rows, To* to,
                      int64_t to_stride) {
  transpose_scaled(source, stride, count, length, rows, to, to_stride, Unscaled());
}

// Packs B = rowsᵀ: row r of the source [count, k] becomes column r of B. Columns of zeros follow up to `padded` (0: to
// the end of the last panel).
template <class S, class T = accumulator_t<S>>
inline void pack_transposed(const S* source, int64_t stride, int64_t count, int64_t k, T* packed, int64_t padded = 0,
                            int64_t widest = Block<T>::kWidth) {
  const int64_t end = padded > count ? padded : count;
  for (int64_t first = 0; first < end; first += widest) {
    const int64_t width = panel_width<T>(first, end, widest);
    transpose(source + first * stride, stride, count - first, k, width, packed + first * k, width);
  }
}

// Packs B = source [k, n]; columns past n become zeros, and rows of zeros follow up to `padded`. `panel_stride` is the
// distance of panels in elements (0: k · width). `before` rows of B are packed already.
template <class S>
inline void pack(const S* source, int64_t stride, int64_t k, int64_t n, accumulator_t<S>* packed,
                 int64_t panel_stride = 0, int64_t padded = 0, int64_t widest = Block<accumulator_t<S>>::kWidth,
                 int64_t before = 0) {
  using T = accumulator_t<S>;
  for (int64_t first = 0; first < n; first += widest, packed += panel_stride > 0 ? panel_stride : k * widest) {
    const int64_t width = panel_width<T>(first, n, widest);
    for (int64_t half = 0; half < width; half += kLanes<T>) {
      const int64_t left = n - first - half;
      T* const to = packed + before * width + half;
      for (int64_t p = 0; p < (padded > k ? padded : k); ++p) {
        if (p >= k || left <= 0) {
          store(to + p * width, vec<T>{});
          continue;
        }
        const S* from = source + p * stride + first + half;
        const vec<T> x = left >= kLanes<T> ? load(from) : load_first(from, left);
        store(to + p * width, x);
      }
    }
  }
}

// Number of elements of a packed B.
template <class T>
constexpr int64_t packed_size(int64_t k, int64_t n) {
  return k * round_up(n, Block<T>::kWidth);
}

#if ANOMEM_BFLOAT16_PAIRS
// Packs B = source [k, n] in pairs of rows; rows of zeros follow up to `padded`. `panel_stride` is the distance of
// panels in pairs (0: one after the other). `before` pairs of rows of B are packed already.
inline void pack_pairs(const Bfloat16* source, int64_t stride, int64_t k, int64_t n, Pair* packed, int64_t panel_stride,
                       int64_t padded, int64_t widest, int64_t before) {
  const int64_t last = factors<Bfloat16>(padded > k ? padded : k);
  for (int64_t first = 0; first < n; first += widest, packed += panel_stride > 0 ? panel_stride : last * widest) {
    const int64_t width = panel_width<float>(first, n, widest);
    for (int64_t half = 0; half < width; half += kLanes<float>) {
      const int64_t left = n - first - half, count = left < kLanes<float> ? left : kLanes<float>;
      Pair* const to = packed + before * width + half;
      for (int64_t p = 0; p < last; ++p) {
        const Bfloat16* from = source + 2 * p * stride + first + half;
        const bool row = count > 0 && 2 * p < k, next = count > 0 && 2 * p + 1 < k;
        store(to + p * width, row ? load_some(from, count) : vec<float>{},
              next ? load_some(from + stride, count) : vec<float>{});
      }
    }
  }
}
#endif

// Rows on their way into products: set one by one, rounded to what factors hold, then packed as either factor.
template <class S>
class FactorRows {
 public:
  using T = accumulator_t<S>;
  using F = factor_t<S>;
  using Element = std::conditional_t<kInPairs<S>, S, T>;

  FactorRows(int64_t rows, int64_t length)
      : length_(length), stride_(factors<S>(length) * Factor<S>::kTerms), data_(rows * stride_) {}

  // Row r = scale · x.
  template <class From>
  void set(int64_t r, const From* x, T scale) {
    Element* row = data_.data() + r * stride_;
    scaled_copy(x, length_, scale, row);
    if (stride_ > length_) row[length_] = Element{};
  }

  // Rows of zeros from `first` to `end`.
  void clear(int64_t first, int64_t end) {
    std::memset(data_.data() + first * stride_, 0, (end - first) * stride_ * sizeof(Element));
  }

  // As the left factor, with `stride()` between rows.
  const F* data() const { return reinterpret_cast<const F*>(data_.data()); }
  int64_t stride() const { return stride_ / Factor<S>::kTerms; }

  // The first `count` rows become the columns of B, [columns / width][factors in a row][width]. Columns of zeros follow
  // up to `padded`.
  void pack_columns(int64_t count, F* packed, int64_t padded = 0, int64_t widest = Block<T>::kWidth) const {
    if constexpr (kInPairs<S>)  // a pair moves as 32 bits
      pack_transposed(reinterpret_cast<const float*>(data_.data()), stride_ / 2, count, stride_ / 2,
                      reinterpret_cast<float*>(packed), padded, widest);
    else pack_transposed(data_.data(), stride_, count, stride_, packed, padded, widest);
  }

  // The first `count` rows become the rows of B, [columns / width][factors in `count` terms][width]; `panel_stride` and
  // `padded` as in `pack`.
  void pack_rows(int64_t count, F* packed, int64_t panel_stride = 0, int64_t padded = 0,
                 int64_t widest = Block<T>::kWidth, int64_t before = 0) const {
    const int64_t packed_before = before / Factor<S>::kTerms;
    if constexpr (kInPairs<S>)
      pack_pairs(data_.data(), stride_, count, length_, packed, panel_stride, padded, widest, packed_before);
    else pack(data_.data(), stride_, count, length_, packed, panel_stride, padded, widest, packed_before);
  }

  // The first `count` rows become those of B from `before` on, a multiple of a factor's terms; B has `all` rows.
  void pack_some_rows(int64_t count, int64_t before, int64_t all, F* packed, int64_t widest) const {
    pack_rows(count, packed, factors<S>(all) * widest, 0, widest, before);
  }

  // As the left factor of the library's products: rows of whole factors, `stride` factors apart and padded with zeros;
  // rows of zeros follow up to `padded`.
  void copy_rows(int64_t count, int64_t padded, F* to, int64_t stride) const {
    const int64_t length = FactorRows::stride();
    for (int64_t r = 0; r < padded; ++r) {
      F* row = to + r * stride;
      if (r < count) std::memcpy(row, data() + r * length, length * sizeof(F));
      std::memset(row + (r < count ? length : 0), 0, (stride - (r < count ? length : 0)) * sizeof(F));
    }
  }

  // The first `count` rows become rows of B in one panel, [factors in `padded` terms][width]; zeros follow.
  void pair_rows(int64_t count, int64_t padded, F* to, int64_t width) const {
    if constexpr (kInPairs<S>)
      for (int64_t r = 0; r < padded; r += 2)
        for (int64_t j = 0; j < width; j += kLanes<T>) {
          const int64_t left = length_ - j, some = left < kLanes<T> ? left : kLanes<T>;
          const Element* from = data_.data() + r * stride_ + j;
          store(to + r / 2 * width + j, some > 0 && r < count ? load_some(from, some) : vec<T>{},
                some > 0 && r + 1 < count ? load_some(from + stride_, some) : vec<T>{});
        }
  }

  // The first `count` rows become columns of whole factors, to [factors in a row, padded]; columns of zeros follow.
  void copy_columns(int64_t count, int64_t padded, F* to) const {
    using Word = std::conditional_t<kInPairs<S>, float, T>;  // a pair moves as 32 bits
    cpu::ANOMEM_ISA::transpose(reinterpret_cast<const Word*>(data()), stride(), count, stride(), padded,
                               reinterpret_cast<Word*>(to), padded);
  }

  // The first `count` rows become columns, to [length, rows] with `to_stride` between rows; columns of zeros follow.
  void transpose(int64_t count, int64_t rows, Element* to, int64_t to_stride) const {
    cpu::ANOMEM_ISA::transpose(data_.data(), stride_, count, length_, rows, to, to_stride);
  }

 private:
  int64_t length_, stride_;
  Buffer<Element> data_;
};

// A left factor: factor p of row i lies at data[i * row_stride + p * term_stride].
template <class S>
struct LeftFactor {
  const factor_t<S>* data;
  int64_t row_stride, term_stride;
};

// A = tile [rows, m] of a softmax's weights, summed over its columns. Pairs go to `to`, `to_stride` pairs between rows
// (0: stride / 2), or overwrite the row. Weights may be rounded to bfloat16, since nothing is exponentiated any more.
// With an odd count the last pair's second weight is arbitrary; it multiplies a zero row.
template <class S, class T = accumulator_t<S>>
inline LeftFactor<S> in_rows(T* tile, int64_t rows, int64_t m, int64_t stride, factor_t<S>* to = nullptr,
                             int64_t to_stride = 0) {
  if constexpr (kInPairs<S>) {
    const int64_t row_stride = to == nullptr ? stride : to_stride > 0 ? to_stride : stride / 2;
    factor_t<S>* const start = to == nullptr ? reinterpret_cast<factor_t<S>*>(tile) : to;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < m; j += 2 * kLanes<T>) {
        const T* at = tile + i * stride + j;
        const vec<T> first = load(at), rest = load(at + kLanes<T>);
        store_neighbours(start + i * row_stride + j / 2, first, rest);
      }
    return {start, row_stride, 1};
  } else {
    return {tile, stride, 1};
  }
}

// A = tileᵀ, summed over its rows. Pairs overwrite the first of their two rows; an odd last row is paired with zeros.
template <class S, class T = accumulator_t<S>>
inline LeftFactor<S> in_columns(T* tile, int64_t rows, int64_t m, int64_t stride) {
  if constexpr (kInPairs<S>) {
    for (int64_t i = 0; i < rows; i += 2)
      for (int64_t j = 0; j < m; j += kLanes<T>) {
        T* at = tile + i * stride + j;
        const vec<T> second = i + 1 < rows ? load(at + stride) : vec<T>{};
        store(reinterpret_cast<factor_t<S>*>(at), load(at), second);
      }
    return {reinterpret_cast<const factor_t<S>*>(tile), 1, 2 * stride};
  } else {
    return {tile, 1, stride};
  }
}

#if ANOMEM_BFLOAT16_PAIRS
// The same of rows in bfloat16, to the tile.
inline LeftFactor<Bfloat16> in_columns(const Bfloat16* rows, int64_t rows_stride, int64_t count, int64_t m, float* tile,
                                       int64_t stride) {
  for (int64_t i = 0; i < count; i += 2)
    for (int64_t j = 0; j < m; j += kLanes<float>) {
      typedef Simd<float>::words words;
      const Bfloat16* at = rows + i * rows_stride + j;
      const words first = reinterpret_cast<words>(load(at)) >> 16;
      const words second = i + 1 < count ? reinterpret_cast<words>(load(at + rows_stride)) : words{};
      store(tile + i * stride + j, reinterpret_cast<vec<float>>(first | second));
    }
  return {reinterpret_cast<const Pair*>(tile), 1, 2 * stride};
}
#endif

}  // namespace anomem::cpu::ANOMEM_ISA
