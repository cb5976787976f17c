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

// |scale · x| in double, in which squares of floats stay within the range.
template <class S>
inline double length_of(const S* x, int64_t features, double scale) {
  double lane[8] = {};
  for (int64_t p = 0; p < features; ++p) {
    const double value = scale * widen(x[p]);
    lane[p % 8] += value * value;
  }
  return std::sqrt(((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7])));
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
  factor_t<S>* columns;    // [rows / width, factors in a row, width]
  accumulator_t<S>* rest;  // [rows], in pairs only

  PackedRows from(int64_t row, int64_t features) const { return {columns + row * factors<S>(features), rest + row}; }
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
    rows_.pack_columns(count, to.columns, kRowPadding);
    if constexpr (kInPairs<S>) std::memcpy(to.rest, rest_, sizeof rest_);
  }

  // As rows of a right factor, panels `panel_stride` factors apart; zeros up to kRowPadding.
  void pack_rows(int64_t count, factor_t<S>* to, int64_t panel_stride) const {
    rows_.pack_rows(count, to, panel_stride, kRowPadding);
  }

 private:
  FactorRows<S> rows_;
  T rest_[kRowPadding] = {};
};

// The positives of up to kRowPadding rows, packed as PackedRows.
template <class S>
class PackedPositives : public UnitBlock<S> {
 public:
  explicit PackedPositives(int64_t features) : UnitBlock<S>(features), columns_(kRowPadding * factors<S>(features)) {}

  PackedRows<S> packed(int64_t count) {
    const PackedRows<S> to{columns_.data(), rest_};
    UnitBlock<S>::pack(count, to);
    return to;
  }

 private:
  Buffer<factor_t<S>> columns_;
  accumulator_t<S> rest_[kRowPadding];
};

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

// The weight of a row in the backward pass, see RowWeights.
template <class T>
inline T row_weight(bool fixed_shift, T dloss, T total) {
  return fixed_shift ? dloss / total : dloss;
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
  T* gradient;        // [padded, padded_features]: dL/du without its factor 1/tau
  int64_t padded, padded_features;

  int64_t panel_stride() const { return factors<S>(padded) * Block<T>::kWidth; }
  factor_t<S>* rows_from(int64_t row) const { return rows + factors<S>(row) * Block<T>::kWidth; }

  // Packs a block of rows in both ways and clears its gradient.
  void prepare(const UnitBlock<S>& block, const Span& span, int64_t features) const {
    block.pack(span.count, unit.from(span.first, features));
    block.pack_rows(span.count, rows_from(span.first), panel_stride());
    std::memset(gradient + span.first * padded_features, 0, kRowPadding * padded_features * sizeof(T));
  }
};

}  // namespace anomem::cpu::ANOMEM_ISA
