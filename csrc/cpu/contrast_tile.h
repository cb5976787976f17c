// One tile of a contrast: the similarities of up to 128 rows and 128 columns, exponentiated in registers. The forward
// pass keeps their sums. The backward pass writes the tile's weights W, which then multiply the rows. At the end: the
// order in which tiles are added.
#pragma once

#include "cpu/contrast.h"
#include "cpu/contrast_rows.h"
#include "cpu/parallel.h"
#include "cpu/product.h"

namespace anomem::cpu::ANOMEM_ISA {

// Row stride of a tile. A power of two would put a column of it into a few sets of the cache.
constexpr int64_t kTileStride = kLargestTile + 16;

// Logits are s · (factor + rest). The rounding of `factor` alone would shift every logit by 2^-24 of 1/tau.
// - Fixed shift: logits are in base 2, factor + rest = log2(e) / tau.
// - Running peak: logits are s / tau, rounded to T as in their lse.
template <class T>
struct Scale {
  T factor, rest;
  // Logits of unit rows are at most 1/tau. This bound replaces the row maximum if 2^(2 log2(e) / tau) is far from the
  // ends of the range (float: tau ≥ 0.029, with room for upstream gradients up to 2^26). At lower temperatures the peak
  // follows the data.
  bool fixed_shift;
  double exact;  // factor + rest
  int shift;     // in base 2, a whole number; 0 without a fixed shift

  explicit Scale(double tau) {
    const double base2 = kLog2e<double> / tau;
    fixed_shift = tau > 0 && 2 * base2 + 1 <= static_cast<double>(-kExp2Lowest<T>) - 26;
    exact = fixed_shift ? base2 : 1 / tau;
    factor = static_cast<T>(exact);
    rest = static_cast<T>(exact - static_cast<double>(factor));
    shift = fixed_shift ? static_cast<int>(base2) + 1 : 0;
  }

  // exp(logit − shift), with a fixed shift only.
  ANOMEM_INLINE vec<T> exponential(vec<T> s) const {
    return exp2_of_product(s, broadcast(factor), broadcast(rest), shift);
  }
  // Of a row's positive: exp(logit − shift) with a fixed shift, else the logit.
  double positive_term(double s) const { return fixed_shift ? std::exp2(s * exact - shift) : s * exact; }
  ANOMEM_INLINE vec<T> logit(vec<T> s) const { return multiply_add(s, broadcast(factor), s * broadcast(rest)); }
};

// Which similarities take part: `none` and `all` of a register block at (row, column), and the `mask` of one of its
// rows.

// Of the rows of two joined views: each pair of rows once, without a row's positive at a distance of count / 2.
struct UpperTriangle {
  int64_t count;
  int64_t half() const { return count / 2; }
  template <class T>
  bool none(int64_t row, int64_t column) const {
    return column + Block<T>::kWidth <= row + 1;
  }
  template <class T>
  bool all(int64_t row, int64_t column) const {
    const bool positives = column - row < half() + Block<T>::kHeight && half() < column - row + Block<T>::kWidth;
    return row + Block<T>::kHeight <= column && column + Block<T>::kWidth <= count && !positives;
  }
  template <class T>
  ANOMEM_INLINE typename Simd<T>::bits mask(int64_t row, typename Simd<T>::bits column) const {
    typedef std::remove_reference_t<decltype(column[0])> index;
    return (column > static_cast<index>(row)) & (column < static_cast<index>(row < count ? count : 0)) &
           (column != static_cast<index>(row + half()));
  }
};

struct Visible {
  int64_t rows, columns;
  const int64_t* exclude;  // [rows], or null: the row's own index is hidden
  bool everything;         // nothing is hidden
  int64_t hidden(int64_t row) const { return exclude == nullptr ? row : exclude[row]; }
  template <class T>
  bool none(int64_t, int64_t) const {
    return false;
  }
  template <class T>
  bool all(int64_t row, int64_t column) const {
    if (row + Block<T>::kHeight > rows || column + Block<T>::kWidth > columns) return false;
    if (everything) return true;
    for (int i = 0; i < Block<T>::kHeight; ++i) {
      const int64_t j = hidden(row + i);
      if (j >= column && j < column + Block<T>::kWidth) return false;
    }
    return true;
  }
  template <class T>
  ANOMEM_INLINE typename Simd<T>::bits mask(int64_t row, typename Simd<T>::bits column) const {
    typedef std::remove_reference_t<decltype(column[0])> index;
    const index last = static_cast<index>(row < rows ? columns : 0);
    if (everything || row >= rows) return column < last;
    return (column < last) & (column != static_cast<index>(hidden(row)));
  }
};

// The visible columns without each row's positive.
struct Negatives {
  Visible visible;
  const int64_t* positive;  // [rows]
  template <class T>
  bool none(int64_t, int64_t) const {
    return false;
  }
  template <class T>
  bool all(int64_t row, int64_t column) const {
    if (!visible.all<T>(row, column)) return false;
    for (int i = 0; i < Block<T>::kHeight; ++i) {
      const int64_t j = positive[row + i];
      if (j >= column && j < column + Block<T>::kWidth) return false;
    }
    return true;
  }
  template <class T>
  ANOMEM_INLINE typename Simd<T>::bits mask(int64_t row, typename Simd<T>::bits column) const {
    typedef std::remove_reference_t<decltype(column[0])> index;
    const index own = static_cast<index>(row < visible.rows ? positive[row] : -1);
    return visible.mask<T>(row, column) & (column != own);
  }
};

// A tile: `rows` × `columns` similarities from (row, column) on.
template <class S>
struct Tile {
  PackedRows<S> left, right;
  int64_t features;
  int64_t row, rows;
  int64_t column, columns;
  const accumulator_t<S>* computed = nullptr;  // [rows, computed_stride], products that were made before
  int64_t computed_stride = 0;

