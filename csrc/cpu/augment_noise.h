// Normal numbers from a key and a counter: the hash and the Box-Muller transform of anomem/reference/augment.py.
#pragma once

#include "cpu/rows.h"
#include "cpu/simd.h"

namespace anomem::cpu::ANOMEM_ISA {

using Words = typename Simd<float>::words;

// A bijection of 32-bit words: multipliers and shifts of "hash-prospector" (Wellons 2018, lowest bias found in 2020).
ANOMEM_INLINE Words mixed(Words x) {
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ (x >> 15)) * 0x735a2d97u;
  return x ^ (x >> 15);
}

ANOMEM_INLINE Words hashed(Words counter, uint32_t low, uint32_t high) { return mixed(mixed(counter ^ low) ^ high); }

// ln u for positive normal numbers: a polynomial on [sqrt(1/2), sqrt(2)) (Cephes), and the exponent.
ANOMEM_INLINE vec<float> log_of_normal(vec<float> u) {
  constexpr float coefficients[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                                    -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                                    2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  using Bits = typename Simd<float>::bits;
  const Bits bits = reinterpret_cast<Bits>(u);
  const Bits exponent = (bits - 0x3f3504f3) >> 23;
  const vec<float> x = reinterpret_cast<vec<float>>(bits - (exponent << 23)) - 1.0f;
  const vec<float> e = __builtin_convertvector(exponent, vec<float>), square = x * x;
  vec<float> power = broadcast(coefficients[0]);
  for (int i = 1; i < 9; ++i) power = multiply_add(power, x, broadcast(coefficients[i]));
  power = power * x * square - e * 2.12194440e-4f - 0.5f * square;
  return x + power + e * 0.693359375f;
}

// sin(π y) for |y| ≤ 1/2: a fit of least relative error, 4e-9 before rounding.
ANOMEM_INLINE vec<float> sine_of_half_turns(vec<float> y) {
  constexpr float coefficients[] = {0.07722012695f, -0.598045173f, 2.550031377f, -5.167706879f, 3.14159258f};
  const vec<float> square = y * y;
  vec<float> power = broadcast(coefficients[0]);
  for (int i = 1; i < 5; ++i) power = multiply_add(power, square, broadcast(coefficients[i]));
  return power * y;
}

struct NormalPair {
  vec<float> first, second;
};

// The normal numbers of pairs `pair`, pair + 1, … of a key.
ANOMEM_INLINE NormalPair normal_pairs(int64_t pair, int64_t key) {
  const uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(static_cast<uint64_t>(key) >> 32);
  const Words counter = (reinterpret_cast<Words>(lane_index<float>()) + static_cast<uint32_t>(pair)) * 2u;
  const Words a = hashed(counter, low, high), b = hashed(counter + 1u, low, high);
  using Bits = typename Simd<float>::bits;
  // (0, 1] in steps of 2^-24.
  const vec<float> uniform = __builtin_convertvector(reinterpret_cast<Bits>((a >> 8) + 1u), vec<float>) * 0x1p-24f;
  const vec<float> radius = square_root(log_of_normal(uniform) * -2.0f);
  // Half turns from −1 to 1, in steps of 2^-23: sin(π s) = ±sin(π (1 − |s|)), cos(π s) = sin(π (1/2 − |s|)).
  const vec<float> s = __builtin_convertvector(reinterpret_cast<Bits>(b) >> 8, vec<float>) * 0x1p-23f;
  const vec<float> size = s < vec<float>{} ? -s : s;
  const vec<float> folded = size > 0.5f ? (s < vec<float>{} ? size - 1.0f : 1.0f - size) : s;
  return {radius * sine_of_half_turns(0.5f - size), radius * sine_of_half_turns(folded)};
}

}  // namespace anomem::cpu::ANOMEM_ISA
