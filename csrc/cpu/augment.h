// Arguments of the augmentation of images (anomem/reference/augment.py).
#pragma once

#include "cpu/types.h"

namespace anomem::cpu {

// Pixels outside of an image. The order is the encoding of anomem/ops/augment.py.
enum class Padding { kZeros, kBorder, kReflection };

struct Augment {
  Type type;          // of the computation and the result: kFloat32
  FeatureMap images;  // uint8 or float [B, C, H, W]
  bool bytes;         // uint8, whose 255 is 1
  int64_t views;      // V, a multiple of B: view v is of image v mod B
  Padding padding;
  int64_t radius;                    // of the blur, below H and W
  Optional<const float> matrices;    // [V, 2, 3]
  Optional<const float> brightness;  // [V]
  Optional<const float> contrast;    // [V]
  Optional<const float> saturation;  // [V]
  Optional<const float> blur;        // [V], standard deviations in pixels
  Optional<const float> noise;       // [V], standard deviations
  Optional<const int64_t> keys;      // [V], given with noise
  bool channels_last;
  float* out;  // [V, C, H, W], or [V, H, W, C] in memory when channels_last
};

}  // namespace anomem::cpu
