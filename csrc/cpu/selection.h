// Selection among the scores of a row: the columns near the k largest, and the k smallest keys in order. With AVX-512
// no branch depends on the scores.
#pragma once

#include "cpu/nearest.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12's own intrinsics

namespace anomem::cpu::ANOMEM_ISA {

constexpr int64_t kGroups = 2 * kMostCandidates;

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

// Columns j < n whose score dots[j] · scale + offset[j] is at least the k-th largest less `margin`, in ascending order.
// `groups` [kGroups] holds the largest scores of the groups so far. Behind n, up to a multiple of kGroups, dots may be
// anything. A margin that is no number takes all columns. `found` has room for n, rounded up to kGroups, and kLanes<T>.
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

}  // namespace anomem::cpu::ANOMEM_ISA
#pragma GCC diagnostic pop
