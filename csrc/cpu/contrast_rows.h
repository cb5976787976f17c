// Rows of a contrast: normalised, packed as factors, and their gradient. A unit row is x · (1/|x|), computed again
// wherever it is read.
#pragma once

#include "cpu/contrast.h"
#include "cpu/factors.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

namespace anomem::cpu::ANOMEM_ISA {

// The range of block or tile `index`.
struct Span {
  int64_t first, count;
  Span(int64_t index, int64_t tile, int64_t total)
      : first(index * tile), count(total - first < tile ? total - first : tile) {}
};

template <class S>
ANOMEM_INLINE const S* row_of(const Rows& rows, int64_t group, int64_t i) {
  return static_cast<const S*>(rows.data) + group * rows.group_stride + i * rows.row_stride;
}

// x·x, x·y and y·y of two rows with factors, in double, in which squares of floats stay within the range.
struct Products {
  double xx, xy, yy;
};

template <class S>
inline Products products_in_double(const S* x, double scale_x, const S* y, double scale_y, int64_t features) {
  constexpr int64_t lanes = kLanes<double>;
  vec<double> xx{}, xy{}, yy{};
  const auto add = [&](vec<double> a, vec<double> b) {
    a *= scale_x;
    b *= scale_y;
    xx = multiply_add(a, a, xx);
    xy = multiply_add(a, b, xy);
    yy = multiply_add(b, b, yy);
  };
  int64_t p = 0;
  for (; p + lanes <= features; p += lanes) add(load_double(x + p), load_double(y + p));
  if (p < features) {
    vec<double> a{}, b{};
    for (int64_t i = 0; p + i < features; ++i) {
      a[i] = widen(x[p + i]);
      b[i] = widen(y[p + i]);
    }
    add(a, b);
  }
  return {sum_lanes<double>(xx), sum_lanes<double>(xy), sum_lanes<double>(yy)};
}

// |scale · x| in double.
template <class S>
inline double length_of(const S* x, int64_t features, double scale) {
  constexpr int64_t lanes = kLanes<double>;
  vec<double> even{}, odd{};
  const auto add = [&](vec<double> a, vec<double>& sum) {
    a *= scale;
    sum = multiply_add(a, a, sum);
  };
  int64_t p = 0;
  for (; p + 2 * lanes <= features; p += 2 * lanes) {
    add(load_double(x + p), even);
    add(load_double(x + p + lanes), odd);
  }
  for (; p < features; ++p) {
    const double a = widen(x[p]) * scale;
    even[0] += a * a;
  }
  return std::sqrt(sum_lanes<double>(even + odd));
}

// 1/|x|. 0 if |x| ≤ 1e-12: the row becomes zero. NaN for a row with a NaN or an infinity.
template <class S>
inline accumulator_t<S> inverse_norm(const S* x, int64_t features) {
  const double length = length_of(x, features, 1);
  if (!is_finite(length)) {
    const double scale = shrinking_factor(x, features);
    return scale == 0 ? NAN : static_cast<accumulator_t<S>>(scale / length_of(x, features, scale));
  }
  return static_cast<accumulator_t<S>>(length <= 1e-12 ? 0.0 : 1.0 / length);
}

// Unit rows as factors of similarities. Rounding them to bfloat16 would shift logits by up to 2^-9. In pairs they are
// therefore x times a power of two, which is exact, and `rest`, the remaining factor of 1/|x|.
template <class S>
struct PackedRows {
  // [rows / width, factors in a row, width]; the width is Block::kWidth, for the library's products kRowPadding.
  factor_t<S>* columns;            // or null: they are on the left of the library's products
  accumulator_t<S>* rest;          // [rows], in pairs only
  factor_t<S>* in_rows = nullptr;  // [rows, row_stride], on the left of the library's products only
  int64_t row_stride = 0;
  bool library = false;
  int64_t first = 0;  // number of the first row in its group, a multiple of kRowPadding

