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
  vec<T> top = broadcast(lowest);
  for_vectors<T>(m, [&](int64_t j, int64_t count) {
    vec<T> logit = load(x + j) * beta;
    if (prior != nullptr) logit += load_some(prior + j, count);
    if (count < lanes<T>) logit = keep_first<T>(logit, count, lowest);
    store(x + j, logit);
    top = larger(logit, top);
  });
  const T max = max_lanes<T>(top);
  T special = 0;
  if (!(max - max == 0)) {
    special = max;
    for (int64_t j = 0; j < m; ++j) special = x[j] != x[j] ? x[j] : special;
  }
  vec<T> sum{}, product{};
  for_vectors<T>(m, [&](int64_t j, int64_t) {
    const vec<T> shifted = load(x + j) - max;
    const vec<T> e = exp2_or_zero(shifted * log2e<T>);
    store(x + j, e);
    sum += e;
    if constexpr (weighted) product += e == vec<T>{} ? vec<T>{} : e * shifted;
  });
  const T total = sum_lanes<T>(sum);
  return {total, max - max == 0 ? max + std::log(total) : special, weighted ? sum_lanes<T>(product) : T(0)};
}

}  // namespace anomem::cpu::ANOMEM_ISA
