// Scores of bfloat16 rows by products of the rows as they are, which are exact in a float32 sum:
// norm(q)·norm(k) = f_q f_k (q·k − d mean(q) mean(k)). Rounding normalised rows to bfloat16 would shift logits by 2^-9.
#pragma once

#include "cpu/panels.h"
#include "cpu/product.h"

namespace anomem::cpu::ANOMEM_ISA {

// The difference q·k − d mean(q) mean(k) keeps its digits where no mean is much larger than the spread around it. q·k
// stays within the range of float32 where rows are shorter than about 1e12 sqrt(5 d).
template <class T>
ANOMEM_INLINE bool keeps_digits(T mean, T factor) {
  const bool short_enough = factor == 0 || factor >= T{1e-12};
  return is_finite(factor) && short_enough && mean * mean * factor * factor <= T{4};
}

template <class S>
inline accumulator_t<S> row_mean(const S* x, int64_t d) {
  using T = accumulator_t<S>;
  vec<T> sum{};
  for_vectors<T>(d, [&](int64_t i, int64_t count) { sum += load_some(x + i, count); });
  return sum_lanes<T>(sum) / static_cast<T>(d);
}

// A memory's keys as they are, in panels of the library's products.
template <class S>
class RawKeys {
 public:
  using T = accumulator_t<S>;

  RawKeys(const Memory& memory, bool wanted)
      : m_(memory.prototypes),
        d_(memory.features),
        usable_(kInPairs<S> && wanted),
        packed_(usable_ ? packed_size<T>(factors<S>(d_), m_) : 0),
        factor_(usable_ ? padded_stride<T>(m_) : 0),
        mean_(usable_ ? padded_stride<T>(m_) : 0) {
    if (!usable_) return;
    const S* keys = static_cast<const S*>(memory.keys);
    const bool layer = memory.normalize == Normalize::kLayer;
    Buffer<T> normalized(d_);
    FactorRows<S> rows(m_, d_);
    for (int64_t j = 0; j < m_ && usable_; ++j) {
      const T factor = normalize_row(keys + j * d_, d_, memory.normalize, normalized.data());
      const T mean = layer ? row_mean(keys + j * d_, d_) : T{0};
      usable_ = keeps_digits(mean, factor);
      factor_[j] = factor;
      mean_[j] = static_cast<T>(d_) * mean * factor;
      rows.set(j, keys + j * d_, T{1});
    }
    for (int64_t j = m_; j < padded_stride<T>(m_); ++j) factor_[j] = mean_[j] = 0;
    if (usable_) rows.pack_columns(m_, packed_.data(), 0, kLibraryPanel);
  }

  bool usable() const { return usable_; }
  const factor_t<S>* packed() const { return packed_.data(); }  // d × M
  const T* factor() const { return factor_.data(); }            // [M]
  const T* mean() const { return mean_.data(); }                // [M], times d and the factor

 private:
  int64_t m_, d_;
  bool usable_;
  Buffer<factor_t<S>> packed_;
  Buffer<T> factor_, mean_;
};

// A chunk of queries as they are.
template <class S>
class RawQueries {
 public:
  using T = accumulator_t<S>;

  RawQueries(int64_t rows, int64_t d, const RawKeys<S>& keys, bool layer)
      : rows_(rows), d_(d), keys_(keys), layer_(layer), data_(keys.usable() ? rows : 0, d), mean_(rows) {}

  // Whether the scores of these rows can be made so; `normalized` holds the same rows.
  bool take(const S* query, int64_t stride, int64_t count, const QueryRows<S>& normalized) {
    if (!keys_.usable()) return false;
    for (int64_t r = 0; r < rows_; ++r) {
      const S* row = query + (r < count ? r : 0) * stride;
      data_.set(r, row, T{1});
      mean_[r] = layer_ ? row_mean(row, d_) : T{0};
      if (r < count && !keeps_digits(mean_[r], normalized.factor(r))) return false;
    }
    return true;
  }

  // The scores of the first `count` rows and of `m` keys from `first` on, a multiple of kLibraryPanel, to [rows,
  // stride].
  __attribute__((noinline)) void scores(int64_t count, int64_t first, int64_t m, const QueryRows<S>& normalized, T* to,
                                        int64_t stride) const {
    const RightFactor<factor_t<S>> keys(keys_.packed());
    product(rows_, m, factors<S>(d_), data_.data(), data_.stride(), 1, keys.columns(first, factors<S>(d_)), to, stride,
            false, true);
    const T *const key_factor = keys_.factor() + first, *const key_mean = keys_.mean() + first;
    for (int64_t r = 0; r < count; ++r) {
      const vec<T> factor = broadcast(normalized.factor(r)), mean = broadcast(mean_[r]);
      T* row = to + r * stride;
      for_vectors<T>(m, [&](int64_t j, int64_t) {
        store(row + j, factor * (load(row + j) * load(key_factor + j) - mean * load(key_mean + j)));
      });
    }
  }

 private:
  int64_t rows_, d_;
  const RawKeys<S>& keys_;
  bool layer_;
  FactorRows<S> data_;
  Buffer<T> mean_;
};

}  // namespace anomem::cpu::ANOMEM_ISA
