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
// The k-th largest is bounded from below by the largest scores of kGroups disjoint groups of columns: the k-th largest
// of those. No matrix of all scores is kept: a tile of kCandidateRows × kCandidateColumns passes through the cache.
#pragma once

#include "cpu/factors.h"
#include "cpu/nearest.h"
#include "cpu/panels.h"
#include "cpu/product.h"

namespace anomem::cpu::ANOMEM_ISA {

constexpr int64_t kCandidateRows = 42, kCandidateColumns = 1024, kGroups = 2 * kMostCandidates;

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

template <class T>
inline T larger_or_nan(T a, T b) {
  return a != a || b <= a ? a : b;
}

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
    return std::sqrt(sum_lanes<T>(squares));
  }
}

// Σ (a − b)², in two running sums.
template <class T>
inline T squared_distance(const T* a, const T* b, int64_t d) {
  vec<T> even{}, odd{};
  int64_t p = 0;
  for (; p + 2 * kLanes<T> <= d; p += 2 * kLanes<T>) {
    const vec<T> first = load(a + p) - load(b + p), second = load(a + p + kLanes<T>) - load(b + p + kLanes<T>);
    even = multiply_add(first, first, even);
    odd = multiply_add(second, second, odd);
  }
  for (; p < d; p += kLanes<T>) {
    const int64_t count = d - p < kLanes<T> ? d - p : kLanes<T>;
    const vec<T> difference = load_some(a + p, count) - load_some(b + p, count);
    even = multiply_add(difference, difference, even);
  }
  return sum_lanes<T>(even + odd);
}

// Lanes of x that are at least the bound, as bits.
template <class T>
ANOMEM_INLINE uint32_t lanes_at_least(vec<T> x, vec<T> bound) {
#if ANOMEM_X86_VARIANTS && ANOMEM_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask(__m512(x), __m512(bound), _CMP_GE_OQ);
  else return _mm512_cmp_pd_mask(__m512d(x), __m512d(bound), _CMP_GE_OQ);
#elif ANOMEM_X86_VARIANTS && ANOMEM_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) return _mm256_movemask_ps(reinterpret_cast<__m256>(x >= bound));
  else return _mm256_movemask_pd(reinterpret_cast<__m256d>(x >= bound));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<T>; ++i) bits |= static_cast<uint32_t>(x[i] >= bound[i]) << i;
  return bits;
#endif
}

// The prototypes of a bank: normalised rows, the packed factor of their rough product, and the lengths of its bound.
template <class S>
class CandidatePanels {
 public:
  using T = accumulator_t<S>;
  using R = Rough<T>;

  CandidatePanels(const S* prototypes, int64_t stride, int64_t count, int64_t d, Normalize how)
      : count_(count), d_(d), rows_(count * d), packed_(packed_size<T>(factors<R>(d), count)) {
    FactorRows<R> rough(count, d);
    for (int64_t j = 0; j < count; ++j) {
      T* row = rows_.data() + j * d;
      normalize_row(prototypes + j * stride, d, how, row);
      rough.set(j, row, T{1});
      const T length = std::sqrt(dot_product(row, row, d)), lost = rounding_length(row, d);
      longest_ = larger_or_nan(longest_, length);
      most_lost_ = larger_or_nan(most_lost_, lost);
    }
    rough.pack_columns(count, packed_.data());
  }

  int64_t count() const { return count_; }
  int64_t features() const { return d_; }
  const T* operator[](int64_t j) const { return rows_.data() + j * d_; }
  T longest() const { return longest_; }
  // Of the panels from a column on, a multiple of a panel's width.
  const factor_t<R>* from(int64_t column) const { return packed_.data() + column * factors<R>(d_); }

  // Bound of |x·m − rough product| for a row x of this length that lost so much.
  T bound(T length, T lost) const {
    return lost * longest_ + (length + lost) * most_lost_ + kSlack<T> * length * longest_;
  }

