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
  if (prior != nullptr) {
    for_vectors<T>(m, [&](int64_t j, int64_t count) {
      store(x + j, multiply_add(load(x + j), broadcast(beta), load_some(prior + j, count)));
    });
    beta = 1;
  }
  // The largest logit is found among the scores and subtracted from them: it then is exactly zero, and the logits need
  // no pass of their own.
  const T sign = beta < 0 ? T(-1) : T(1);
  vec<T> top = broadcast(lowest);
  for_vectors<T>(m, [&](int64_t j, int64_t count) {
    const vec<T> score = load(x + j) * sign;
    top = larger(count < lanes<T> ? keep_first<T>(score, count, lowest) : score, top);
  });
  const T best = sign * max_lanes<T>(top), max = best * beta;
  T special = 0;
  if (!(max - max == 0)) {
    special = max;
    for (int64_t j = 0; j < m; ++j) special = x[j] * beta != x[j] * beta ? T(NAN) : special;
  }
  vec<T> sum{}, product{};
  for_vectors<T>(m, [&](int64_t j, int64_t count) {
    const vec<T> shifted = (load(x + j) - best) * beta;
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
