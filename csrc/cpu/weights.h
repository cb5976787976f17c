// From the softmax's weights to those that read the values: none, or MemAE's hard shrinkage with its entropy
// (Gong et al. 2019, Eqs. 6 to 9; anomem/reference/retrieval.py), and the way back.
#pragma once

#include "cpu/rows.h"
#include "cpu/simd.h"
#include "cpu/softmax.h"

namespace anomem::cpu::ANOMEM_ISA {

// w ← relu(p − t) p / (|p − t| + 1e-12), then w ← w / max(Σ w, 1e-12). Returns Σ w before the division.
template <class T>
inline T shrink_row(const T* p, int64_t m, T threshold, T* w) {
  vec<T> sum{};
  for_vectors<T>(m, [&](int64_t j, int64_t count) {
    const vec<T> weight = load_some(p + j, count);
    const vec<T> excess = weight - threshold;
    const vec<T> kept = excess <= vec<T>{} ? vec<T>{} : excess * weight / (excess + T(1e-12));
    store_some(w + j, kept, count);
    sum += keep_first<T>(kept, count);
  });
  const T total = sum_lanes<T>(sum);
  const vec<T> scale = broadcast(T(1) / (total < T(1e-12) ? T(1e-12) : total));
  for_vectors<T>(m, [&](int64_t j, int64_t count) { store_some(w + j, load_some(w + j, count) * scale, count); });
  return total;
}

// −Σ w log w of the weights themselves.
template <class T>
inline T weights_entropy(const T* w, int64_t m) {
  T entropy = 0;
  for (int64_t j = 0; j < m; ++j) entropy -= w[j] == 0 ? T(0) : w[j] * std::log(w[j]);
  return entropy;
}

// g += dentropy · (−log w − 1) where w > 0: the entropy's gradient to the weights.
template <class T>
inline void entropy_backward(const T* w, int64_t m, T dentropy, T* g) {
  for (int64_t j = 0; j < m; ++j)
    if (!(w[j] <= 0)) g[j] -= dentropy * (std::log(w[j]) + 1);
}

// g, the gradient to the shrunk weights w, becomes that to the softmax's weights p.
template <class T>
inline void shrink_backward(const T* p, const T* w, int64_t m, T threshold, T total, T* g) {
  const T along = total < T(1e-12) ? T(0) : dot_product(g, w, m);
  const T scale = T(1) / (total < T(1e-12) ? T(1e-12) : total);
  for_vectors<T>(m, [&](int64_t j, int64_t count) {
    const vec<T> weight = load_some(p + j, count), excess = weight - threshold, shifted = excess + T(1e-12);
    // d/dp of excess · p / (excess + ε).
    const vec<T> slope = (excess + weight * (T(1e-12) / shifted)) / shifted;
    const vec<T> inner = (load_some(g + j, count) - along) * scale;
    store_some(g + j, excess <= vec<T>{} ? vec<T>{} : inner * slope, count);
  });
}

}  // namespace anomem::cpu::ANOMEM_ISA