  // From this row of the group on.
  PackedRows from(int64_t row, int64_t features) const {
    const int64_t terms = factors<S>(features), own = row - first;
    return {columns == nullptr ? nullptr : columns + own * terms,
            rest + own,
            in_rows == nullptr ? nullptr : in_rows + own * row_stride,
            row_stride,
            library,
            row};
  }
};

// Up to kRowPadding unit rows: set one by one, then packed.
template <class S>
class UnitBlock {
 public:
  using T = accumulator_t<S>;
  explicit UnitBlock(int64_t features) : rows_(kRowPadding, features) {}

  void set(int64_t i, const S* x, T inv_norm) {
    T scale = inv_norm;
    if constexpr (kInPairs<S>) {
      int exponent = 0;
      rest_[i] = inv_norm - inv_norm == 0 ? std::frexp(inv_norm, &exponent) : inv_norm;
      scale = std::ldexp(T{1}, exponent);
    }
    rows_.set(i, x, scale);
  }

  // As factors of similarities; zeros up to kRowPadding.
  void pack(int64_t count, const PackedRows<S>& to) const {
    if (!to.library) rows_.pack_columns(count, to.columns, kRowPadding);
    else if (to.columns != nullptr) rows_.copy_columns(count, kRowPadding, to.columns);
    if (to.in_rows != nullptr) rows_.copy_rows(count, kRowPadding, to.in_rows, to.row_stride);
    if constexpr (kInPairs<S>) std::memcpy(to.rest, rest_, sizeof rest_);
  }

  // Without the factors of similarities: for the library's products the rows as they are, in pairs `rest` alone.
  void pack_kept(int64_t count, const PackedRows<S>& to) const {
    if constexpr (kInPairs<S>) std::memcpy(to.rest, rest_, sizeof rest_);
    else if (to.in_rows != nullptr) rows_.copy_rows(count, kRowPadding, to.in_rows, to.row_stride);
  }

  // As rows of a right factor of the library's products in pairs, one panel; zeros up to kRowPadding.
  void pair_rows(int64_t count, factor_t<S>* to, int64_t width) const {
    rows_.pair_rows(count, kRowPadding, to, width);
  }

  // As rows of a right factor, panels `panel_stride` factors apart; zeros up to kRowPadding.
  void pack_rows(int64_t count, factor_t<S>* to, int64_t panel_stride) const {
    rows_.pack_rows(count, to, panel_stride, kRowPadding);
  }

 private:
  FactorRows<S> rows_;
  T rest_[kRowPadding] = {};
};

// The similarity of a row and its positive, in double: they are nearly parallel, and 1/tau multiplies the rounding of
// their norms and of a sum whose terms have one sign. A row whose inverse norm is 0 is zero, of NaN is NaN.
template <class S, class T = accumulator_t<S>>
inline double positive_similarity(const S* x, T inv_x, const S* y, T inv_y, int64_t features) {
  if (inv_x == 0 || inv_y == 0 || inv_x != inv_x || inv_y != inv_y) return inv_x * inv_y;
  const Products products = products_in_double(x, 1.0, y, 1.0, features);
  const double similarity = products.xy / (std::sqrt(products.xx) * std::sqrt(products.yy));
  if (is_finite(similarity)) return similarity;
  return products_in_double(x, inv_x, y, inv_y, features).xy;  // squares of float64 may overflow
}

// dx = (dy − u (u·dy)) / |x| for dy = scale · gradient; a zero row gets 0. Returns u·dy.
template <class S>
inline accumulator_t<S> unnormalize_gradient(const accumulator_t<S>* gradient, accumulator_t<S> scale, const S* x,
                                             accumulator_t<S> inv_norm, int64_t features, S* dx) {
  using T = accumulator_t<S>;
  vec<T> sum{};
  for_vectors<T>(features, [&](int64_t p, int64_t count) {
    sum = multiply_add(load_some(x + p, count) * inv_norm, load_some(gradient + p, count), sum);
  });
  const T projection = sum_lanes<T>(sum);
  const bool zero = inv_norm == 0;
  for_vectors<T>(features, [&](int64_t p, int64_t count) {
    const vec<T> unit = load_some(x + p, count) * inv_norm;
    const vec<T> d = (load_some(gradient + p, count) - unit * projection) * (scale * inv_norm);
    store_some(dx + p, zero ? vec<T>{} : d, count);
  });
  return projection * scale;
}

// The weight of a row in the backward pass, see RowWeights; `missing` is 1 − P of its positive.
template <class T>
inline T row_weight(bool fixed_shift, T dloss, T total, T missing) {
  return fixed_shift ? dloss / total : dloss * missing;
}

// Row i of the 2B rows of a group.
template <class S>
ANOMEM_INLINE const S* row_of(const Rows (&view)[2], int64_t batch, int64_t group, int64_t i) {
  const int side = i >= batch;
  return row_of<S>(view[side], group, i - side * batch);
}

// One side of one group in the backward pass.
template <class S>
struct Side {
  using T = accumulator_t<S>;
  PackedRows<S> unit;
  factor_t<S>* rows;  // the same rows as a right factor, [padded_features / width, factors in `padded` terms, width]
  T* gradient;        // of all rows of the group, [.., padded_features]: dL/du without its factor 1/tau
  int64_t padded, padded_features;

