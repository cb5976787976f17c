// Element types as the kernels see them; no torch here.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace anomem::cpu {

enum class Type { f32, bf16, f64 };

// bfloat16: the upper half of a float.
struct Bfloat16 {
  uint16_t bits;
};

inline float to_float(Bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Round to nearest, ties to even; NaN stays NaN.
inline Bfloat16 to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return {0x7fc0};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// The type sums are kept in, and losses returned in: float for bfloat16.
template <class T>
struct Accumulator {
  using type = T;
};
template <>
struct Accumulator<Bfloat16> {
  using type = float;
};
template <class T>
using accumulator_t = typename Accumulator<T>::type;

inline float widen(float x) { return x; }
inline float widen(Bfloat16 x) { return to_float(x); }
inline double widen(double x) { return x; }

template <class S>
inline S narrow(accumulator_t<S> x) {
  if constexpr (std::is_same_v<S, Bfloat16>) return to_bfloat16(x);
  else return x;
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Row length, in elements of the accumulation type T, of a tile with n columns: whole panels of the widest instruction
// set, and not a multiple of 1 KiB, which would put every row of a tile into the same few sets of the cache.
template <class T>
inline int64_t padded_row(int64_t n) {
  const int64_t padded = round_up(n, 128 / int64_t(sizeof(T)));
  return padded * int64_t(sizeof(T)) % 1024 == 0 ? padded + 64 / int64_t(sizeof(T)) : padded;
}

}  // namespace anomem::cpu

// Calls `function<T>(...)` for the element type named by a `Type`.
#if ANOMEM_BFLOAT16_PAIRS  // an instruction set for that type alone
#define ANOMEM_FOR_TYPE(type, function, ...) return function<::anomem::cpu::Bfloat16>(__VA_ARGS__);
#else
#define ANOMEM_FOR_TYPE(type, function, ...)                                           \
  switch (type) {                                                                      \
    case ::anomem::cpu::Type::f32: return function<float>(__VA_ARGS__);                \
    case ::anomem::cpu::Type::bf16: return function<::anomem::cpu::Bfloat16>(__VA_ARGS__); \
    case ::anomem::cpu::Type::f64: return function<double>(__VA_ARGS__);               \
  }
#endif
