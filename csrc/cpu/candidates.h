// The k largest of the scores s_j = scale · x·m_j + offset_j, exactly, from a product that need not be exact.
//
// Where the processor multiplies pairs of bfloat16, the product is of rounded rows x' and m'. By Cauchy and Schwarz
//
//   |x·m − x'·m'| ≤ |x − x'| |m| + |x'| |m − m'|,
//
// and these lengths are measured, not estimated. A column whose rough score lies more than twice this bound below the
// k-th largest rough score cannot be among the k largest. The others, k and a few, are computed again from the rows
// themselves. Elsewhere the product is of the rows themselves and the bound that of its rounding.
//
// Whole numbers of 8 bits (quads.h) come first, with the same bound: their product is twice as fast. Where they leave
// so many candidates that computing those takes longer than was saved, the search goes on in pairs of bfloat16.
//
// The k-th largest is bounded from below by the largest scores of kGroups disjoint groups of columns: the k-th largest
// of those. No matrix of all scores is kept: a tile of kCandidateRows × kCandidateColumns passes through the cache.
#pragma once

#include <algorithm>
#include <mutex>
#include <optional>
#include <tuple>

#include "cpu/panels.h"
#include "cpu/product.h"
#include "cpu/quads.h"
#include "cpu/selection.h"

namespace anomem::cpu::ANOMEM_ISA {

constexpr int64_t kCandidateRows = 42, kCandidateColumns = 1024;

// Room for the columns that `collect` finds.
template <class T>
constexpr int64_t kMostFound = kCandidateColumns + kLanes<T>;

// What the product of candidates multiplies.
#if ANOMEM_BFLOAT16_PAIRS
template <class T>
using Rough = Bfloat16;
#else
template <class T>
using Rough = T;
#endif

// Of a product's sums of float32 (float64) factors, in units of |x| |m|.
template <class T>
constexpr T kSlack = sizeof(T) == 4 ? T{3e-5} : T{6e-14};

// |x − x'|.
template <class T>
inline T rounding_length(const T* x, int64_t d) {
  if constexpr (!kInPairs<Rough<T>>) {
    return 0;
  } else {
    vec<T> squares{};
    for_vectors<T>(d, [&](int64_t p, int64_t count) {
      Bfloat16 rounded[kLanes<T>];
      const vec<T> exact = load_some(x + p, count);
      store(rounded, exact);
      const vec<T> lost = exact - load(rounded);
      squares = multiply_add(lost, lost, squares);
    });
    return length_at_most(sum_lanes<T>(squares), d);
  }
}

#if ANOMEM_BFLOAT16_PAIRS
constexpr bool kQuads = true;
#else
constexpr bool kQuads = false;
struct QuadPanels {};
struct QuadRows {};
#endif

// (|x − m|² − |x − b|²) / 2 = (m − b)·((m + b)/2 − x) of x, m and b [d], in double. It keeps its digits where m and b
// are close to each other, and where x is so far from both that their distances round to one number.
template <class T>
inline double beyond(const T* x, const T* m, const T* b, int64_t d) {
  constexpr int64_t lanes = kLanes<double>;
  vec<double> sums{};
  int64_t p = 0;
  for (; p + lanes <= d; p += lanes) {
    const vec<double> of_m = load_double(m + p), of_b = load_double(b + p);
    sums = multiply_add(of_m - of_b, of_m * 0.5 + of_b * 0.5 - load_double(x + p), sums);
  }
  double sum = sum_lanes<double>(sums);
  for (; p < d; ++p) {
    const double of_m = m[p], of_b = b[p];
    sum += (of_m - of_b) * (of_m * 0.5 + of_b * 0.5 - x[p]);
  }
  return sum;
}

// The prototypes of a bank: normalised rows, the packed factors of their rough products, and the lengths of the bounds.
template <class S>
class CandidatePanels {
 public:
  using T = accumulator_t<S>;
  using R = Rough<T>;

  CandidatePanels(const S* prototypes, int64_t stride, int64_t count, int64_t d, Normalize how)
      : count_(count), d_(d), rows_(count * d) {
    for (int64_t j = 0; j < count; ++j) {
      T* row = rows_.data() + j * d;
      normalize_row(prototypes + j * stride, d, how, row);
      longest_ = larger_or_nan(longest_, length_at_most(dot_product(row, row, d), d));
    }
#if ANOMEM_BFLOAT16_PAIRS
    quads_.emplace(rows_.data(), count, d);
#endif
  }

  int64_t count() const { return count_; }
  int64_t features() const { return d_; }
  const T* operator[](int64_t j) const { return rows_.data() + j * d_; }
  T longest() const { return longest_; }
  const QuadPanels& quads() const { return *quads_; }

