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
// Whole numbers of 8 bits (quads.h) come first, with the same bound: their product is twice as fast. Where they leave so
// many candidates that computing those takes longer than was saved, the search goes on in pairs of bfloat16.
//
// The k-th largest is bounded from below by the largest scores of kGroups disjoint groups of columns: the k-th largest
// of those. No matrix of all scores is kept: a tile of kCandidateRows × kCandidateColumns passes through the cache.
#pragma once

#include <mutex>
#include <optional>
#include <tuple>

#include "cpu/factors.h"
#include "cpu/nearest.h"
#include "cpu/panels.h"
#include "cpu/product.h"
#include "cpu/quads.h"

namespace anomem::cpu::ANOMEM_ISA {

constexpr int64_t kCandidateRows = 42, kCandidateColumns = 1024, kGroups = 2 * kMostCandidates;

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

#pragma GCC diagnostic pop

#if ANOMEM_BFLOAT16_PAIRS
constexpr bool kQuads = true;
#else
constexpr bool kQuads = false;
struct QuadPanels {};
struct QuadRows {};
#endif

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12's own intrinsics

// Writes the numbers at + lane of the lanes in `bits`, in order, and returns how many; `to` has room for kLanes<T>.
template <class T>
ANOMEM_INLINE int64_t append_lanes(uint32_t bits, int64_t at, int32_t* to) {
#if ANOMEM_X86_VARIANTS && ANOMEM_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {  // no branch depends on the scores
    const __m512i all = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(at)),
                                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), all));
    return __builtin_popcount(bits);
  }
#endif
  int64_t count = 0;
  for (; bits != 0; bits &= bits - 1) to[count++] = static_cast<int32_t>(at + __builtin_ctz(bits));
  return count;
}

// The dot products of x with four rows.
template <class T>
ANOMEM_INLINE void four_dot_products(const T* x, const T* const (&rows)[4], int64_t d, T* to) {
  vec<T> sums[4] = {};
  for_vectors<T>(d, [&](int64_t i, int64_t count) {
    const vec<T> factor = load_some(x + i, count);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] = multiply_add(factor, load_some(rows[j] + i, count), sums[j]);
  });
#if ANOMEM_X86_VARIANTS && ANOMEM_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    // Neighbouring lanes are added, of two sums and then of four at once.
    const __m512 a = __m512(sums[0]), b = __m512(sums[1]), c = __m512(sums[2]), e = __m512(sums[3]);
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 ce = _mm512_add_ps(_mm512_unpacklo_ps(c, e), _mm512_unpackhi_ps(c, e));
    const __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(ce))),
                                     _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(ce))));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    return;
  }
#endif
  for (int j = 0; j < 4; ++j) to[j] = sum_lanes<T>(sums[j]);
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
      longest_ = larger_or_nan(longest_, std::sqrt(dot_product(row, row, d)));
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

  // −|m|²/2: the largest x·m − |m|²/2 is the nearest.
  template <class S>
  void set_lengths(const CandidatePanels<S>& panels) {
    for (int64_t j = 0; j < panels.count(); ++j) set(j, dot_product(panels[j], panels[j], panels.features()) / -2);
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
  for (int step = 0; step < 4; ++step) {  // quarters of the interval; no branch depends on the scores
    const T quarter = (above - least) / 4, marks[] = {least, least + quarter, least + 2 * quarter, above - quarter};
    int64_t reach[4] = {k, 0, 0, 0};
    for (int v = 0; v < kVectors; ++v)
      for (int i = 1; i < 4; ++i) reach[i] += __builtin_popcount(lanes_at_least<T>(top[v], broadcast(marks[i])));
    for (int i = 1; i < 4; ++i) {
      const bool enough = reach[i] >= k;
      least = enough ? marks[i] : least;
      above = !enough && reach[i - 1] >= k ? marks[i] : above;
    }
  }
  return least;
}

// Columns j < n whose score dots[j] · scale + offset[j] is at least the k-th largest less `margin`, in ascending
// order. `groups` [kGroups] holds the largest scores of the groups so far. Behind n, up to a multiple of kGroups, dots may be
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
  for (int64_t j = 0; j < n; j += kGroups)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = j + v * kLanes<T>;
      const vec<T> score = multiply_add(load(dots + at), factor, load(offset + at));
      count += append_lanes<T>(lanes_at_least<T>(score, least), at, found + count);
    }
  while (count > 0 && found[count - 1] >= n) --count;
  return count;
}

#if ANOMEM_X86_VARIANTS && ANOMEM_VECTOR_BYTES == 64
// Lanes i and i ^ by of eight numbers are compared; the lanes in `upper` keep the larger.
template <int kBy>
ANOMEM_INLINE __m512i compare_exchange(__m512i x, __mmask8 upper) {
  const __m512i other = kBy == 4   ? _mm512_shuffle_i64x2(x, x, 0x4e)
                        : kBy == 2 ? _mm512_permutex_epi64(x, 0x4e)
                                   : _mm512_permutex_epi64(x, 0xb1);
  return _mm512_mask_max_epu64(_mm512_min_epu64(x, other), upper, x, other);
}

// Sorts eight numbers that first rise and then fall.
ANOMEM_INLINE __m512i sort_bitonic(__m512i x) {
  return compare_exchange<1>(compare_exchange<2>(compare_exchange<4>(x, 0xf0), 0xcc), 0xaa);
}

ANOMEM_INLINE __m512i sort_eight(__m512i x) {
  x = compare_exchange<1>(x, 0x66);
  x = compare_exchange<1>(compare_exchange<2>(x, 0x3c), 0x5a);
  return sort_bitonic(x);
}