 private:
  int64_t count_, d_;
  Buffer<T> rows_;
  Buffer<factor_t<R>> packed_;
  T longest_ = 0, most_lost_ = 0;
};

// Offsets of all columns, −inf behind the last.
template <class T>
class Offsets {
 public:
  explicit Offsets(int64_t count) : data_(round_up(count, kGroups)) {
    for (int64_t j = count; j < round_up(count, kGroups); ++j) data_[j] = -T{INFINITY};
  }
  T* data() { return data_.data(); }
  const T* data() const { return data_.data(); }
  T operator[](int64_t j) const { return data_[j]; }

  // −|m|²/2: the largest x·m − |m|²/2 is the nearest.
  template <class S>
  void set_lengths(const CandidatePanels<S>& panels) {
    for (int64_t j = 0; j < panels.count(); ++j) set(j, dot_product(panels[j], panels[j], panels.features()) / -2);
  }

  void set(int64_t j, T offset) {
    data_[j] = offset;
    if (offset != -T{INFINITY}) largest_ = larger_or_nan(largest_, std::abs(offset));
  }

  T largest() const { return largest_; }  // absolute, of all but −inf

 private:
  Buffer<T> data_;
  T largest_ = 0;
};

// A number that k of the largest scores of groups reach, close to the k-th largest of them. `top` are the groups'
// vectors.
template <class T>
inline T kth_largest(vec<T>* top, const T* groups, int64_t k) {
  constexpr int kVectors = kGroups / kLanes<T>;
  vec<T> high = top[0], low = top[0];
  for (int v = 1; v < kVectors; ++v) {
    high = larger(top[v], high);
    low = top[v] < low ? top[v] : low;
  }
  T above = max_lanes<T>(high), least = -max_lanes<T>(-low);
  if (k == 1) return above;
  if (least == -T{INFINITY}) {   // fewer columns than groups
    T largest[kMostCandidates];  // in descending order
    int64_t held = 0;
    for (int64_t g = 0; g < kGroups; ++g) {
      const T score = groups[g];
      if (held == k && !(score > largest[k - 1])) continue;
      int64_t p = held < k ? held++ : k - 1;
      for (; p > 0 && largest[p - 1] < score; --p) largest[p] = largest[p - 1];
      largest[p] = score;
    }
    return largest[k - 1];
  }
  for (int step = 0; step < 8; ++step) {  // bisection; no branch depends on the scores
    const T middle = least + (above - least) / 2;
    int64_t reach = 0;
    for (int v = 0; v < kVectors; ++v) reach += __builtin_popcount(lanes_at_least<T>(top[v], broadcast(middle)));
    const bool enough = reach >= k;
    least = enough ? middle : least;
    above = enough ? above : middle;
  }
  return least;
}

// Columns j < n whose score dots[j] · scale + offset[j] is at least the k-th largest less `margin`, in ascending order.
// `groups` [kGroups] holds the largest scores of the groups so far. Behind n, up to a multiple of kGroups, dots may be
// anything. A margin that is no number takes all columns.
template <class T>
inline int64_t collect(const T* dots, const T* offset, int64_t n, T scale, int64_t k, T margin, T* groups,
                       int32_t* found) {
  constexpr int kVectors = kGroups / kLanes<T>;
  int64_t count = 0;
  if (!is_finite(margin)) {
    for (int64_t j = 0; j < n; ++j) found[count++] = static_cast<int32_t>(j);
    return count;
  }
  const vec<T> factor = broadcast(scale);
  vec<T> top[kVectors];
  for (int v = 0; v < kVectors; ++v) top[v] = load(groups + v * kLanes<T>);
  for (int64_t j = 0; j < n; j += kGroups)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = j + v * kLanes<T>;
      top[v] = larger(multiply_add(load(dots + at), factor, load(offset + at)), top[v]);
    }
  for (int v = 0; v < kVectors; ++v) store(groups + v * kLanes<T>, top[v]);
  const vec<T> least = broadcast(kth_largest<T>(top, groups, k) - margin);
  for (int64_t j = 0; j < n; j += kGroups) {
    uint64_t columns = 0;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = j + v * kLanes<T>;
      const vec<T> score = multiply_add(load(dots + at), factor, load(offset + at));
      columns |= static_cast<uint64_t>(lanes_at_least<T>(score, least)) << (v * kLanes<T>);
    }
    for (; columns != 0; columns &= columns - 1) {
      const int64_t column = j + __builtin_ctzll(columns);
      if (column < n) found[count++] = static_cast<int32_t>(column);
    }
  }
  return count;
}