  Tile(const PackedRows<S>& left, const PackedRows<S>& right, int64_t features, const Span& rows, const Span& columns)
      : left(left),
        right(right),
        features(features),
        row(rows.first),
        rows(rows.count),
        column(columns.first),
        columns(columns.count) {}

  void use(const accumulator_t<S>* products, int64_t stride) {
    computed = products;
    computed_stride = stride;
  }
};

// The products of a tile by the library, if its rows are laid out for it; with `upper` those on and above the
// diagonal. They must outlive the tile's use.
template <class S, class T = accumulator_t<S>>
inline void compute_by_library(Tile<S>& tile, bool upper, T* to, int64_t to_stride = kTileStride) {
  if constexpr (kInLibrary<factor_t<S>>) {
    if (tile.left.in_rows == nullptr) return;
    constexpr int64_t width = kRowPadding, each = Factor<S>::kTerms;
    const int64_t terms = factors<S>(tile.features), rows = round_up(tile.rows, width);
    const factor_t<S>* left = tile.left.in_rows + tile.row * tile.left.row_stride;
    for (int64_t j = 0; j < tile.columns; j += width)
      for (int64_t start = 0; start < terms; start += kChain) {
        const factor_t<S>* right = tile.right.columns + (tile.column + j) * terms + start * width;
        library_product(upper && j + width < rows ? j + width : rows, width,
                        each * (terms - start < kChain ? terms - start : kChain), library_elements(left + start),
                        each * tile.left.row_stride, library_elements(right), width, to + j, to_stride, start > 0);
      }
    tile.use(to, to_stride);
  }
}

// The products of a register block, made here unless they were made before.
template <class S, class T = accumulator_t<S>>
ANOMEM_INLINE void block_products(const Tile<S>& tile, int64_t i, int64_t j, vec<T> (&s)[Block<T>::kHeight][2]) {
  constexpr int width = Block<T>::kWidth;
  const int64_t row = tile.row + i, column = tile.column + j, terms = factors<S>(tile.features);
  const int64_t panel_stride = terms * width;
  if (tile.computed != nullptr) {
    const T* from = tile.computed + i * tile.computed_stride + j;
#pragma GCC unroll 8
    for (int r = 0; r < Block<T>::kHeight; ++r)
      for (int h = 0; h < 2; ++h) s[r][h] = load(from + r * tile.computed_stride + h * kLanes<T>);
  } else {
    for (auto& halves : s) halves[0] = halves[1] = vec<T>{};
    const factor_t<S>* left = tile.left.columns + row / width * panel_stride + row % width;
    const factor_t<S>* right = tile.right.columns + column / width * panel_stride;
    multiply<factor_t<S>, Block<T>::kHeight>(terms, left, 1, width, right, s);
  }
}

template <class S, class T = accumulator_t<S>>
ANOMEM_INLINE void similarities(const Tile<S>& tile, int64_t i, int64_t j, vec<T> (&s)[Block<T>::kHeight][2]) {
  block_products(tile, i, j, s);
  if constexpr (kInPairs<S>) {
    const int64_t row = tile.row + i, column = tile.column + j;
    const vec<T> rest[2] = {load(tile.right.rest + column), load(tile.right.rest + column + kLanes<T>)};
#pragma GCC unroll 8
    for (int r = 0; r < Block<T>::kHeight; ++r)
      for (int h = 0; h < 2; ++h) s[r][h] *= rest[h] * tile.left.rest[row + r];
  }
}

// The products of a tile, to `kept` for the backward pass.
template <class S, class T = accumulator_t<S>>
inline void keep_products(Tile<S>& tile, bool upper, T* kept, int64_t stride) {
  compute_by_library(tile, upper, kept, stride);
  if (tile.computed != nullptr) return;
  for (int64_t j = 0; j < tile.columns; j += Block<T>::kWidth)
    for (int64_t i = 0; i < tile.rows; i += Block<T>::kHeight) {
      if (upper && j + Block<T>::kWidth <= i) continue;
      vec<T> s[Block<T>::kHeight][2];
      block_products(tile, i, j, s);
      for (int r = 0; r < Block<T>::kHeight; ++r)
        for (int h = 0; h < 2; ++h) store(kept + (i + r) * stride + j + h * kLanes<T>, s[r][h]);
    }
  tile.use(kept, stride);
}

template <class T>
ANOMEM_INLINE typename Simd<T>::bits column_index(int64_t column) {
  return lane_index<T>() + std::remove_reference_t<decltype(typename Simd<T>::bits{}[0])>(column);
}

// Sums of exp(logit − peak) over a tile's rows and columns, and the peaks. With a fixed shift every peak is the shift
// and is not stored.
template <class T>
struct TileSums {
  T row_sum[kLargestTile], row_peak[kLargestTile];
  T column_sum[kLargestTile], column_peak[kLargestTile];
};

// Replaces −inf: the difference of two peaks must not be NaN.
template <class T>
constexpr T kNoPeak = T{-1e30};

template <class T, bool kMasked, class Keep>
ANOMEM_INLINE void add_exponentials(const vec<T> (&s)[Block<T>::kHeight][2], const Scale<T>& scale, const Keep& keep,
                                    int64_t row, int64_t column, vec<T>* row_sum, vec<T> (&column_sum)[2]) {
#pragma GCC unroll 8
  for (int i = 0; i < Block<T>::kHeight; ++i) {
    vec<T> e[2];
    for (int h = 0; h < 2; ++h) {
      e[h] = scale.exponential(s[i][h]);
      if (kMasked) e[h] = keep.template mask<T>(row + i, column_index<T>(column + h * kLanes<T>)) ? e[h] : vec<T>{};
      column_sum[h] += e[h];
    }
    row_sum[i] += e[0] + e[1];
  }
}

// The sums of a tile with a fixed shift; of its columns too if kBoth.
template <bool kBoth, class S, class Keep, class T = accumulator_t<S>>
void sum_with_fixed_shift(const Tile<S>& tile, const Scale<T>& scale, const Keep& keep, TileSums<T>& sums) {
  alignas(64) vec<T> row_sum[kLargestTile] = {};
  for (int64_t j = 0; j < tile.columns; j += Block<T>::kWidth) {
    vec<T> column_sum[2] = {};
    for (int64_t i = 0; i < tile.rows; i += Block<T>::kHeight) {
      const int64_t row = tile.row + i, column = tile.column + j;
      if (keep.template none<T>(row, column)) continue;
      vec<T> s[Block<T>::kHeight][2];
      similarities(tile, i, j, s);
      if (keep.template all<T>(row, column))
        add_exponentials<T, false>(s, scale, keep, row, column, row_sum + i, column_sum);
      else add_exponentials<T, true>(s, scale, keep, row, column, row_sum + i, column_sum);
    }
    if (kBoth)
      for (int h = 0; h < 2; ++h) store(sums.column_sum + j + h * kLanes<T>, column_sum[h]);
  }
  for (int64_t i = 0; i < tile.rows; ++i) sums.row_sum[i] = sum_lanes<T>(row_sum[i]);
}

// The same with a running peak, one per lane until the end: for temperatures too low for a fixed shift.
template <bool kBoth, class S, class Keep, class T = accumulator_t<S>>
void sum_with_peaks(const Tile<S>& tile, const Scale<T>& scale, const Keep& keep, TileSums<T>& sums) {
  alignas(64) vec<T> row_sum[kLargestTile] = {}, row_peak[kLargestTile];
  for (auto& peak : row_peak) peak = broadcast(kNoPeak<T>);
  for (int64_t j = 0; j < tile.columns; j += Block<T>::kWidth) {
    vec<T> column_sum[2] = {}, column_peak[2] = {broadcast(kNoPeak<T>), broadcast(kNoPeak<T>)};
    for (int64_t i = 0; i < tile.rows; i += Block<T>::kHeight) {
      const int64_t row = tile.row + i, column = tile.column + j;
      if (keep.template none<T>(row, column)) continue;
      vec<T> s[Block<T>::kHeight][2];
      similarities(tile, i, j, s);
      vec<T> top[2] = {column_peak[0], column_peak[1]};
      for (int r = 0; r < Block<T>::kHeight; ++r) {
        for (int h = 0; h < 2; ++h) {
          const auto mask = keep.template mask<T>(row + r, column_index<T>(column + h * kLanes<T>));
          s[r][h] = mask ? scale.logit(s[r][h]) : broadcast(T{-INFINITY});
          top[h] = larger(top[h], s[r][h]);
        }
        const vec<T> peak = larger(larger(row_peak[i + r], s[r][0]), s[r][1]);
        row_sum[i + r] = row_sum[i + r] * exp_or_zero(row_peak[i + r] - peak) + exp_or_zero(s[r][0] - peak) +
                         exp_or_zero(s[r][1] - peak);
        row_peak[i + r] = peak;
      }
      if (!kBoth) continue;
      for (int h = 0; h < 2; ++h) {
        column_sum[h] *= exp_or_zero(column_peak[h] - top[h]);
        for (int r = 0; r < Block<T>::kHeight; ++r) column_sum[h] += exp_or_zero(s[r][h] - top[h]);
        column_peak[h] = top[h];
      }
    }
    for (int h = 0; h < 2; ++h) {
      store(sums.column_sum + j + h * kLanes<T>, column_sum[h]);
      store(sums.column_peak + j + h * kLanes<T>, column_peak[h]);
    }
  }
  for (int64_t i = 0; i < tile.rows; ++i) {
    sums.row_peak[i] = max_lanes<T>(row_peak[i]);
    sums.row_sum[i] = sum_lanes<T>(row_sum[i] * exp_or_zero(row_peak[i] - broadcast(sums.row_peak[i])));
  }
}

// Adds one tile's sum to a row's: with peaks, both are brought to the larger one.
template <class T>
ANOMEM_INLINE void merge_sum(bool fixed_shift, T* sum, T* peak, T other_sum, T other_peak) {
  if (fixed_shift) {
    *sum += other_sum;
    return;
  }
  const T top = *peak > other_peak ? *peak : other_peak;
  *sum = *sum * std::exp(*peak - top) + other_sum * std::exp(other_peak - top);
  *peak = top;
}

// Loss of one row from the sum of its negatives, and its total, from which the backward pass computes P: the sum over
// all visible columns with a fixed shift, without one the log-sum of the negatives, whose rounding is relative to
// smaller logits than the positive's. (A small sum is more exact than its logarithm.) The positive is added here, by
// log(1 + negatives / positive): where it dominates its row, the loss is the small quotient. With `hidden` the row does
// not see its positive.
template <class T>
inline void finish_row(const Scale<T>& scale, T negatives, T peak, double similarity, bool hidden, T* loss, T* total) {
  const double sum = negatives, term = scale.positive_term(similarity);
  if (scale.fixed_shift) {
    *loss = static_cast<T>(hidden ? std::log(sum / term) : std::log1p(sum / term));
    *total = static_cast<T>(hidden ? sum : sum + term);
    return;
  }
  const double ratio = static_cast<double>(peak) - term + std::log(sum);  // its logarithm
  const double all = ratio > 0 ? ratio + std::log1p(std::exp(-ratio)) : std::log1p(std::exp(ratio));
  *loss = static_cast<T>(hidden ? ratio : all);
  *total = static_cast<T>(term + ratio);
}

// 1 − P of a row's positive, from the loss −log P. Exact where P is close to 1.
template <class T>
inline T missing_weight(T loss) {
  return -std::expm1(-loss);
}

// Weights of rows (or columns) in the backward pass. With a fixed shift: the upstream gradient over the sum of
// exp(logit − shift). Without one: the upstream gradient times 1 − P of the positive, and the log-sum of the negatives.
template <class T>
struct RowWeights {
  const T* weight;  // [rows, padded with zeros]
  const T* lse;     // [rows, padded], without a fixed shift only
};

// The weights of one register block: W = P_ij w_i, plus P_ji w_j if kBoth; 0 where masked by `keep`.
template <class T, bool kFixedShift, bool kBoth, bool kMasked, class Keep>
ANOMEM_INLINE void write_weights(const vec<T> (&s)[Block<T>::kHeight][2], const Scale<T>& scale, const Keep& keep,
                                 int64_t row, int64_t column, const RowWeights<T>& rows, const RowWeights<T>& columns,
                                 T* to, int64_t stride) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const int64_t j = column + h * kLanes<T>;
    const vec<T> column_weight = kBoth ? load(columns.weight + j) : vec<T>{};
    const vec<T> column_lse = kBoth && !kFixedShift ? load(columns.lse + j) : vec<T>{};
#pragma GCC unroll 8
    for (int i = 0; i < Block<T>::kHeight; ++i) {
      const vec<T> row_weight = broadcast(rows.weight[row + i]);
      vec<T> weight;
      if (kFixedShift) {
        weight = scale.exponential(s[i][h]) * (kBoth ? row_weight + column_weight : row_weight);
      } else {
        const vec<T> logit = scale.logit(s[i][h]);
        weight = row_weight * exp_or_zero(logit - broadcast(rows.lse[row + i]));
        if (kBoth) weight += column_weight * exp_or_zero(logit - column_lse);
      }
      if (kMasked) weight = keep.template mask<T>(row + i, column_index<T>(j)) ? weight : vec<T>{};
      store(to + i * stride + h * kLanes<T>, weight);
    }
  }
}

