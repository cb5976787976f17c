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

// The mean that a normalisation subtracts from a row.
template <class S>
inline accumulator_t<S> subtracted_mean(const S* row, int64_t d, Normalize how) {
  return how == Normalize::kLayer ? row_mean(row, d) : accumulator_t<S>{0};
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
    Buffer<int64_t> keeps((m_ + kPrototypes - 1) / kPrototypes);
    const auto pack_block = [&](int64_t first, int64_t count, PackedBlock<S>& block) {
      const S* const keys = static_cast<const S*>(memory.keys) + first * d_;
      int64_t& keeps_block = keeps[first / kPrototypes];
      keeps_block = 1;
      for (int64_t j = 0; j < count; ++j) {
        const T factor = normalize_row(keys + j * d_, d_, memory.normalize, block.wide.data());
        const T mean = subtracted_mean(keys + j * d_, d_, memory.normalize);
        if (!keeps_digits(mean, factor)) keeps_block = 0;
        factor_[first + j] = factor;
        mean_[first + j] = static_cast<T>(d_) * mean * factor;
        block.rows.set(j, keys + j * d_, T{1});
      }
      block.rows.pack_columns(count, packed_.data() + first * factors<S>(d_), 0, kLibraryPanel);
    };
    for_blocks<PackedBlock<S>>(m_, pack_block, d_);
    for (int64_t j = m_; j < padded_stride<T>(m_); ++j) factor_[j] = mean_[j] = 0;
    for (int64_t first = 0; first < m_; first += kPrototypes) usable_ = usable_ && keeps[first / kPrototypes];
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

  RawQueries(int64_t rows, int64_t d, const RawKeys<S>& keys, Normalize how)
      : rows_(rows), d_(d), keys_(keys), how_(how), data_(keys.usable() ? rows : 0, d), mean_(rows) {}

  // Whether the scores of these rows can be made so; `normalized` holds the same rows.
  bool take(const S* query, int64_t stride, int64_t count, const QueryRows<S>& normalized) {
    if (!keys_.usable()) return false;
    for (int64_t r = 0; r < rows_; ++r) {
      const S* row = query + (r < count ? r : 0) * stride;
      data_.set(r, row, T{1});
      mean_[r] = subtracted_mean(row, d_, how_);
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
  Normalize how_;
  FactorRows<S> data_;
  Buffer<T> mean_;
};

// Whether the scores of every query are made so: no chunk reads normalised keys then. Of many queries it is not asked:
// they would be read once more, and packing keys takes little of their time.
template <class S>
inline bool all_are_raw(const RawKeys<S>& keys, const Queries& queries, const Memory& memory) {
  using T = accumulator_t<S>;
  if (!keys.usable() || queries.count > 4 * memory.prototypes) return false;
  if (memory.normalize == Normalize::kNone) return true;
  constexpr int64_t some = 64;
  const int64_t blocks = (queries.count + some - 1) / some, d = memory.features;
  Buffer<int64_t> keep(blocks);
  parallel_ranges(blocks, [&](int64_t begin, int64_t end) {
    Buffer<T> normalized(d);
    for (int64_t block = begin; block < end; ++block) {
      keep[block] = 1;
      for (int64_t i = block * some; i < queries.count && i < (block + 1) * some; ++i) {
        const S* const row = static_cast<const S*>(queries.data) + i * queries.stride;
        const T factor = normalize_row(row, d, memory.normalize, normalized.data());
        if (!keeps_digits(subtracted_mean(row, d, memory.normalize), factor)) keep[block] = 0;
      }
    }
  });
  for (int64_t block = 0; block < blocks; ++block)
    if (!keep[block]) return false;
  return true;
}

}  // namespace anomem::cpu::ANOMEM_ISA
