// The pass between the two products of a retrieval: one row of scores becomes one row of weights.
#pragma once

#include "cpu/rows.h"
#include "cpu/simd.h"

namespace anomem::cpu::ANOMEM_ISA {

// What a row of exponentials leaves behind.
template <class T>
struct RowSum {
  T sum;       // Σ e, e_j = exp(logit_j − largest logit)
  T lse;       // logsumexp of the logits
  T weighted;  // Σ e log e if asked for, with 0 · log 0 = 0: the entropy of e / Σ e is log Σ e − Σ e log e / Σ e
};

// x ← exp(beta x + prior − max) over the first m columns of a tile's row; the row is padded to whole vectors.
// A row with a NaN or an infinity gives what the reference gives: NaN weights, and logsumexp's own rules.
template <bool weighted = false, class T>
inline RowSum<T> exponentials(T* x, int64_t m, T beta, const T* prior = nullptr) {
  constexpr T lowest = -T(INFINITY);
  // Made twice rather than stored in between. `from`: what is taken from it, in the same multiply-add.
  const auto logit = [&](int64_t j, int64_t count, vec<T> from) {
    const vec<T> offset = prior == nullptr ? vec<T>{} - from : load_some(prior + j, count) - from;
    return multiply_add(load(x + j), broadcast(beta), offset);
  };
  vec<T> top = broadcast(lowest);
  for_vectors<T>(m, [&](int64_t j, int64_t count) {
    const vec<T> whole = logit(j, count, vec<T>{});
    top = larger(count < lanes<T> ? keep_first<T>(whole, count, lowest) : whole, top);
  });
  const T max = max_lanes<T>(top);
  T special = 0;
  if (!(max - max == 0)) {
    special = max;
    for (int64_t j = 0; j < m; ++j) {
      const T one = x[j] * beta + (prior == nullptr ? T(0) : prior[j]);
      special = one != one ? one : special;
    }
  }
  vec<T> sum{}, product{};
  for_vectors<T>(m, [&](int64_t j, int64_t count) {
    const vec<T> shifted = logit(j, count, broadcast(max));
    vec<T> e = exp_or_zero(shifted);
    if (count < lanes<T>) e = keep_first<T>(e, count);
    store(x + j, e);
    sum += e;
    if constexpr (weighted) product += e == vec<T>{} ? vec<T>{} : e * shifted;
  });
  const T total = sum_lanes<T>(sum);
  return {total, max - max == 0 ? max + std::log(total) : special, weighted ? sum_lanes<T>(product) : T(0)};
}

}  // namespace anomem::cpu::ANOMEM_ISA
