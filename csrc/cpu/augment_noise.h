// Normal numbers from a key and a counter: the hash and the Box-Muller transform of anomem/reference/augment.py.
#pragma once

#include "cpu/rows.h"
#include "cpu/simd.h"

namespace anomem::cpu::ANOMEM_ISA {

using Words = typename Simd<float>::words;

// A bijection of 32-bit words, mixed_shifted(shifted(x)): multipliers and shifts of "hash-prospector" (Wellons 2018,
// lowest bias found in 2020).
ANOMEM_INLINE Words shifted(Words x) { return x ^ (x >> 16); }
ANOMEM_INLINE Words mixed_shifted(Words x) {
  x *= 0x21f0aaadu;
  x = (x ^ (x >> 15)) * 0x735a2d97u;
  return x ^ (x >> 15);
}

struct WordPair {
  Words first, second;
};

// The words of an even counter and of the one after. They differ in the lowest bit, which the first shift drops.
ANOMEM_INLINE WordPair hashed(Words counter, uint32_t low, uint32_t high) {
  const Words x = shifted(counter ^ low);
  return {mixed_shifted(shifted(mixed_shifted(x) ^ high)), mixed_shifted(shifted(mixed_shifted(x ^ 1u) ^ high))};
}

// −2 ln(n / 2^24) for n ≥ 1: a fit of least relative error on [sqrt(1/2), sqrt(2)), 3e-8 before rounding, and the
// exponent.
ANOMEM_INLINE vec<float> minus_twice_log(vec<float> n) {
  constexpr float coefficients[] = {-0.1740086973f, 0.2853497267f,  -0.2982953787f, 0.3315517008f, -0.399261266f,
                                    0.5000267625f,  -0.6666781902f, 1.0f,           -2.0f};
  using Bits = typename Simd<float>::bits;
  const Bits bits = reinterpret_cast<Bits>(n);
  const Bits exponent = (bits - 0x4b3504f3) >> 23;  // of sqrt(1/2) · 2^24
  const vec<float> mantissa = reinterpret_cast<vec<float>>(bits - (exponent << 23));
  const vec<float> x = multiply_add(mantissa, broadcast(0x1p-24f), broadcast(-1.0f));
  vec<float> power = broadcast(coefficients[0]);
  for (int i = 1; i < 9; ++i) power = multiply_add(power, x, broadcast(coefficients[i]));
  return multiply_add(power, x, __builtin_convertvector(exponent, vec<float>) * -1.386294361f);
}

// sin(π y) for |y| ≤ 1/2: a fit of least relative error, 4e-9 before rounding.
ANOMEM_INLINE vec<float> sine_of_half_turns(vec<float> y) {
  constexpr float coefficients[] = {0.07722012695f, -0.598045173f, 2.550031377f, -5.167706879f, 3.14159258f};
  const vec<float> square = y * y;
  vec<float> power = broadcast(coefficients[0]);
  for (int i = 1; i < 5; ++i) power = multiply_add(power, square, broadcast(coefficients[i]));
  return power * y;
}

constexpr int kNormalVectors = 4;  // of pairs that are made together

// Normal numbers of some vectors of pairs: step by step for all of them, as the steps of one wait for each other.
template <int kVectors>
struct NormalPairs {
  // Those of pairs `pair`, pair + 1, … of a key.
  ANOMEM_INLINE NormalPairs(int64_t pair, int64_t key) {
    using Bits = typename Simd<float>::bits;
    const uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(static_cast<uint64_t>(key) >> 32);
    WordPair words[kVectors];
    vec<float> square[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const uint32_t start = static_cast<uint32_t>(pair) + v * kLanes<float>;
      words[v] = hashed(reinterpret_cast<Words>(lane_index<float>() * 2) + 2u * start, low, high);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Bits steps = reinterpret_cast<Bits>((words[v].first >> 8) + 1u);  // of 2^-24, to 1
      square[v] = minus_twice_log(__builtin_convertvector(steps, vec<float>));
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      // Half turns from −1 to 1, in steps of 2^-23: sin(π s) = ±sin(π (1 − |s|)), cos(π s) = sin(π (1/2 − |s|)).
      const vec<float> s = __builtin_convertvector(reinterpret_cast<Bits>(words[v].second) >> 8, vec<float>) * 0x1p-23f;
      const Words sign = reinterpret_cast<Words>(s) & 0x80000000u;
      const vec<float> size = reinterpret_cast<vec<float>>(reinterpret_cast<Words>(s) ^ sign);
      const Words folded = reinterpret_cast<Words>(smaller(size, 1.0f - size)) | sign;
      const vec<float> length = square_root(square[v]);
      first[v] = length * sine_of_half_turns(0.5f - size);
      second[v] = length * sine_of_half_turns(reinterpret_cast<vec<float>>(folded));
    }
  }

  vec<float> first[kVectors], second[kVectors];
};

}  // namespace anomem::cpu::ANOMEM_ISA