// W of a tile, [rows, stride]. With `upper`, blocks below the diagonal are not written.
template <bool kFixedShift, bool kBoth, class S, class Keep, class T = accumulator_t<S>>
void tile_weights(const Tile<S>& tile, const Scale<T>& scale, const Keep& keep, const RowWeights<T>& rows,
                  const RowWeights<T>& columns, bool upper, T* weights, int64_t stride) {
  const auto write = [&](int64_t i, int64_t j) {
    const int64_t row = tile.row + i, column = tile.column + j;
    if (upper && j + Block<T>::kWidth <= i) return;
    vec<T> s[Block<T>::kHeight][2];
    similarities(tile, i, j, s);
    T* to = weights + i * stride + j;
    if (keep.template all<T>(row, column))
      write_weights<T, kFixedShift, kBoth, false>(s, scale, keep, row, column, rows, columns, to, stride);
    else write_weights<T, kFixedShift, kBoth, true>(s, scale, keep, row, column, rows, columns, to, stride);
  };
  if (tile.computed != nullptr) {  // along rows, as the processor fetches products kept in a farther cache
    for (int64_t i = 0; i < tile.rows; i += Block<T>::kHeight)
      for (int64_t j = 0; j < tile.columns; j += Block<T>::kWidth) write(i, j);
    return;
  }
  for (int64_t j = 0; j < tile.columns; j += Block<T>::kWidth)
    for (int64_t i = 0; i < tile.rows; i += Block<T>::kHeight) write(i, j);
}