// Brings the k smallest of `count` keys and their columns into order, in place: of equal keys the first, and NaN last.
template <class T>
inline void keep_smallest(T* key, int64_t* column, int64_t count, int64_t k) {
  const auto before = [](T a, T b) { return a < b || (b != b && a == a); };
  if (count > 1 && count <= kGroups) {
    // By rank: the branches of an insertion would be mispredicted.
    T keys[kGroups];
    int64_t columns[kGroups];
    for (int64_t i = 0; i < count; ++i) {
      keys[i] = key[i] == key[i] ? key[i] : T{INFINITY};
      columns[i] = column[i];
    }
    for (int64_t i = count; i < round_up(count, kLanes<T>); ++i) keys[i] = T{INFINITY};
    bool nan = false;
    for (int64_t i = 0; i < count; ++i) nan |= key[i] != key[i];
    if (!nan) {
      for (int64_t i = 0; i < count; ++i) {
        int64_t rank = 0;
        const vec<T> mine = broadcast(keys[i]);
        for (int64_t j = 0; j < count; j += kLanes<T>) {
          const vec<T> theirs = load(keys + j);
          // Behind an equal key that comes first; not behind itself.
          const uint32_t smaller_or_equal = lanes_at_least<T>(mine, theirs), equal = lanes_at_least<T>(theirs, mine);
          const int64_t first = i - j;
          const uint32_t earlier = first <= 0 ? 0 : first >= kLanes<T> ? ~0u : (1u << first) - 1;
          rank += __builtin_popcount(smaller_or_equal & (~equal | earlier));
        }
        if (rank < k) {
          key[rank] = keys[i];
          column[rank] = columns[i];
        }
      }
      return;
    }
  }
  for (int64_t i = 1; i < count; ++i) {
    const T candidate = key[i];
    const int64_t of = column[i];
    if (i >= k && !before(candidate, key[k - 1])) continue;
    int64_t p = i < k ? i : k - 1;
    for (; p > 0 && before(candidate, key[p - 1]); --p) {
      key[p] = key[p - 1];
      column[p] = column[p - 1];
    }
    key[p] = candidate;
    column[p] = of;
  }
}

// What a search looks for in each row: the k largest scores. It gives keys and columns of kCandidateRows rows.
template <class S>
class Target {
 public:
  using T = accumulator_t<S>;

  Target(int64_t k, T scale, const Offsets<T>* offsets, bool by_distance)
      : k_(k),
        scale_(scale),
        offsets_(offsets),
        by_distance_(by_distance),
        groups_(kCandidateRows * kGroups),
        key_(kCandidateRows * k),
        index_(kCandidateRows * k),
        count_(kCandidateRows),
        new_key_(k + kCandidateColumns),
        new_index_(k + kCandidateColumns) {}

  int64_t k() const { return k_; }
  T scale() const { return scale_; }
  // Between scores one of which may be the other, if dots are known up to a bound.
  T margin(T bound) const { return 2 * (std::abs(scale_) * bound + kSlack<T> * offsets_->largest()); }
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

