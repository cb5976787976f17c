// L2 normalisation of rows, as products read them, and its gradient. A unit row is x · (1/|x|), made wherever it is read:
// it is not kept.
#pragma once

#include "cpu/contrast.h"
#include "cpu/factor_rows.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

namespace anomem::cpu::ANOMEM_ISA {

template <class S>
ANOMEM_INLINE const S* row_of(const Rows& rows, int64_t group, int64_t i) {
  return static_cast<const S*>(rows.data) + group * rows.group_stride + i * rows.row_stride;
}

// 1/|x|: 0 for a row of at most 1e-12, which becomes 0, and NaN for one that is not finite.
template <class S>
inline accumulator_t<S> inverse_norm(const S* x, int64_t features) {
  // In double: neither squares of large numbers nor of small ones leave its range.
  double lane[8] = {};
  for (int64_t p = 0; p < features; ++p) {
    const double value = widen(x[p]);
    lane[p % 8] += value * value;
  }
  const double length =
      std::sqrt(((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7])));
  if (length - length != 0) return NAN;
  return accumulator_t<S>(length <= 1e-12 ? 0.0 : 1.0 / length);
}

// Unit rows as the factor of similarities. Rounded to bfloat16 they would be off by 2^-9, and logits with them: in pairs
// they are x times a power of two, which rounds nothing, and beside it what is left of 1/|x|.
template <class S>
struct PackedRows {
  factor_t<S>* columns;     // [rows / width, factors in a row, width]
  accumulator_t<S>* rest;   // [rows], in pairs only

  PackedRows from(int64_t row, int64_t features) const { return {columns + row * factors<S>(features), rest + row}; }
};

// Up to `row_padding` unit rows: set one by one, then packed.
template <class S>
class UnitBlock {
 public:
  using T = accumulator_t<S>;
  explicit UnitBlock(int64_t features) : rows_(row_padding, features) {}

  void set(int64_t i, const S* x, T inv_norm) {
    T scale = inv_norm;
    if constexpr (in_pairs<S>) {
      int exponent = 0;
      rest_[i] = inv_norm - inv_norm == 0 ? std::frexp(inv_norm, &exponent) : inv_norm;
      scale = std::ldexp(T(1), exponent);
    }
    rows_.set(i, x, scale);
  }

  // As the factor of similarities, and zeros up to `row_padding`.
  void pack(int64_t count, const PackedRows<S>& to) const {
    rows_.pack_columns(count, to.columns, row_padding);
    if constexpr (in_pairs<S>) std::memcpy(to.rest, rest_, sizeof rest_);
  }

  // As they lie, panels `panel` factors apart, and zeros up to `row_padding`.
  void pack_rows(int64_t count, factor_t<S>* to, int64_t panel) const {
    rows_.pack_rows(count, to, panel, row_padding);
  }

 private:
  FactorRows<S> rows_;
  T rest_[row_padding] = {};
};

// The positives of up to `row_padding` rows, packed as `PackedRows` are.
template <class S>
class PackedPositives : public UnitBlock<S> {
 public:
  explicit PackedPositives(int64_t features) : UnitBlock<S>(features), columns_(row_padding * factors<S>(features)) {}

  PackedRows<S> packed(int64_t count) {
    const PackedRows<S> to{columns_.data(), rest_};
    UnitBlock<S>::pack(count, to);
    return to;
  }

 private:
  Buffer<factor_t<S>> columns_;
  accumulator_t<S> rest_[row_padding];
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
  const T along = sum_lanes<T>(sum);
  const bool zero = inv_norm == 0;
  for_vectors<T>(features, [&](int64_t p, int64_t count) {
    const vec<T> unit = load_some(x + p, count) * inv_norm;
    const vec<T> d = (load_some(gradient + p, count) - unit * along) * (scale * inv_norm);
    store_some(dx + p, zero ? vec<T>{} : d, count);
  });
  return along * scale;
}

// What a row weighs in the backward, see RowWeights.
template <class T>
inline T row_weight(bool fixed_shift, T dloss, T total) {
  return fixed_shift ? dloss / total : dloss;
}

}  // namespace anomem::cpu::ANOMEM_ISA
