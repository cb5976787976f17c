// Layouts of an augmented image: planes of one channel each, packed pixels of four floats, interleaved channels.
#pragma once

#include "cpu/rows.h"
#include "cpu/simd.h"

namespace anomem::cpu::ANOMEM_ISA {

constexpr int kPacked = 4;  // channels of a packed pixel; those that an image lacks are zero
typedef float Pixel __attribute__((vector_size(4 * kPacked), aligned(4), may_alias));

// A vector whose lane i is f(i).
template <class F>
ANOMEM_INLINE typename Simd<float>::bits lanes_of(F f) {
  typename Simd<float>::bits lanes;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<float>; ++i) lanes[i] = f(i);
  return lanes;
}

// A line of an image's channel as floats in [0, 1].
template <class From>
inline void read_line(const From* from, int64_t stride, int64_t width, float* to) {
  constexpr float unit = std::is_same_v<From, uint8_t> ? 1.0f / 255 : 1.0f;
  if (stride == 1)
    for (int64_t x = 0; x < width; ++x) to[x] = static_cast<float>(from[x]) * unit;
  else
    for (int64_t x = 0; x < width; ++x) to[x] = static_cast<float>(from[x * stride]) * unit;
}

// A line of pixels of three bytes, packed; written in whole groups of four pixels, with zeros after the last.
inline void pack_bytes(const uint8_t* from, int64_t width, float* to) {
  constexpr int kGroup = 4;
  typedef uint8_t Bytes __attribute__((vector_size(4 * kGroup)));
  typedef uint16_t Halves __attribute__((vector_size(8 * kGroup)));  // GCC 12 widens by two at a time
  typedef int32_t Integers __attribute__((vector_size(16 * kGroup)));
  typedef float Floats __attribute__((vector_size(16 * kGroup)));
  const Bytes order = {0, 1, 2, 16, 3, 4, 5, 16, 6, 7, 8, 16, 9, 10, 11, 16};  // 16: zero
  const auto write = [&](Bytes bytes, int64_t x) ANOMEM_ALWAYS {
    const Halves halves = __builtin_convertvector(pick(bytes, Bytes{}, order), Halves);
    const Integers integers = __builtin_convertvector(halves, Integers);
    const Floats pixels = __builtin_convertvector(integers, Floats) * (1.0f / 255);
    std::memcpy(to + x * kPacked, &pixels, sizeof pixels);
  };
  int64_t x = 0;
  for (; x + 6 <= width; x += kGroup) {  // 16 bytes are less than six pixels
    Bytes bytes;
    std::memcpy(&bytes, from + 3 * x, sizeof bytes);
    write(bytes, x);
  }
  for (; x < width; x += kGroup) {
    Bytes bytes{};
    std::memcpy(&bytes, from + 3 * x, 3 * (width - x < kGroup ? width - x : kGroup));
    write(bytes, x);
  }
}

// `lines` are the lines of four channels, `line` apart and as long as whole vectors.
inline void pack_lines(const float* lines, int64_t line, int64_t width, float* to) {
  constexpr int L = kLanes<float>, quarter = L / kPacked;
  for (int64_t x = 0; x < width; x += L) {
    const vec<float> r = load(lines + x), g = load(lines + line + x), b = load(lines + 2 * line + x),
                     other = load(lines + 3 * line + x);
#pragma GCC unroll 4
    for (int part = 0; part < kPacked; ++part) {
      const auto pixel = [&](int i) { return part * quarter + i / kPacked + (i % 2) * L; };
      const vec<float> first = pick(r, g, lanes_of(pixel)), second = pick(b, other, lanes_of(pixel));
      const vec<float> pixels = lanes_of([&](int i) { return i % kPacked / 2; }) == 0 ? first : second;
      const int64_t left = (width - x) * kPacked - part * L;
      if (left > 0) store_some(to + x * kPacked + part * L, pixels, left < L ? left : L);
    }
  }
}

// Writes the first `channels` channels of packed pixels to planes that are `plane` apart. Reads whole vectors of
// pixels.
inline void unpack_pixels(const float* pixels, int64_t width, int channels, float* to, int64_t plane) {
  constexpr int L = kLanes<float>, half = L / 2, quarter = L / kPacked;
  for_vectors<float>(width, [&](int64_t x, int64_t count) ANOMEM_ALWAYS {
    const float* from = pixels + x * kPacked;
    const vec<float> a = load(from), b = load(from + L), c = load(from + 2 * L), d = load(from + 3 * L);
#pragma GCC unroll 4
    for (int channel = 0; channel < kPacked; ++channel) {
      if (channel >= channels) break;
      const auto lane = [&](int i) { return i % half / quarter * L + i % quarter * kPacked + channel; };
      const vec<float> first = pick(a, b, lanes_of(lane)), second = pick(c, d, lanes_of(lane));
      store_some(to + channel * plane + x, lanes_of([&](int i) { return i / half; }) == 0 ? first : second, count);
    }
  });
}

// Three planes, each of `area` values, to pixels of three values.
inline void interleave_three(const float* planes, int64_t area, float* to) {
  constexpr int L = kLanes<float>;
  const float *r = planes, *g = r + area, *b = g + area;
  int64_t i = 0;
  for (; i + L <= area; i += L) {
    const vec<float> red = load(r + i), green = load(g + i), blue = load(b + i);
#pragma GCC unroll 3
    for (int part = 0; part < 3; ++part) {
      const auto pixel = [&](int lane) { return (part * L + lane) / 3 + (part * L + lane) % 3 % 2 * L; };
      const auto last = [&](int lane) { return (part * L + lane) % 3 == 2 ? L + (part * L + lane) / 3 : lane; };
      store(to + 3 * i + part * L, pick(pick(red, green, lanes_of(pixel)), blue, lanes_of(last)));
    }
  }
  for (; i < area; ++i) {
    to[3 * i] = r[i];
    to[3 * i + 1] = g[i];
    to[3 * i + 2] = b[i];
  }
}

}  // namespace anomem::cpu::ANOMEM_ISA
