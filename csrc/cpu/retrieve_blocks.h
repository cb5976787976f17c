// Retrieval from a large memory, block after block of its prototypes. A chunk's scores of a block stay in the
// second-level cache for all that is done with them; those of all prototypes would not. The softmax is the online one
// (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867). The backward pass makes the weights from each row's
// largest score and sum, which are kept, and their mean gradient from its output (FlashAttention, Dao et al. 2022,
// https://arxiv.org/abs/2205.14135).
#pragma once

#include "cpu/factors.h"
#include "cpu/panels.h"
#include "cpu/product.h"
#include "cpu/retrieve.h"
#include "cpu/rows.h"

namespace anomem::cpu::ANOMEM_ISA {

// Prototypes of a block: its keys and sums stay in the cache beside two tiles of scores.
inline int64_t block_width(const Memory& memory) {
  return at_least(memory.features, memory.value_features) > 512 ? kLibraryPanel : 2 * kLibraryPanel;
}

// Scratch of a thread of the forward pass. Made for float32; for other types there is none.
template <class T>
class ForwardBlocks {
 public:
  ForwardBlocks(const RetrieveForward& a, const ReadPanels<T, T>& panels, int64_t rows)
      : a_(a),
        panels_(panels),
        rows_(rows),
        width_(block_width(a.memory)),
        stride_(padded_stride<T>(width_)),
        read_stride_(padded_stride<T>(a.memory.value_features)),
        scores_(rows * stride_),
        read_(rows * read_stride_),
        best_(rows),
        sum_(rows) {}

  // Writes out and lse of a chunk, and what is kept of it. False, and nothing but NaN kept, if a largest score is not
  // finite.
  bool run(int64_t first, int64_t count, const QueryRows<T>& query) {
    const int64_t m = a_.memory.prototypes, d = a_.memory.features, dv = a_.memory.value_features;
    const T beta = static_cast<T>(a_.memory.beta);
    T* const kept = first < a_.kept.rows ? static_cast<T*>(a_.kept.data) + first * (dv + 2) : nullptr;
    const int64_t kept_rows = at_most(count, a_.kept.rows - first);
    for (int64_t begin = 0; begin < m; begin += width_) {
      const int64_t width = at_most(width_, m - begin);
      product(rows_, width, d, query.data(), query.stride(), 1, panels_.keys_transposed().columns(begin, d),
              scores_.data(), stride_, false, true);
      for (int64_t r = 0; r < count; ++r)
        if (!weigh(r, width, begin == 0)) {
          for (int64_t i = 0; i < kept_rows; ++i) kept[i * (dv + 2) + dv] = T{NAN};
          return false;
        }
      product(rows_, dv, width, scores_.data(), stride_, 1, panels_.values().terms(begin, m), read_.data(),
              read_stride_, begin > 0, true);
    }
    T* const out = static_cast<T*>(a_.out) + first * dv;
    for (int64_t r = 0; r < count; ++r) {
      const T scale = 1 / sum_[r];
      scaled_copy(read_.data() + r * read_stride_, dv, scale, out + r * dv);
      static_cast<T*>(a_.lse)[first + r] = best_[r] * beta + std::log(sum_[r]);
      if (r >= kept_rows) continue;
      T* const row = kept + r * (dv + 2);
      std::memcpy(row, out + r * dv, dv * sizeof(T));
      row[dv] = best_[r];
      row[dv + 1] = scale;
    }
    return true;
  }

 private:
  // A row's scores become exp(beta (score − best)); what was summed before follows a new best. False if it is not
  // finite.
  bool weigh(int64_t r, int64_t width, bool fresh) {
    constexpr T lowest = -T{INFINITY};
    const T beta = static_cast<T>(a_.memory.beta), sign = beta < 0 ? T{-1} : T{1};
    T* const x = scores_.data() + r * stride_;
    vec<T> top = broadcast(lowest);
    for_vectors<T>(width, [&](int64_t j, int64_t count) {
      const vec<T> score = load(x + j) * sign;
      top = larger(count < kLanes<T> ? keep_first<T>(score, count, lowest) : score, top);
    });
    const T best = sign * max_lanes<T>(top);
    if (!is_finite(best)) return false;
    if (fresh) {
      best_[r] = best;
      sum_[r] = 0;
    } else if (sign * best > sign * best_[r]) {
      const T factor = std::exp((best_[r] - best) * beta);
      scale_row(read_.data() + r * read_stride_, a_.memory.value_features, factor);
      sum_[r] *= factor;
      best_[r] = best;
    }
    vec<T> sum{};
    for_vectors<T>(width, [&](int64_t j, int64_t count) {
      vec<T> e = exp_or_zero((load(x + j) - best_[r]) * beta);
      if (count < kLanes<T>) e = keep_first<T>(e, count);
      store(x + j, e);
      sum += e;
    });
    sum_[r] += sum_lanes<T>(sum);
    return true;
  }

  const RetrieveForward& a_;
  const ReadPanels<T, T>& panels_;
  int64_t rows_, width_, stride_, read_stride_;
  Buffer<T> scores_, read_, best_, sum_;
};

template <>
class ForwardBlocks<Bfloat16> {
 public:
  ForwardBlocks(const RetrieveForward&, const ReadPanels<Bfloat16, Bfloat16>&, int64_t) {}
  bool run(int64_t, int64_t, const QueryRows<Bfloat16>&) { return false; }
};

// Turns a product's scores into the softmax's weights while they are in the first-level cache.
template <class T>
struct Weights {
  T beta;
  const T *best, *scale;  // [count]
  int64_t count;          // of rows; what follows is padding

