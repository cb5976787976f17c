// Retrieval from a large memory, block after block of its prototypes. A chunk's scores of a block stay in the
// second-level cache for all that is done with them; those of all prototypes would not. The softmax is the online one
// (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867). The backward pass makes the weights from each row's
// largest score and sum, which are kept. Their mean gradient comes from the kept output (FlashAttention, Dao et al.
// 2022, https://arxiv.org/abs/2205.14135). A first pass over the blocks sums it where that would lose digits, as where
// values have much in common.
#pragma once

#include "cpu/factors.h"
#include "cpu/panels.h"
#include "cpu/product.h"
#include "cpu/raw_scores.h"
#include "cpu/retrieve.h"
#include "cpu/retrieve_sums.h"
#include "cpu/rows.h"

namespace anomem::cpu::ANOMEM_ISA {

// Prototypes of a block: its keys and sums stay in the cache beside two tiles of scores.
inline int64_t block_width(const Memory& memory) {
  return at_least(memory.features, memory.value_features) > 512 ? kLibraryPanel : 2 * kLibraryPanel;
}

// What is kept of a query, T [kept_in_blocks]: the largest score, 1 / Σ exp(logit − largest logit), and the output
// where there is room for it.
constexpr int64_t kKeptBeforeOutput = 2;

// Scratch of a thread of the forward pass.
template <class S>
class ForwardBlocks {
 public:
  using T = accumulator_t<S>;

  ForwardBlocks(const RetrieveForward& a, const ReadPanels<S, S>& panels, int64_t rows)
      : a_(a),
        panels_(panels),
        rows_(rows),
        width_(block_width(a.memory)),
        stride_(padded_stride<T>(width_)),
        read_stride_(padded_stride<T>(a.memory.value_features)),
        query_parts_(rows, a.memory.features),
        scores_(rows * stride_),
        read_(rows * read_stride_),
        best_(rows),
        sum_(rows) {}