  // The factor R of the rough product, packed at its first use by any thread.
  struct Packed {
    Packed(const T* rows, int64_t count, int64_t d) : d(d), data(packed_size<T>(factors<R>(d), count)) {
      FactorRows<R> rough(count, d);
      for (int64_t j = 0; j < count; ++j) {
        const T* row = rows + j * d;
        rough.set(j, row, T{1});
        most_lost = larger_or_nan(most_lost, rounding_length(row, d));
      }
      rough.pack_columns(count, data.data());
    }

    // Of the panels from a column on, a multiple of a panel's width.
    const factor_t<R>* from(int64_t column) const { return data.data() + column * factors<R>(d); }

    int64_t d;
    Buffer<factor_t<R>> data;
    T most_lost = 0;
  };
  const Packed& packed() const {
    std::call_once(packing_, [&] { packed_.emplace(rows_.data(), count_, d_); });
    return *packed_;
  }

  // Bound of |x·m − its product of R| for a row x of this length that lost so much.
  T bound(T length, T lost) const {
    return lost * longest_ + (length + lost) * packed().most_lost + kSlack<T> * length * longest_;
  }

 private:
  int64_t count_, d_;
  Buffer<T> rows_;
  T longest_ = 0;
  std::optional<QuadPanels> quads_;
  mutable std::once_flag packing_;
  mutable std::optional<Packed> packed_;
};

// What is added to scale · x·m in the score of each column, −inf behind the last.
template <class T>
class Offsets {
 public:
  template <class S>
  Offsets(const CandidatePanels<S>& panels, T scale)
      : scale_(scale), exact_(padded(panels)), rough_(kQuads ? padded(panels) : 0), shift_(nullptr) {
#if ANOMEM_BFLOAT16_PAIRS
    shift_ = panels.quads().shift();
#endif
    for (int64_t j = panels.count(); j < padded(panels); ++j) set(j, -T{INFINITY});
  }

  // −|m|²/2: the largest x·m − |m|²/2 is the nearest. NaN where the square of a finite row overflows: such a row may
  // be the nearest, and a column of NaN is looked at.
  template <class S>
  void set_lengths(const CandidatePanels<S>& panels) {
    const int64_t d = panels.features();
    for (int64_t j = 0; j < panels.count(); ++j) {
      const auto* const row = panels[j];
      const T offset = dot_product(row, row, d) / -2;
      const bool overflows = offset == -T{INFINITY} && std::all_of(row, row + d, [](T x) { return is_finite(x); });
      set(j, overflows ? T{NAN} : offset);
    }
  }

  void set(int64_t j, T offset) {
    exact_[j] = offset;
    if constexpr (kQuads) rough_[j] = offset == -T{INFINITY} ? offset : offset + scale_ * shift_[j];
    if (offset != -T{INFINITY}) largest_ = larger_or_nan(largest_, std::abs(offset));
  }

  T scale() const { return scale_; }
  T operator[](int64_t j) const { return exact_[j]; }
  // Beside the products of quads, or others.
  const T* data(bool quads) const { return quads ? rough_.data() : exact_.data(); }
  T largest() const { return largest_; }  // absolute, of all but −inf

 private:
  template <class S>
  static int64_t padded(const CandidatePanels<S>& panels) {
    return round_up(panels.count(), kGroups);
  }

  T scale_;
  Buffer<T> exact_, rough_;
  const T* shift_;
  T largest_ = 0;
};

// What a search looks for in each row: the k largest scores, or the k nearest prototypes. It gives keys and columns of
// kCandidateRows rows: scores with their sign changed, or squared distances; of equal ones the first column's first.
template <class S>
class Target {
 public:
  using T = accumulator_t<S>;

  Target(int64_t k, const Offsets<T>* offsets, bool by_distance)
      : k_(k),
        offsets_(offsets),
        by_distance_(by_distance),
        groups_(kCandidateRows * kGroups),
        key_(kCandidateRows * k),
        index_(kCandidateRows * k),
        count_(kCandidateRows),
        new_key_(k + kCandidateColumns + 4),
        same_key_(by_distance ? k + kCandidateColumns : 0),
        beyond_(by_distance ? k + kCandidateColumns : 0),
        same_index_(by_distance ? k + kCandidateColumns : 0),
        new_index_(k + kCandidateColumns) {}

  int64_t k() const { return k_; }
  T scale() const { return offsets_->scale(); }
  // Between scores one of which may be the other, if dots are known up to a bound.
  T margin(T bound) const { return 2 * (std::abs(scale()) * bound + kSlack<T> * offsets_->largest()); }
  const Offsets<T>& offsets() const { return *offsets_; }
  T* groups(int64_t r) { return groups_.data() + r * kGroups; }
  const T* keys(int64_t r) const { return key_.data() + r * k_; }
  const int64_t* columns(int64_t r) const { return index_.data() + r * k_; }