// C [m, features] += A [m, k] B for packed rows B, panels `panel_stride` factors apart. The product is summed before it
// is added: rounding errors grow with the root of the longest chain of additions, and one chain over all tiles would be
// as long as the batch.
template <class F, class T = sum_t<F>>
void add_product(int64_t m, int64_t features, int64_t k, const F* a, int64_t row_stride, int64_t term_stride,
                 const F* b, int64_t panel_stride, T* c, int64_t c_stride) {
  constexpr int height = Block<T>::kHeight, width = Block<T>::kWidth;
  for (int64_t f = 0; f < features; f += width, b += panel_stride)
    for (int64_t i = 0; i < m; i += height) {
      vec<T> sums[height][2] = {};
      multiply<F, height>(k, a + i * row_stride, row_stride, term_stride, b, sums);
      for (int r = 0; r < height; ++r)
        for (int h = 0; h < 2; ++h) {
          T* to = c + (i + r) * c_stride + f + h * kLanes<T>;
          store(to, load(to) + sums[r][h]);
        }
    }
}

// A tile's complete weights, rounded to bfloat16, in pairs of neighbours in a row and in pairs of neighbours in a
// column. Each includes the `rest` (see PackedRows) of the row that it multiplies.
template <class S>
struct WeightPairs;
#if ANOMEM_BFLOAT16_PAIRS
template <>
struct WeightPairs<Bfloat16> {
  alignas(64) Pair in_row[kLargestTile * kTileStride / 2];
  alignas(64) Pair in_column[kLargestTile / 2 * kTileStride];

