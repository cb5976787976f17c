// Arguments of the 3×3 convolution (anomem/reference/conv3x3.py) of channels-last maps: S = element type.
#pragma once

#include "cpu/types.h"

namespace anomem::cpu {

// y[b, k] = Σ_c x[b, c] * weight[k, c], stride 1, one row and column of zeros around the map. With `transposed` the
// gradient of x: C and K change places, and the taps their order.
struct Conv3x3 {
  Type type;
  const void* x;  // S [B, H, W, C]
  MapShape shape;
  const void* weight;  // S [K, 3, 3, C]; transposed: [C, 3, 3, K]
  int64_t channels_out;
  bool transposed;
  bool direct;  // by products in tiles (conv3x3_direct.h), of bfloat16 alone
  void* y;      // S [B, H, W, K]
};

// The gradient of the weight.
struct Conv3x3Weight {
  Type type;
  const void* x;  // S [B, H, W, C]
  MapShape shape;
  const void* grad;  // S [B, H, W, K]
  int64_t channels_out;
  bool direct;
  void* dweight;  // S [K, 3, 3, C]
};

}  // namespace anomem::cpu