  // Adds candidates of row r, at most kCandidateColumns, in ascending order of columns first + found[i]. Their keys are
  // the squared distance, or the score with its sign changed.
  void add(int64_t r, const T* x, const CandidatePanels<S>& panels, int64_t first, const int32_t* found,
           int64_t count) {
    const int64_t held = count_[r], d = panels.features(), all = held + count;
    std::memcpy(new_key_.data(), key_.data() + r * k_, held * sizeof(T));
    std::memcpy(new_index_.data(), index_.data() + r * k_, held * sizeof(int64_t));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t column = first + found[i];
      new_index_[held + i] = column;
      new_key_[held + i] = by_distance_ ? squared_distance(x, panels[column], d)
                                        : -(dot_product(x, panels[column], d) * scale_ + (*offsets_)[column]);
    }
    keep_smallest(new_key_.data(), new_index_.data(), all, k_);
    count_[r] = all < k_ ? all : k_;
    std::memcpy(key_.data() + r * k_, new_key_.data(), count_[r] * sizeof(T));
    std::memcpy(index_.data() + r * k_, new_index_.data(), count_[r] * sizeof(int64_t));
  }

 private:
  int64_t k_;
  T scale_;
  const Offsets<T>* offsets_;
  bool by_distance_;
  Buffer<T> groups_, key_;
  Buffer<int64_t> index_, count_;
  Buffer<T> new_key_;
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
        length_(kCandidateRows),
        found_(columns_ + 1) {}

  // Fills the targets for rows x. With `known` distances of the rows only nearer prototypes are found.
  void find(const QueryRows<S>& x, int64_t count, Target<S>* const* targets, int targets_count,
            const T* known = nullptr) {
    const int64_t d = panels_.features();
    for (int64_t r = 0; r < count; ++r) {
      rough_.set(r, x[r], T{1});
      length_[r] = std::sqrt(dot_product(x[r], x[r], d));
      bound_[r] = panels_.bound(length_[r], rounding_length(x[r], d));
    }
    for (int t = 0; t < targets_count; ++t)
      for (int64_t r = 0; r < count; ++r) {
        if (known == nullptr) targets[t]->begin(r);
        else targets[t]->begin(r, (length_[r] * length_[r] * (1 - kSlack<T>)-known[r]) / 2);
      }
    for (int64_t first = 0; first < panels_.count(); first += kCandidateColumns) {
      const int64_t left = panels_.count() - first, n = left < kCandidateColumns ? left : kCandidateColumns;
      product(count, n, factors<R>(d), rough_.data(), rough_.stride(), 1, panels_.from(first), tile_.data(),
              tile_stride_, false);
      for (int t = 0; t < targets_count; ++t)
        for (int64_t r = 0; r < count; ++r)
          collect_row(*targets[t], r, x[r], first, n, tile_.data() + r * tile_stride_);
    }
  }

 private:
  void collect_row(Target<S>& target, int64_t r, const T* x, int64_t first, int64_t n, const T* dots) {
    const int64_t candidates = collect(dots, target.offsets().data() + first, n, target.scale(), target.k(),
                                       target.margin(bound_[r]), target.groups(r), found_.data());
    target.add(r, x, panels_, first, found_.data(), candidates);
  }

  const CandidatePanels<S>& panels_;
  int64_t columns_, tile_stride_;
  FactorRows<R> rough_;
  Buffer<T> tile_, bound_, length_;
  Buffer<int32_t> found_;
};

// Fills the target for one row x whose dots with all prototypes are exact up to rounding; `found` has room for
// kCandidateColumns.
template <class S, class T = accumulator_t<S>>
inline void find_in(const CandidatePanels<S>& panels, Target<S>& target, int64_t r, const T* x, const T* dots,
                    int32_t* found) {
  const int64_t d = panels.features();
  const T margin = target.margin(kSlack<T> * std::sqrt(dot_product(x, x, d)) * panels.longest());
  for (int64_t first = 0; first < panels.count(); first += kCandidateColumns) {
    const int64_t left = panels.count() - first, n = left < kCandidateColumns ? left : kCandidateColumns;
    const int64_t candidates = collect(dots + first, target.offsets().data() + first, n, target.scale(), target.k(),
                                       margin, target.groups(r), found);
    target.add(r, x, panels, first, found, candidates);
  }
}

}  // namespace anomem::cpu::ANOMEM_ISA