  int64_t found(int64_t r) const { return count_[r]; }

  // Of row r only scores above `known` matter.
  void begin(int64_t r, T known = -T{INFINITY}) {
    for (int64_t g = 0; g < kGroups; ++g) groups_[r * kGroups + g] = known;
    count_[r] = 0;
  }

  // Adds candidates of row r, at most kCandidateColumns, in ascending order of columns first + found[i].
  void add(int64_t r, const T* x, const CandidatePanels<S>& panels, int64_t first, const int32_t* found,
           int64_t count) {
    const int64_t held = count_[r], d = panels.features(), all = held + count;
    std::memcpy(new_index_.data(), index_.data() + r * k_, held * sizeof(int64_t));
    for (int64_t i = 0; i < count; ++i) new_index_[held + i] = first + found[i];
    if (by_distance_) return add_by_distance(r, x, panels, held, all);
    std::memcpy(new_key_.data(), key_.data() + r * k_, held * sizeof(T));
    for (int64_t i = held; i < all; i += 4) {
      const auto column = [&](int64_t j) { return new_index_[i + j < all ? i + j : i]; };
      four_dot_products<T>(x, {panels[column(0)], panels[column(1)], panels[column(2)], panels[column(3)]}, d,
                           new_key_.data() + i);
    }
    for (int64_t i = held; i < all; ++i) new_key_[i] = -(new_key_[i] * scale() + (*offsets_)[new_index_[i]]);
    keep_smallest(new_key_.data(), new_index_.data(), all, k_);
    count_[r] = all < k_ ? all : k_;
    std::memcpy(key_.data() + r * k_, new_key_.data(), count_[r] * sizeof(T));
    std::memcpy(index_.data() + r * k_, new_index_.data(), count_[r] * sizeof(int64_t));
  }

 private:
  // Keeps the k nearest of the `all` columns in `new_index_`, of which `held` have their distances in `key_`. Where
  // more than k distances are as small as the k-th but for their rounding, by what they lie beyond the nearest.
  void add_by_distance(int64_t r, const T* x, const CandidatePanels<S>& panels, int64_t held, int64_t all) {
    const int64_t d = panels.features(), kept = all < k_ ? all : k_;
    T* const keys = new_key_.data();
    int64_t* const columns = new_index_.data();
    std::memcpy(keys, key_.data() + r * k_, held * sizeof(T));
    for (int64_t i = held; i < all; ++i) keys[i] = squared_distance(x, panels[columns[i]], d);
    std::memcpy(same_key_.data(), keys, all * sizeof(T));
    std::memcpy(same_index_.data(), columns, all * sizeof(int64_t));
    keep_smallest(keys, columns, all, k_);
    if (all > k_ && is_finite(keys[k_ - 1])) {
      const T most = keys[k_ - 1] * (1 + kSlack<T>);
      int64_t as_small = 0;
      for (int64_t i = 0; i < all; ++i) as_small += same_key_[i] <= most;
      if (as_small > k_) {
        const T* const nearest = panels[columns[0]];
        for (int64_t i = 0; i < all; ++i) beyond_[i] = beyond(x, panels[same_index_[i]], nearest, d);
        keep_smallest(beyond_.data(), same_index_.data(), all, k_);
        std::sort(same_index_.data(), same_index_.data() + k_);
        for (int64_t i = 0; i < k_; ++i) {
          columns[i] = same_index_[i];
          keys[i] = squared_distance(x, panels[columns[i]], d);
        }
        keep_smallest(keys, columns, k_, k_);
      }
    }
    count_[r] = kept;
    std::memcpy(key_.data() + r * k_, keys, kept * sizeof(T));
    std::memcpy(index_.data() + r * k_, columns, kept * sizeof(int64_t));
  }

  int64_t k_;
  const Offsets<T>* offsets_;
  bool by_distance_;
  Buffer<T> groups_, key_;
  Buffer<int64_t> index_, count_;
  Buffer<T> new_key_;
  Buffer<T> same_key_;     // [held and new columns], as are the next two
  Buffer<double> beyond_;  // half of what a distance exceeds the least one by
  Buffer<int64_t> same_index_;
  Buffer<int64_t> new_index_;
};

// Scratch of one thread's searches over chunks of at most kCandidateRows rows.
template <class S>
class CandidateSearch {
 public:
  using T = accumulator_t<S>;
  using R = Rough<T>;

  explicit CandidateSearch(const CandidatePanels<S>& panels)
      : panels_(panels),
        columns_(panels.count() < kCandidateColumns ? panels.count() : kCandidateColumns),
        tile_stride_(padded_stride<T>(round_up(columns_, kGroups))),
        rough_(kCandidateRows, panels.features()),
        tile_(kCandidateRows * tile_stride_),
        bound_(kCandidateRows),
        unit_(kCandidateRows),
        found_(kMostFound<T>) {
#if ANOMEM_BFLOAT16_PAIRS
    if (panels.features() <= kMostQuadTerms) quads_.emplace(kCandidateRows, panels.features());
#endif
  }