  // Writes out and lse of a chunk, and what is kept of it. False, and nothing but NaN kept, if a largest score is not
  // finite. `raw` holds the same rows if `is_raw`.
  bool run(int64_t first, int64_t count, const QueryRows<S>& query, const RawQueries<S>& raw, bool is_raw) {
    const int64_t m = a_.memory.prototypes, d = a_.memory.features, dv = a_.memory.value_features;
    const int64_t kept_width = kept_in_blocks(a_.type, dv, a_.query.count),
                  kept_rows = at_most(count, a_.kept.rows - first);
    T* const kept = static_cast<T*>(a_.kept.data) + first * kept_width;
    if (!is_raw) query_parts_.make(query.data(), query.stride(), rows_, d);
    for (int64_t begin = 0; begin < m; begin += width_) {
      const int64_t width = at_most(width_, m - begin);
      if (is_raw) raw.scores(count, begin, width, query, scores_.data(), stride_);
      else
        product(rows_, width, d, query.data(), query.stride(), 1, panels_.keys_transposed().columns(begin, d),
                scores_.data(), stride_, false, true, query_parts_.data());
      for (int64_t r = 0; r < count; ++r)
        if (!weigh(r, width, begin == 0)) {
          for (int64_t i = 0; i < kept_rows; ++i) kept[i * kept_width] = T{NAN};
          return false;
        }
      const LeftFactor<S> weights = in_rows<S>(scores_.data(), count, width, stride_);
      product(rows_, dv, factors<S>(width), weights.data, weights.row_stride, weights.term_stride,
              panels_.values().terms(factors<S>(begin), factors<S>(m)), read_.data(), read_stride_, begin > 0, true);
    }
    const T beta = static_cast<T>(a_.memory.beta);
    S* const out = static_cast<S*>(a_.out) + first * dv;
    for (int64_t r = 0; r < count; ++r) {
      const T scale = 1 / sum_[r];
      scaled_copy(read_.data() + r * read_stride_, dv, scale, out + r * dv);
      static_cast<T*>(a_.lse)[first + r] = best_[r] * beta + std::log(sum_[r]);
      if (r >= kept_rows) continue;
      T* const row = kept + r * kept_width;
      row[0] = best_[r];
      row[1] = scale;
      if (kept_width > kKeptBeforeOutput)
        scaled_copy(read_.data() + r * read_stride_, dv, scale, row + kKeptBeforeOutput);
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
  const ReadPanels<S, S>& panels_;
  int64_t rows_, width_, stride_, read_stride_;
  LeftParts<T> query_parts_;  // [rows, d]
  Buffer<T> scores_;          // [rows, a block's prototypes]
  Buffer<T> read_;            // [rows, dv]
  Buffer<T> best_, sum_;      // [rows]
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
template <class S>
class BackwardBlocks {
 public:
  using T = accumulator_t<S>;

  BackwardBlocks(const RetrieveBackward& a, const GradientPanels<S>& panels, const RawKeys<S>& raw_keys, int64_t rows)
      : a_(a),
        panels_(panels),
        rows_(rows),
        width_(block_width(a.memory)),
        stride_(padded_stride<T>(width_)),
        key_stride_(padded_stride<T>(a.memory.features)),
        query_(rows, a.memory.features, a.memory.normalize),
        raw_(rows, a.memory.features, raw_keys, a.memory.normalize),
        dout_(rows, a.memory.value_features),
        scaled_query_(rows, a.memory.features),
        column_memory_(rows * (a.memory.value_features + a.memory.features)),
        columns_(column_memory_.data(), a.memory, rows),
        query_parts_(rows, a.memory.features),
        dout_parts_(rows, factors<S>(a.memory.value_features)),
        dout_column_parts_(a.memory.tied() ? 0 : a.memory.value_features, rows),
        query_column_parts_(a.memory.features, columns_.stride),
        tiles_(2 * rows * stride_),
        weights_(tiles_.data()),
        gradient_(weights_ + rows * stride_),
        neighbours_(rows * stride_),
        dquery_(rows * key_stride_),
        best_(rows),
        scale_(rows),
        mean_(rows) {}

  // Writes dquery of a chunk and adds to the sums of dkeys [d, padded M] and dvalues [dv, padded M], or begins them.
  // False, and nothing done, for a chunk that was not read in blocks or of which not everything is kept.
  bool run(int64_t first, int64_t count, bool fresh, T* dkeys, T* dvalues) {
    const int64_t m = a_.memory.prototypes, d = a_.memory.features, dv = a_.memory.value_features;
    const int64_t kept_width = kept_in_blocks(a_.type, dv, a_.query.count);
    if (first + count > a_.kept.rows) return false;
    const T* const kept = static_cast<const T*>(a_.kept.data) + first * kept_width;
    for (int64_t r = 0; r < count; ++r) {
      best_[r] = kept[r * kept_width];
      scale_[r] = kept[r * kept_width + 1];
      if (!is_finite(best_[r])) return false;
    }
    load(first, count);
    bool multiplied = false;  // the first block
    if (kept_width > kKeptBeforeOutput)
      multiplied = take_means(kept + kKeptBeforeOutput, kept_width, static_cast<const S*>(a_.dout) + first * dv, count);
    if (!multiplied) sum_means(count);
    const T* const dlse = static_cast<const T*>(a_.dlse.data);
    for (int64_t begin = 0; begin < m; begin += width_) {
      const int64_t width = at_most(width_, m - begin);
      if (begin > 0 || !multiplied) multiply(begin, width, count);
      for (int64_t r = 0; r < count; ++r) differentiate(r, width, a_.dlse.given ? dlse[first + r] : T{0});
      const LeftFactor<S> across = in_rows<S>(gradient_, count, width, stride_, neighbours_.data());
      product(rows_, d, factors<S>(width), across.data, across.row_stride, across.term_stride,
              panels_.keys().terms(factors<S>(begin), factors<S>(m)), dquery_.data(), key_stride_, begin > 0, true);
      add_to_memory<S>(a_.memory, rows_, width, columns_, columns_of(weights_, count, width),
                       columns_of(gradient_, count, width), fresh, dkeys + begin, dvalues + begin,
                       {dout_column_parts_.data(), query_column_parts_.data()});
    }
    for (int64_t r = 0; r < count; ++r) {
      T* const row = dquery_.data() + r * key_stride_;
      // As in BackwardChunk: the packed keys lack their mean.
      if (kInPairs<S> && a_.dlse.given) add_scaled(panels_.keys_mean(), d, dlse[first + r], row);
      normalize_row_backward(row, query_[r], query_.factor(r), static_cast<T>(a_.memory.beta), d, a_.memory.normalize,
                             static_cast<S*>(a_.dquery) + (first + r) * d);
    }
    return true;
  }

 private:
  void load(int64_t first, int64_t count) {
    const int64_t dv = a_.memory.value_features;
    const S* const source = static_cast<const S*>(a_.query.data) + first * a_.query.stride;
    query_.load(source, a_.query.stride, count);
    is_raw_ = raw_.take(source, a_.query.stride, count, query_);
    for (int64_t r = 0; r < count; ++r) {
      dout_.set(r, static_cast<const S*>(a_.dout) + (first + r) * dv, T{1});
      scaled_query_.set(r, query_[r], static_cast<T>(a_.memory.beta));
    }
    dout_.clear(count, rows_);
    dout_.transpose(count, rows_, columns_.dout, columns_.stride);
    scaled_query_.transpose(count, rows_, columns_.query, columns_.stride);
    const int64_t d = a_.memory.features;
    if (!is_raw_) query_parts_.make(query_.data(), query_.stride(), rows_, d);
    dout_parts_.make(dout_.data(), dout_.stride(), rows_, factors<S>(dv));
    const bool tied = a_.memory.tied();
    const auto as_factors = [](const auto* x) { return reinterpret_cast<const factor_t<S>*>(x); };
    if (!tied) dout_column_parts_.make(as_factors(columns_.dout), columns_.stride, dv, rows_);
    query_column_parts_.make(as_factors(tied ? columns_.dout : columns_.query), columns_.stride, d, columns_.stride);
  }

  // The weights of a block, and dP = dO Vᵀ.
  void multiply(int64_t begin, int64_t width, int64_t count) {
    const int64_t d = a_.memory.features, dv = a_.memory.value_features;
    const Weights<T> weigh{static_cast<T>(a_.memory.beta), best_.data(), scale_.data(), count};
    if (is_raw_) {
      raw_.scores(count, begin, width, query_, weights_, stride_);
      for (int64_t r = 0; r < count; ++r)
        for_vectors<T>(width, [&](int64_t j, int64_t) {
          T* const at = weights_ + r * stride_ + j;
          weigh.template operator()<T>(r, at, ANOMEM_ISA::load(at));
        });
    } else {
      product_with(rows_, width, d, query_.data(), query_.stride(), 1, panels_.keys_transposed().columns(begin, d),
                   weights_, stride_, weigh, true, query_parts_.data());
    }
    product(rows_, width, factors<S>(dv), dout_.data(), dout_.stride(), 1,
            panels_.values_transposed().columns(begin, factors<S>(dv)), gradient_, stride_, false, true,
            dout_parts_.data());
  }

  // Mean gradients from the output, and the first block's products. False where they would lose digits: the terms of a
  // mean are larger than what is left when it is subtracted. Pairs lack the values' mean. They are rounded, unlike the
  // output: only in a sum of their own products does the rounding of a weight near 1 cancel, or of equal values that
  // have most of the weight. What is left is then weighed, and the first block must have a quarter of its share of the
  // weight.
  bool take_means(const T* out, int64_t out_stride, const S* dout, int64_t count) {
    const int64_t dv = a_.memory.value_features, width = at_most(width_, a_.memory.prototypes);
    multiply(0, width, count);
    for (int64_t r = 0; r < count; ++r) {
      if (kInPairs<S> && scale_[r] > T{0.5}) return false;  // the largest weight
      vec<T> size{}, left{}, weight{};
      vec<T> sum{};
      for_vectors<T>(dv, [&](int64_t i, int64_t some) {
        const vec<T> read = load_some(out + r * out_stride + i, some), slope = load_some(dout + r * dv + i, some);
        const vec<T> term = read * slope;
        size += term < 0 ? -term : term;
        if constexpr (kInPairs<S>) sum += (read - load_some(panels_.values_mean() + i, some)) * slope;
        else sum += term;
      });
      mean_[r] = sum_lanes<T>(sum);
      const vec<T> mean = broadcast(mean_[r]);
      for_vectors<T>(width, [&](int64_t j, int64_t some) {
        const vec<T> difference = keep_first<T>(ANOMEM_ISA::load(gradient_ + r * stride_ + j) - mean, some);
        const vec<T> distance = difference < 0 ? -difference : difference;
        if constexpr (kInPairs<S>) {
          const vec<T> p = keep_first<T>(ANOMEM_ISA::load(weights_ + r * stride_ + j), some);
          left = multiply_add(p, distance, left);
          weight += p;
        } else {
          left = larger(distance, left);
        }
      });
      const T share = sum_lanes<T>(weight);
      if (kInPairs<S> && !(4 * share * static_cast<T>(a_.memory.prototypes) >= static_cast<T>(width))) return false;
      const T rest = kInPairs<S> ? sum_lanes<T>(left) / share : max_lanes<T>(left);
      if (!(sum_lanes<T>(size) <= 4 * rest)) return false;
    }
    return true;
  }

  // Mean gradients by a pass over the blocks.
  void sum_means(int64_t count) {
    for (int64_t r = 0; r < count; ++r) mean_[r] = 0;
    for (int64_t begin = 0; begin < a_.memory.prototypes; begin += width_) {
      const int64_t width = at_most(width_, a_.memory.prototypes - begin);
      multiply(begin, width, count);
      for (int64_t r = 0; r < count; ++r)
        mean_[r] += dot_product(weights_ + r * stride_, gradient_ + r * stride_, width);
    }
  }

  // A row of dP becomes dS (without beta). A weight of exactly 1 has no other beside it: its gradient is zero, which a
  // mean from the output would miss by a rounding.
  void differentiate(int64_t r, int64_t width, T dlse) {
    const T* const p = weights_ + r * stride_;
    T* const g = gradient_ + r * stride_;
    const vec<T> mean = broadcast(mean_[r]), one = broadcast(T{1});
    for_vectors<T>(width, [&](int64_t j, int64_t count) {
      const vec<T> weight = ANOMEM_ISA::load(p + j), difference = ANOMEM_ISA::load(g + j) - mean;
      const vec<T> slope = weight * ((weight == one ? vec<T>{} : difference) + dlse);
      // What follows the last column may be infinite, and would be the other half of its pair.
      store(g + j, count < kLanes<T> ? keep_first<T>(slope, count) : slope);
    });
  }

  // A tile as a factor that is summed over its rows. It is overwritten.
  LeftFactor<S> columns_of(T* tile, int64_t count, int64_t width) const {
    std::memset(tile + count * stride_, 0, (rows_ - count) * stride_ * sizeof(T));
    return in_columns<S>(tile, rows_, width, stride_);
  }

  const RetrieveBackward& a_;
  const GradientPanels<S>& panels_;
  int64_t rows_, width_, stride_, key_stride_;
  QueryRows<S> query_;
  RawQueries<S> raw_;
  FactorRows<S> dout_, scaled_query_;
  Buffer<typename ChunkColumns<S>::Element> column_memory_;
  ChunkColumns<S> columns_;
  LeftParts<T> query_parts_;                                       // [rows, d]
  LeftParts<factor_t<S>> dout_parts_;                              // [rows, dv]
  LeftParts<factor_t<S>> dout_column_parts_, query_column_parts_;  // [dv, rows], [d, rows]; tied: none, [d, 2 · rows]
  Buffer<T> tiles_;
  T *weights_, *gradient_;  // [rows, a block's prototypes], beside each other
  Buffer<factor_t<S>> neighbours_;
  Buffer<T> dquery_, best_, scale_, mean_;
  bool is_raw_ = false;
};

}  // namespace anomem::cpu::ANOMEM_ISA