// `keep_smallest` of numbers, for k ≤ 8 and at most kGroups keys: a bitonic network of (key, place) in one word.
inline void keep_eight_smallest(float* key, int64_t* column, int64_t count, int64_t k) {
  const __m512i reversed = _mm512_setr_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  __m512i best = _mm512_set1_epi64(-1);
  for (int64_t i = 0; i < count; i += 8) {
    const __mmask8 some = count - i < 8 ? static_cast<__mmask8>((1u << (count - i)) - 1) : static_cast<__mmask8>(-1);
    // −0 becomes 0; the order of the bits is then that of the numbers, once the negative ones are turned round.
    const __m256i bits = _mm256_castps_si256(_mm256_add_ps(_mm256_maskz_loadu_ps(some, key + i), _mm256_setzero_ps()));
    const __m256i turned =
        _mm256_xor_si256(bits, _mm256_or_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(INT32_MIN)));
    const __m512i place = _mm512_add_epi64(_mm512_set1_epi64(i), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    const __m512i word = _mm512_or_si512(_mm512_slli_epi64(_mm512_cvtepu32_epi64(turned), 32), place);
    const __m512i sorted = sort_eight(_mm512_mask_mov_epi64(_mm512_set1_epi64(-1), some, word));
    best = i == 0 ? sorted : sort_bitonic(_mm512_min_epu64(best, _mm512_permutexvar_epi64(reversed, sorted)));
  }
  const __mmask8 kept = static_cast<__mmask8>((1u << (count < k ? count : k)) - 1);
  const __m512i place = _mm512_and_si512(best, _mm512_set1_epi64(UINT32_MAX));
  const __m256 keys = _mm512_mask_i64gather_ps(_mm256_setzero_ps(), kept, place, key, 4);
  const __m512i columns = _mm512_mask_i64gather_epi64(_mm512_setzero_si512(), kept, place, column, 8);
  _mm256_mask_storeu_ps(key, kept, keys);
  _mm512_mask_storeu_epi64(column, kept, columns);
}
#endif

// Brings the k smallest of `count` keys and their columns into order, in place: of equal keys the first, and NaN last.
template <class T>
inline void keep_smallest(T* key, int64_t* column, int64_t count, int64_t k) {
  const auto before = [](T a, T b) { return a < b || (b != b && a == a); };
  if (count > 1 && count <= kGroups) {
    // A sorting network, or by rank: the branches of an insertion would be mispredicted.
    bool nan = false;
    for (int64_t i = 0; i < count; ++i) nan |= key[i] != key[i];
#if ANOMEM_X86_VARIANTS && ANOMEM_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4)
      if (!nan && k <= 8) return keep_eight_smallest(key, column, count, k);
#endif
    T keys[kGroups];
    int64_t columns[kGroups];
    for (int64_t i = 0; i < count; ++i) {
      keys[i] = key[i] == key[i] ? key[i] : T{INFINITY};
      columns[i] = column[i];
    }
    for (int64_t i = count; i < round_up(count, kLanes<T>); ++i) keys[i] = T{INFINITY};
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

  Target(int64_t k, const Offsets<T>* offsets, bool by_distance)
      : k_(k),
        offsets_(offsets),
        by_distance_(by_distance),
        groups_(kCandidateRows * kGroups),
        key_(kCandidateRows * k),
        index_(kCandidateRows * k),
        count_(kCandidateRows),
        new_key_(k + kCandidateColumns + 4),
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

  // Adds candidates of row r, at most kCandidateColumns, in ascending order of columns first + found[i]. Their keys are
  // the squared distance, or the score with its sign changed.
  void add(int64_t r, const T* x, const CandidatePanels<S>& panels, int64_t first, const int32_t* found,
           int64_t count) {
    const int64_t held = count_[r], d = panels.features(), all = held + count;
    std::memcpy(new_key_.data(), key_.data() + r * k_, held * sizeof(T));
    std::memcpy(new_index_.data(), index_.data() + r * k_, held * sizeof(int64_t));
    for (int64_t i = 0; i < count; ++i) new_index_[held + i] = first + found[i];
    if (by_distance_) {
      for (int64_t i = held; i < all; ++i) new_key_[i] = squared_distance(x, panels[new_index_[i]], d);
    } else {
      for (int64_t i = held; i < all; i += 4) {
        const auto column = [&](int64_t j) { return new_index_[i + j < all ? i + j : i]; };
        four_dot_products<T>(x, {panels[column(0)], panels[column(1)], panels[column(2)], panels[column(3)]}, d,
                             new_key_.data() + i);
      }
      for (int64_t i = held; i < all; ++i) new_key_[i] = -(new_key_[i] * scale() + (*offsets_)[new_index_[i]]);
    }
    keep_smallest(new_key_.data(), new_index_.data(), all, k_);
    count_[r] = all < k_ ? all : k_;
    std::memcpy(key_.data() + r * k_, new_key_.data(), count_[r] * sizeof(T));
    std::memcpy(index_.data() + r * k_, new_index_.data(), count_[r] * sizeof(int64_t));
  }

 private:
  int64_t k_;
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
    bound_[r] = panels_.bound(std::sqrt(dot_product(x, x, d)), rounding_length(x, d));
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
  const T margin = target.margin(kSlack<T> * std::sqrt(dot_product(x, x, d)) * panels.longest());
  for (int64_t first = 0; first < panels.count(); first += kCandidateColumns) {
    const int64_t left = panels.count() - first, n = left < kCandidateColumns ? left : kCandidateColumns;
    const int64_t candidates = collect(dots + first, target.offsets().data(false) + first, n, target.scale(), target.k(),
                                       margin, target.groups(r), found);
    target.add(r, x, panels, first, found, candidates);
  }
}

}  // namespace anomem::cpu::ANOMEM_ISA