  // Fills the targets for rows x. With `known` distances of the rows only nearer prototypes are found.
  void find(const QueryRows<S>& x, int64_t count, Target<S>* const* targets, int targets_count,
            const T* known = nullptr) {
    const int64_t d = panels_.features();
    for (int64_t r = 0; r < count; ++r) set(r, x[r]);
    for (int t = 0; t < targets_count; ++t)
      for (int64_t r = 0; r < count; ++r) {
        if (known == nullptr) targets[t]->begin(r);
        else targets[t]->begin(r, (dot_product(x[r], x[r], d) * (1 - kSlack<T>)-known[r]) / 2 - same_for_all(x[r]));
      }
    int64_t computed = 0, asked = 0;
    for (int64_t first = 0; first < panels_.count(); first += kCandidateColumns) {
      const int64_t left = panels_.count() - first, n = left < kCandidateColumns ? left : kCandidateColumns;
      multiply(count, first, n);
      for (int t = 0; t < targets_count; ++t)
        for (int64_t r = 0; r < count; ++r)
          computed += collect_row(*targets[t], r, x[r], first, n, tile_.data() + r * tile_stride_);
    }
    for (int t = 0; t < targets_count; ++t) asked += count * targets[t]->k();
    // In cycles of a Zen 4 core: a candidate takes d/8 and 24, and quads save d/64 for each product.
    if (quads_ && (computed - asked) * (d / 8 + 24) > count * panels_.count() * d / 64) quads_.reset();
  }

 private:
  // Row r of the product; its bound, and the unit of its products.
  void set(int64_t r, const T* x) {
#if ANOMEM_BFLOAT16_PAIRS
    if (quads_) {
      std::tie(unit_[r], bound_[r]) = quads_->set(r, x, panels_.quads(), kSlack<T>);
      return;
    }
#endif
    const int64_t d = panels_.features();
    rough_.set(r, x, T{1});
    unit_[r] = 1;
    bound_[r] = panels_.bound(length_at_most(dot_product(x, x, d), d), rounding_length(x, d));
  }

  // What the products of a row x leave out, the same for all columns.
  T same_for_all(const T* x) const {
#if ANOMEM_BFLOAT16_PAIRS
    if (quads_) return dot_product(x, panels_.quads().mean(), panels_.features());
#endif
    return 0;
  }

  // The rough products of the rows with n columns, to the tile.
  void multiply(int64_t count, int64_t first, int64_t n) {
#if ANOMEM_BFLOAT16_PAIRS
    if (quads_) return quads_->multiply(count, panels_.quads(), first, n, tile_.data(), tile_stride_);
#endif
    product(count, n, factors<R>(panels_.features()), rough_.data(), rough_.stride(), 1, panels_.packed().from(first),
            tile_.data(), tile_stride_, false);
  }

  // Returns the number of candidates.
  int64_t collect_row(Target<S>& target, int64_t r, const T* x, int64_t first, int64_t n, const T* dots) {
    const int64_t candidates =
        collect(dots, target.offsets().data(quads_.has_value()) + first, n, target.scale() * unit_[r], target.k(),
                target.margin(bound_[r]), target.groups(r), found_.data());
    target.add(r, x, panels_, first, found_.data(), candidates);
    return candidates;
  }

  const CandidatePanels<S>& panels_;
  int64_t columns_, tile_stride_;
  std::optional<QuadRows> quads_;  // as long as they leave few candidates
  FactorRows<R> rough_;
  Buffer<T> tile_, bound_, unit_;
  Buffer<int32_t> found_;
};

// Fills the target for one row x whose dots with all prototypes are exact up to rounding; `found` has room for
// kMostFound.
template <class S, class T = accumulator_t<S>>
inline void find_in(const CandidatePanels<S>& panels, Target<S>& target, int64_t r, const T* x, const T* dots,
                    int32_t* found) {
  const int64_t d = panels.features();
  const T margin = target.margin(kSlack<T> * length_at_most(dot_product(x, x, d), d) * panels.longest());
  for (int64_t first = 0; first < panels.count(); first += kCandidateColumns) {
    const int64_t left = panels.count() - first, n = left < kCandidateColumns ? left : kCandidateColumns;
    const int64_t candidates = collect(dots + first, target.offsets().data(false) + first, n, target.scale(),
                                       target.k(), margin, target.groups(r), found);
    target.add(r, x, panels, first, found, candidates);
  }
}

}  // namespace anomem::cpu::ANOMEM_ISA
