// L2 normalisation of rows and its gradient.
#pragma once

#include "cpu/rows.h"
#include "cpu/simd.h"

namespace anomem::cpu::ANOMEM_ISA {

// unit = x / max(|x|, 1e-12), and 1/|x|: 0 for a row below that length (its unit is 0), NaN for one that is not finite.
template <class S>
inline void normalize_row(const S* x, int64_t features, S* unit, accumulator_t<S>* inv_norm) {
  using T = accumulator_t<S>;
  // In double: neither squares of large numbers nor of small ones leave its range.
  double lane[8] = {};
  for (int64_t p = 0; p < features; ++p) {
    double value;
    if constexpr (std::is_same_v<S, Bfloat16>) value = to_float(x[p]);
    else value = x[p];
    lane[p % 8] += value * value;
  }
  const double length =
      std::sqrt(((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7])));
  const double inverse = length <= 1e-12 ? 0.0 : 1.0 / length;
  *inv_norm = T(length - length == 0 ? inverse : NAN);
  const vec<T> factor = broadcast(T(inverse));
  int64_t p = 0;
  for (; p + lanes<T> <= features; p += lanes<T>) store(unit + p, load(x + p) * factor);
  if (p < features) store_first(unit + p, load_first(x + p, features - p) * factor, features - p);
}

// dx = (dy − u (u·dy)) / |x| for dy = scale · gradient; a zero row gets 0. Returns u·dy.
template <class S>
inline accumulator_t<S> unnormalize_gradient(const accumulator_t<S>* gradient, accumulator_t<S> scale, const S* unit,
                                             accumulator_t<S> inv_norm, int64_t features, S* dx) {
  using T = accumulator_t<S>;
  vec<T> sum = {};
  const int64_t whole = features / lanes<T> * lanes<T>, rest = features - whole;
  for (int64_t p = 0; p < whole; p += lanes<T>) sum = multiply_add(load(unit + p), load(gradient + p), sum);
  if (rest > 0) sum += load_first(unit + whole, rest) * load_first(gradient + whole, rest);
  const T along = sum_lanes<T>(sum);
  const bool zero = inv_norm == 0;
  const vec<T> inner = broadcast(along), factor = broadcast(zero ? T(0) : scale * inv_norm);
  for (int64_t p = 0; p < whole; p += lanes<T>) {
    const vec<T> d = (load(gradient + p) - load(unit + p) * inner) * factor;
    store(dx + p, zero ? vec<T>{} : d);
  }
  if (rest > 0) {
    const vec<T> d = (load_first(gradient + whole, rest) - load_first(unit + whole, rest) * inner) * factor;
    store_first(dx + whole, zero ? vec<T>{} : d, rest);
  }
  return along * scale;
}

// What a row weighs in the backward, see RowWeights.
template <class T>
inline T row_weight(bool fixed_shift, T shift, T dloss, T lse) {
  return fixed_shift ? T(double(dloss) * std::exp2(double(shift) - double(lse) * log2e<double>)) : dloss;
}

}  // namespace anomem::cpu::ANOMEM_ISA