  WeightPairs(const Tile<Bfloat16>& tile, const float* w, int64_t rows) {
    for (int64_t i = 0; i < rows; i += 2)
      for (int64_t j = 0; j < tile.columns; j += 2 * kLanes<float>) {
        const float *at = w + i * kTileStride + j, *rest = tile.right.rest + tile.column + j;
        const float* row_rest = tile.left.rest + tile.row + i;
        const vec<float> column_rest[2] = {load(rest), load(rest + kLanes<float>)};
        const vec<float> first[2] = {load(at), load(at + kLanes<float>)};
        const vec<float> second[2] = {load(at + kTileStride), load(at + kTileStride + kLanes<float>)};
        store_neighbours(in_row + (i * kTileStride + j) / 2, first[0] * column_rest[0], first[1] * column_rest[1]);
        store_neighbours(in_row + ((i + 1) * kTileStride + j) / 2, second[0] * column_rest[0],
                         second[1] * column_rest[1]);
        Pair* to = in_column + i / 2 * kTileStride + j;
        for (int h = 0; h < 2; ++h) store(to + h * kLanes<float>, first[h] * row_rest[0], second[h] * row_rest[1]);
      }
  }
};
#endif

// C [m, n] += A [m, k] B by the library, k terms; A and C with strides, B [k, n] in one panel.
template <class S, class T = accumulator_t<S>>
inline void add_library_product(int64_t m, int64_t n, int64_t k, const factor_t<S>* a, int64_t a_stride,
                                const factor_t<S>* b, T* c) {
  if constexpr (kInLibrary<factor_t<S>>) {
    constexpr int64_t width = 128;
    for (int64_t j = 0; j < n; j += width)
      library_product(m, n - j < width ? n - j : width, k, library_elements(a), Factor<S>::kTerms * a_stride,
                      library_elements(b + j), n, c + j, n, true);
  }
}

