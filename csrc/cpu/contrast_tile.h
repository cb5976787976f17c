// One tile of a contrast: the similarities of up to 128 rows and 128 columns, which of them take part, and their scale.
// contrast_sums.h sums their exponentials; contrast_gradients.h turns them into weights.
#pragma once

#include "cpu/contrast.h"
#include "cpu/contrast_rows.h"
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

// Of the rows of two joined views: all but the row itself and its positive at a distance of count / 2.
struct NegativesOfBlock {
  int64_t count;
  int64_t half() const { return count / 2; }
  template <class T>
  bool none(int64_t, int64_t) const {
    return false;
  }
  template <class T>
  bool all(int64_t row, int64_t column) const {
    if (row + Block<T>::kHeight > count || column + Block<T>::kWidth > count) return false;
    const auto meets = [&](int64_t other) {
      return other < column + Block<T>::kWidth && column < other + Block<T>::kHeight;
    };
    return !meets(row) && !meets(row + half()) && !meets(row - half());
  }
  template <class T>
  ANOMEM_INLINE typename Simd<T>::bits mask(int64_t row, typename Simd<T>::bits column) const {
    typedef std::remove_reference_t<decltype(column[0])> index;
    const index positive = static_cast<index>(row < half() ? row + half() : row - half());
    return (column < static_cast<index>(row < count ? count : 0)) & (column != static_cast<index>(row)) &
           (column != positive);
  }
};

// A tile: `rows` × `columns` similarities from (row, column) on.
template <class S>
struct Tile {
  PackedRows<S> left, right;
  int64_t features;
  int64_t row, rows;  // `row` and `column` are numbers in the group
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

  // Where the tile begins in the packed rows.
  int64_t left_row() const { return row - left.first; }
  int64_t right_row() const { return column - right.first; }

  void use(const accumulator_t<S>* products, int64_t stride) {
    computed = products;
    computed_stride = stride;
  }
};

// The products of a tile by the library or in the processor's tiles, if its rows are laid out for that; with `upper`
// those on and above the diagonal. They must outlive the tile's use.
template <class S, class T = accumulator_t<S>>
inline void compute_by_library(Tile<S>& tile, bool upper, T* to, int64_t to_stride = kTileStride) {
  if constexpr (kInLibrary<factor_t<S>>) {
    if (!tile.left.library) return;
    constexpr int64_t width = kRowPadding, each = Factor<S>::kTerms;
    const int64_t terms = factors<S>(tile.features), rows = round_up(tile.rows, width);
    const factor_t<S>* left = tile.left.in_rows + tile.left_row() * tile.left.row_stride;
    if constexpr (kSplits && std::is_same_v<S, float>)
      if (splits_products()) {
        const int64_t step = upper ? width : tile.columns;
        for (int64_t j = 0; j < tile.columns; j += step) {
          const Panels right{
              tile.right.columns + (tile.right_row() + j) * terms, terms, width, nullptr, 0, terms, width};
          product_in_tiles(upper ? at_most(j + width, rows) : rows, at_most(step, tile.columns - j), terms, left,
                           tile.left.row_stride, nullptr, right, to + j, to_stride, false);
        }
        return tile.use(to, to_stride);
      }
    for (int64_t j = 0; j < tile.columns; j += width)
      for (int64_t start = 0; start < terms; start += kChain) {
        const factor_t<S>* right = tile.right.columns + (tile.right_row() + j) * terms + start * width;
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
  const int64_t row = tile.left_row() + i, column = tile.right_row() + j, terms = factors<S>(tile.features);
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
    const int64_t row = tile.left_row() + i, column = tile.right_row() + j;
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

}  // namespace anomem::cpu::ANOMEM_ISA