  template <class>
  ANOMEM_INLINE void operator()(int64_t i, T* to, vec<T> score) const {
    store(to, i < count ? exp_or_zero((score - best[i]) * beta) * scale[i] : vec<T>{});
  }
};

// Scratch of a thread of the backward pass.
template <class T>
class BackwardBlocks {
 public:
  BackwardBlocks(const RetrieveBackward& a, const GradientPanels<T>& panels, int64_t rows)
      : a_(a),
        panels_(panels),
        rows_(rows),
        width_(block_width(a.memory)),
        stride_(padded_stride<T>(width_)),
        key_stride_(padded_stride<T>(a.memory.features)),
        query_(rows, a.memory.features, a.memory.normalize),
        dout_(rows * a.memory.value_features),
        query_columns_(rows * a.memory.features),
        dout_columns_(rows * a.memory.value_features),
        weights_(rows * stride_),
        gradient_(rows * stride_),
        dquery_(rows * key_stride_),
        best_(rows),
        scale_(rows),
        mean_(rows) {}

  // Writes dquery of a chunk and adds to the sums of dkeys [d, padded M] and dvalues [dv, padded M], or begins them.
  // False, and nothing done, for a chunk that was not read in blocks or of which not everything is kept.
  bool run(int64_t first, int64_t count, bool fresh, T* dkeys, T* dvalues) {
    const int64_t m = a_.memory.prototypes, d = a_.memory.features, dv = a_.memory.value_features;
    if (first + count > a_.kept.rows) return false;
    const T* const kept = static_cast<const T*>(a_.kept.data) + first * (dv + 2);
    const T* const dlse = static_cast<const T*>(a_.dlse.data);
    const T* const upstream = static_cast<const T*>(a_.dout) + first * dv;
    const T beta = static_cast<T>(a_.memory.beta);
    for (int64_t r = 0; r < count; ++r) {
      const T* const row = kept + r * (dv + 2);
      best_[r] = row[dv];
      scale_[r] = row[dv + 1];
      if (!is_finite(best_[r])) return false;
      mean_[r] = dot_product(row, upstream + r * dv, dv);
    }
    query_.load(static_cast<const T*>(a_.query.data) + first * a_.query.stride, a_.query.stride, count);
    const T* dout = upstream;
    if (count < rows_) {
      std::memcpy(dout_.data(), upstream, count * dv * sizeof(T));
      std::memset(dout_.data() + count * dv, 0, (rows_ - count) * dv * sizeof(T));
      dout = dout_.data();
    }
    transpose_scaled(upstream, dv, count, dv, rows_, dout_columns_.data(), rows_, Unscaled());
    transpose_scaled(query_.data(), query_.stride(), count, d, rows_, query_columns_.data(), rows_,
                     [&](int64_t, vec<T> x) ANOMEM_ALWAYS { return x * beta; });
    const Weights<T> weigh{beta, best_.data(), scale_.data(), count};
    const int64_t sum_stride = padded_stride<T>(m);
    for (int64_t begin = 0; begin < m; begin += width_) {
      const int64_t width = at_most(width_, m - begin);
      product_with(rows_, width, d, query_.data(), query_.stride(), 1, panels_.keys_transposed().columns(begin, d),
                   weights_.data(), stride_, weigh, true);
      product(rows_, width, dv, dout, dv, 1, panels_.values_transposed().columns(begin, dv), gradient_.data(), stride_,
              false, true);
      for (int64_t r = 0; r < count; ++r) differentiate(r, width, a_.dlse.given ? dlse[first + r] : T{0});
      std::memset(gradient_.data() + count * stride_, 0, (rows_ - count) * stride_ * sizeof(T));
      product(rows_, d, width, gradient_.data(), stride_, 1, panels_.keys().terms(begin, m), dquery_.data(),
              key_stride_, begin > 0, true);
      library_product_of_tile<T>(dv, width, rows_, dout_columns_.data(), weights_.data(), stride_, dvalues + begin,
                                 sum_stride, !fresh);
      library_product_of_tile<T>(d, width, rows_, query_columns_.data(), gradient_.data(), stride_, dkeys + begin,
                                 sum_stride, !fresh || a_.memory.tied());
    }
    for (int64_t r = 0; r < count; ++r)
      normalize_row_backward(dquery_.data() + r * key_stride_, query_[r], query_.factor(r), beta, d,
                             a_.memory.normalize, static_cast<T*>(a_.dquery) + (first + r) * d);
    return true;
  }

 private:
  // A row of dP = dO Vᵀ becomes dS (without beta). A weight of exactly 1 has no other beside it: its gradient is zero,
  // which the mean from the output would miss by a rounding.
  void differentiate(int64_t r, int64_t width, T dlse) {
    const T* const p = weights_.data() + r * stride_;
    T* const g = gradient_.data() + r * stride_;
    const vec<T> mean = broadcast(mean_[r]), one = broadcast(T{1});
    for_vectors<T>(width, [&](int64_t j, int64_t) {
      const vec<T> weight = load(p + j), difference = load(g + j) - mean;
      store(g + j, weight * ((weight == one ? vec<T>{} : difference) + dlse));
    });
  }

  const RetrieveBackward& a_;
  const GradientPanels<T>& panels_;
  int64_t rows_, width_, stride_, key_stride_;
  QueryRows<T> query_;
  Buffer<T> dout_, query_columns_, dout_columns_, weights_, gradient_, dquery_, best_, scale_, mean_;
};

template <>
class BackwardBlocks<Bfloat16> {
 public:
  BackwardBlocks(const RetrieveBackward&, const GradientPanels<Bfloat16>&, int64_t) {}
  bool run(int64_t, int64_t, bool, float*, float*) { return false; }
};

}  // namespace anomem::cpu::ANOMEM_ISA