// `add_gradients` by the library.
template <class S, class T = accumulator_t<S>>
void add_gradients_by_library(const Tile<S>& tile, T* w, const Side<S>& left, const Side<S>& right, bool both) {
  constexpr int64_t step = 32;  // few sizes of products; `tile_weights` wrote columns up to it
  using Word = std::conditional_t<kInPairs<S>, float, T>;
  const int64_t rows = round_up(tile.rows, step), columns = round_up(tile.columns, step);
  const int64_t written = round_up(tile.rows, Block<T>::kHeight), n = left.padded_features, terms = factors<S>(rows);
  std::memset(w + written * kTileStride, 0, (rows - written) * kTileStride * sizeof(T));
  T* const row_gradient = left.gradient + tile.row * n;
  T* const column_gradient = right.gradient + tile.column * n;
  alignas(64) Word down[kLargestTile * kLargestTile];  // Wᵀ
  const auto add = [&](const factor_t<S>* in_row, int64_t stride, const factor_t<S>* in_column) {
    add_library_product<S>(rows, n, columns, in_row, stride, right.rows_from(tile.column), row_gradient);
    if (!both) return;
    transpose(reinterpret_cast<const Word*>(in_column), kTileStride, terms, columns, terms, down, terms);
    add_library_product<S>(columns, n, rows, reinterpret_cast<const factor_t<S>*>(down), terms,
                           left.rows_from(tile.row), column_gradient);
  };
  if constexpr (kInPairs<S>) {
    const WeightPairs<S> pairs(tile, w, rows);
    add(pairs.in_row, kTileStride / 2, pairs.in_column);
  } else {
    add(w, kTileStride, w);
  }
}