  // For the library's products all features are one panel.
  bool library() const { return unit.library; }
  int64_t panel_width() const { return library() ? padded_features : Block<T>::kWidth; }
  int64_t panel_stride() const { return factors<S>(padded) * Block<T>::kWidth; }
  factor_t<S>* rows_from(int64_t row) const { return rows + factors<S>(row - unit.first) * panel_width(); }

  // Packs a block of rows; with `kept` products as a right factor alone.
  void pack(const UnitBlock<S>& block, const Span& span, int64_t features, bool kept) const {
    if (!kept) block.pack(span.count, unit.from(span.first, features));
    else block.pack_kept(span.count, unit.from(span.first, features));
    if (!library()) block.pack_rows(span.count, rows_from(span.first), panel_stride());
    else if (kInPairs<S>) block.pair_rows(span.count, rows_from(span.first), padded_features);
  }
  void clear_gradient(const Span& span) const {
    std::memset(gradient + span.first * padded_features, 0, kRowPadding * padded_features * sizeof(T));
  }
};

// The rows of a forward pass from `first` on at `start`, [padded, forward_row]: for the library's products as they are,
// packed, and `rest`.
template <class S>
inline PackedRows<S> forward_rows(accumulator_t<S>* start, int64_t padded, int64_t features, bool library,
                                  ProductSide side, int64_t first = 0) {
  accumulator_t<S>* const rest = start + padded * (forward_row(features, library, side) - 1);
  PackedRows<S> rows{nullptr, rest};
  rows.first = first;
  rows.library = library;
  if (!library) {
    rows.columns = reinterpret_cast<factor_t<S>*>(start);
    return rows;
  }
  if (side != ProductSide::kLeft) rows.columns = reinterpret_cast<factor_t<S>*>(rest - padded * features);
  if (side != ProductSide::kRight) {
    rows.in_rows = reinterpret_cast<factor_t<S>*>(start);
    rows.row_stride = kInPairs<S> ? factors<S>(features) : round_up(features, kFeaturePadding);
  }
  return rows;
}

// One side of a backward pass. Its rows from `first` on are at `start`, [padded, backward_row]: as a right factor,
// `rest`, and unless all products are kept packed for similarities. For the library's products a right factor is the
// rows as they are; of pairs it has both those and, in its first half, pairs of neighbouring rows.
template <class S>
inline Side<S> backward_side(accumulator_t<S>* gradient, accumulator_t<S>* start, int64_t padded, int64_t features,
                             bool library, int64_t first = 0) {
  const int64_t padded_features = round_up(features, kFeaturePadding);
  auto* const rest = start + padded * padded_features;
  auto* const as_rows = reinterpret_cast<factor_t<S>*>(start);
  PackedRows<S> unit{reinterpret_cast<factor_t<S>*>(rest + padded), rest};
  unit.first = first;
  unit.library = library;
  if (library) {
    unit.in_rows = kInPairs<S> ? as_rows + padded / 2 * padded_features : as_rows;
    unit.row_stride = kInPairs<S> ? factors<S>(features) : padded_features;
  }
  return {unit, as_rows, gradient, padded, padded_features};
}

}  // namespace anomem::cpu::ANOMEM_ISA
