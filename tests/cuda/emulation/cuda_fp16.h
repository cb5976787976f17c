// Stands in for CUDA's header of this name: half precision with conversions that round to nearest even.
#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const float sign = x.bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
}

inline __half __float2half_rn(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (size != size) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to infinity
  if (size == 0) return {sign};
  int exponent = 0;
  std::frexp(size, &exponent);  // size = f · 2^exponent, f in [1/2, 1)
  const int step = exponent < -13 ? -24 : exponent - 11;  // of the last place, as a power of two
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, -step)));
  // A fraction that rounds up to the next power of two carries into the exponent by itself.
  const uint32_t bits = step == -24 ? units : (static_cast<uint32_t>(step + 25) << 10) + units - 1024;
  return {static_cast<uint16_t>(sign | bits)};
}