// Adds W V to the gradient of a tile's rows and, if `both`, Wᵀ U to that of its columns.
template <class S, class T = accumulator_t<S>>
void add_gradients(const Tile<S>& tile, T* w, const Side<S>& left, const Side<S>& right, bool both) {
  if constexpr (kInLibrary<factor_t<S>>)
    if (left.library()) return add_gradients_by_library(tile, w, left, right, both);
  const int64_t rows = factors<S>(tile.rows), columns = factors<S>(tile.columns), stride = left.padded_features;
  T* const row_gradient = left.gradient + tile.row * stride;
  T* const column_gradient = right.gradient + tile.column * stride;
  const factor_t<S>*u = left.rows_from(tile.row), *v = right.rows_from(tile.column);
  const auto add = [&](const factor_t<S>* in_row, int64_t row_stride, const factor_t<S>* in_column) {
    add_product(tile.rows, tile.features, columns, in_row, row_stride, 1, v, right.panel_stride(), row_gradient,
                stride);
    if (both)
      add_product(tile.columns, tile.features, rows, in_column, 1, kTileStride, u, left.panel_stride(), column_gradient,
                  stride);
  };
  if constexpr (kInPairs<S>) {
    const WeightPairs<S> pairs(tile, w, tile.rows);
    add(pairs.in_row, kTileStride / 2, pairs.in_column);
  } else {
    add(w, kTileStride, w);
  }
}

// Rounds of tile pairs. No row of tiles occurs twice in a round: its pairs run at once, and each adds to its two rows.
// Every row receives its sums in the order of the rounds, whatever the number of threads.

// Every unordered pair of tiles, and every tile with itself, by the circle method. With an odd number of tiles one is
// left over in each round and meets itself; with an even number all do so in a last round.
struct Tournament {
  int64_t tiles;
  bool is_odd() const { return tiles % 2 == 1; }
  int64_t rounds() const { return tiles; }
  int64_t pairs(int64_t round) const { return is_odd() ? (tiles + 1) / 2 : round == tiles - 1 ? tiles : tiles / 2; }

  // first ≤ second
  void pair(int64_t round, int64_t index, int64_t* first, int64_t* second) const {
    const int64_t circle = is_odd() ? tiles : tiles - 1;
    int64_t a, b;
    if (!is_odd() && round == tiles - 1) {
      a = b = index;
    } else if (index == 0) {
      a = round;
      b = is_odd() ? round : tiles - 1;
    } else {
      a = (round + index) % circle;
      b = (round - index + circle) % circle;
    }
    *first = a < b ? a : b;
    *second = a < b ? b : a;
  }
};

// Every pair of a row tile and a column tile.
struct Crossing {
  int64_t rows, columns;
  int64_t rounds() const { return rows < columns ? columns : rows; }
  int64_t pairs(int64_t) const { return rows < columns ? rows : columns; }
  void pair(int64_t round, int64_t index, int64_t* row, int64_t* column) const {
    *row = rows < columns ? index : (index + round) % rows;
    *column = rows < columns ? (index + round) % columns : index;
  }
};

// Runs a contrast, `wave` groups at a time, each in its place of the workspace:
// 1. prepare(group, place, block) for every block of rows,
// 2. add(group, place, row tile, column tile) round by round,
// 3. finish(group, place, block) for every block of rows.
template <class Rounds, class Prepare, class Add, class Finish>
void run_in_waves(int64_t groups, int64_t wave, int64_t blocks, const Rounds& schedule, const Prepare& prepare,
                  const Add& add, const Finish& finish) {
  for (int64_t start = 0; start < groups; start += wave) {
    const int64_t count = groups - start < wave ? groups - start : wave;
    if (schedule.rounds() == 1) {  // one tile: a group is one item
      parallel(count, [&](int64_t place) {
        for (int64_t block = 0; block < blocks; ++block) prepare(start + place, place, block);
        add(start + place, place, 0, 0);
        for (int64_t block = 0; block < blocks; ++block) finish(start + place, place, block);
      });
      continue;
    }
    parallel(count * blocks, [&](int64_t i) { prepare(start + i / blocks, i / blocks, i % blocks); });
    for (int64_t round = 0; round < schedule.rounds(); ++round) {
      const int64_t pairs = schedule.pairs(round);
      parallel(count * pairs, [&](int64_t i) {
        int64_t first, second;
        schedule.pair(round, i % pairs, &first, &second);
        add(start + i / pairs, i / pairs, first, second);
      });
    }
    parallel(count * blocks, [&](int64_t i) { finish(start + i / blocks, i / blocks, i % blocks); });
  }
}

}  // namespace anomem::cpu::ANOMEM_ISA
