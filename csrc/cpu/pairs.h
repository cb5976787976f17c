// What products multiply. On a processor with instructions for it, two neighbouring bfloat16 numbers of a sum at a time:
// twice the multiplications of float32, and each product exact in a float32 sum. Else numbers of the accumulation type.
#pragma once

#include "cpu/simd.h"

namespace anomem::cpu::ANOMEM_ISA {

// The type of factors made of elements S, and how many terms of a sum one of them holds.
template <class S>
struct Factor {
  using type = accumulator_t<S>;
  static constexpr int terms = 1;
};

// The type of the sums that products of factors F are added to.
template <class F>
struct SumOf {
  using type = F;
};

#if ANOMEM_BFLOAT16_PAIRS
struct __attribute__((may_alias)) Pair {
  uint32_t bits;  // the first term in the lower half
};

template <>
struct Factor<Bfloat16> {
  using type = Pair;
  static constexpr int terms = 2;
};

ANOMEM_INLINE __m512bh load(const Pair* p) { return (__m512bh)_mm512_loadu_si512(p); }

ANOMEM_INLINE __m512bh broadcast(Pair x) { return (__m512bh)_mm512_set1_epi32(int(x.bits)); }

// c + a.first · b.first + a.second · b.second in every lane.
ANOMEM_INLINE vec<float> multiply_add(__m512bh a, __m512bh b, vec<float> c) {
  return (vec<float>)_mm512_dpbf16_ps((__m512)c, a, b);
}

// Pairs of two rows' numbers, rounded to nearest.
ANOMEM_INLINE void store(Pair* p, vec<float> first, vec<float> second) {
  typedef int16_t halves __attribute__((vector_size(64)));
  const halves rounded = (halves)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  constexpr halves interleave = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  _mm512_storeu_si512(p, (__m512i)__builtin_shuffle(rounded, interleave));
}

// Pairs of neighbours in 2 · lanes numbers, rounded to nearest.
ANOMEM_INLINE void store_neighbours(Pair* p, vec<float> first, vec<float> rest) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)rest, (__m512)first));
}

template <>
struct SumOf<Pair> {
  using type = float;
};
#endif

template <class S>
using factor_t = typename Factor<S>::type;
template <class S>
constexpr bool in_pairs = Factor<S>::terms == 2;
template <class F>
using sum_t = typename SumOf<F>::type;

// Factors in a sum of n terms.
template <class S>
constexpr int64_t factors(int64_t n) {
  return (n + Factor<S>::terms - 1) / Factor<S>::terms;
}

}  // namespace anomem::cpu::ANOMEM_ISA
