// Arguments of the strided sample in a residual block (anomem/reference/downsample.py), on channels-last maps.
// S = element type. The sample has the pixels of even row and column: h = ⌈H/2⌉ and w = ⌈W/2⌉.
#pragma once

#include "cpu/types.h"

namespace anomem::cpu {

struct DownsampleTake {
  Type type;
  const void* x;  // S [B, H, W, C]
  MapShape shape;
  void* sampled;  // S [B, h, w, C]
};

// Adds the sample to the map, at the pixels that it was taken from.
struct DownsampleAdd {
  Type type;
  void* map;  // S [B, H, W, C]
  MapShape shape;
  const void* sampled;  // S [B, h, w, C]
};

}  // namespace anomem::cpu
