// Element types, sizes and feature maps of the kernels, without torch.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace anomem::cpu {

enum class Type { kFloat32, kBfloat16, kFloat64 };

// bfloat16: the upper half of a float.
struct Bfloat16 {
  uint16_t bits;
};

inline float to_float(Bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Round to nearest, ties to even; NaN stays NaN.
inline Bfloat16 to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// The type of sums and losses: float for bfloat16.
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

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Row stride, in elements of the accumulation type T, of a tile with n columns. It is whole panels of the widest
// instruction set, and no multiple of 1 KiB: such rows would all fall into the same few sets of the cache.
template <class T>
inline int64_t padded_stride(int64_t n) {
  const int64_t padded = round_up(n, 128 / static_cast<int64_t>(sizeof(T)));
  return padded * static_cast<int64_t>(sizeof(T)) % 1024 == 0 ? padded + 64 / static_cast<int64_t>(sizeof(T)) : padded;
}

// Whether the kernel of these arguments multiplies float32 rows in pairs of bfloat16 too, where a processor can: to
// find candidates (candidates.h).
template <class Arguments>
constexpr bool kRoughProducts = false;

// A pointer argument that may be absent. Presence is a flag of its own, because an empty tensor's pointer may be null.
template <class T>
struct Optional {
  bool given;
  T* data;
};

// The shape of a channels-last map. Its strided sample has the pixels of even row and column.
struct MapShape {
  int64_t batch, channels, height, width;

  int64_t sampled_height() const { return (height + 1) / 2; }
  int64_t sampled_width() const { return (width + 1) / 2; }
};

// A feature map [B, C, H, W] with any strides, counted in elements.
struct FeatureMap {
  const void* data;
  int64_t batch, channels, height, width;
  int64_t batch_stride, channel_stride, height_stride, width_stride;

  int64_t area() const { return height * width; }

  // Offset of the vector at flat position h·W + w of an image.
  int64_t offset(int64_t image, int64_t position) const {
    return image * batch_stride + position / width * height_stride + position % width * width_stride;
  }
};

}  // namespace anomem::cpu
