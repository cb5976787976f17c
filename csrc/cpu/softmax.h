// Between the two products of a retrieval: one row of scores becomes one row of weights, optionally shrunk.
#pragma once

#include "cpu/rows.h"
#include "cpu/simd.h"

namespace anomem::cpu::ANOMEM_ISA {

// A sum of vectors in chains: of 2^18 equal terms one chain in float32 would miss a thousandth.
template <class T>
class ChainedSum {
 public:
  ANOMEM_INLINE void add(vec<T> x) {
    chain_ += x;
    if (++length_ < kLongest) return;
    total_ += chain_;
    chain_ = vec<T>{};
    length_ = 0;
  }
  ANOMEM_INLINE T sum() const { return sum_lanes<T>(total_ + chain_); }

 private:
  static constexpr int kLongest = 64;
  vec<T> chain_{}, total_{};
  int length_ = 0;
};

// Sums of a row of exponentials.
template <class T>
struct RowSum {
  T sum;       // Σ e, e_j = exp(logit_j − largest logit)
  T lse;       // logsumexp of the logits
  T weighted;  // Σ e log e if kWeighted, with 0 · log 0 = 0: the entropy of e / Σ e is log Σ e − Σ e log e / Σ e
};

// x ← exp(beta x + prior − max) over the first m columns of a tile's row, padded to whole vectors. `prior` may be null.
// A row with a NaN or an infinity gives what the reference gives: NaN weights, and lse by logsumexp's rules.
template <bool kWeighted = false, class T>
inline RowSum<T> exponentials(T* x, int64_t m, T beta, const T* prior = nullptr) {
  constexpr T lowest = -T{INFINITY};
  if (prior != nullptr) {
    for_vectors<T>(m, [&](int64_t j, int64_t count) {
      store(x + j, multiply_add(load(x + j), broadcast(beta), load_some(prior + j, count)));
    });
    beta = 1;
  }
  // The largest score is subtracted before the factor beta. The largest logit is then exactly zero, and logits need no
  // pass of their own.
  const T sign = beta < 0 ? T{-1} : T{1};
  vec<T> top = broadcast(lowest);
  for_vectors<T>(m, [&](int64_t j, int64_t count) {
    const vec<T> score = load(x + j) * sign;
    top = larger(count < kLanes<T> ? keep_first<T>(score, count, lowest) : score, top);
  });
  const T best = sign * max_lanes<T>(top), max = best * beta;
  T special = 0;
  if (!(max - max == 0)) {
    special = max;
    for (int64_t j = 0; j < m; ++j) special = x[j] * beta != x[j] * beta ? T{NAN} : special;
  }
  vec<T> sum{};
  ChainedSum<T> product;
  for_vectors<T>(m, [&](int64_t j, int64_t count) {
    const vec<T> shifted = (load(x + j) - best) * beta;
    vec<T> e = exp_or_zero(shifted);
    if (count < kLanes<T>) e = keep_first<T>(e, count);
    store(x + j, e);
    sum += e;
    if constexpr (kWeighted) product.add(e == vec<T>{} ? vec<T>{} : e * shifted);
  });
  const T total = sum_lanes<T>(sum);
  return {total, max - max == 0 ? max + std::log(total) : special, kWeighted ? product.sum() : T{0}};
}

// Hard shrinkage of MemAE (Gong et al. 2019, Eqs. 6 to 9; anomem/reference/retrieve.py):
// w ← relu(p − t) p / (|p − t| + 1e-12), then w ← w / max(Σ w, 1e-12). Returns Σ w before the division.
template <class T>
inline T shrink_row(const T* p, int64_t m, T threshold, T* w) {
  ChainedSum<T> sum;
  for_vectors<T>(m, [&](int64_t j, int64_t count) {
    const vec<T> weight = load_some(p + j, count);
    const vec<T> excess = weight - threshold;
    const vec<T> kept = excess <= vec<T>{} ? vec<T>{} : excess * weight / (excess + T{1e-12});
    store_some(w + j, kept, count);
    sum.add(keep_first<T>(kept, count));
  });
  const T total = sum.sum();
  const vec<T> scale = broadcast(T{1} / (total < T{1e-12} ? T{1e-12} : total));
  for_vectors<T>(m, [&](int64_t j, int64_t count) { store_some(w + j, load_some(w + j, count) * scale, count); });
  return total;
}

// −Σ w log w.
template <class T>
inline T weights_entropy(const T* w, int64_t m) {
  double entropy = 0;
  for (int64_t j = 0; j < m; ++j) entropy -= w[j] == 0 ? T{0} : w[j] * std::log(w[j]);
  return static_cast<T>(entropy);
}

// Adds the entropy's gradient: g += dentropy · (−log w − 1) where w > 0.
template <class T>
inline void entropy_backward(const T* w, int64_t m, T dentropy, T* g) {
  for (int64_t j = 0; j < m; ++j)
    if (!(w[j] <= 0)) g[j] -= dentropy * (std::log(w[j]) + 1);
}

// g: the gradient of the shrunk weights w becomes that of the softmax's weights p.
template <class T>
inline void shrink_backward(const T* p, const T* w, int64_t m, T threshold, T total, T* g) {
  const T mean_gradient = total < T{1e-12} ? T{0} : dot_product(g, w, m);
  const T scale = T{1} / (total < T{1e-12} ? T{1e-12} : total);
  for_vectors<T>(m, [&](int64_t j, int64_t count) {
    const vec<T> weight = load_some(p + j, count), excess = weight - threshold, shifted = excess + T{1e-12};
    // d/dp of excess · p / (excess + ε).
    const vec<T> slope = (excess + weight * (T{1e-12} / shifted)) / shifted;
    const vec<T> inner = (load_some(g + j, count) - mean_gradient) * scale;
    store_some(g + j, excess <= vec<T>{} ? vec<T>{} : inner * slope, count);
  });
}

}  // namespace anomem::cpu::ANOMEM_ISA
