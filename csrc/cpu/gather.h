// Gather of sampled positions with optional L2 normalisation, and its scatter (anomem/reference/positions.py).
#pragma once

#include "cpu/feature_map.h"
#include "cpu/isa.h"
#include "cpu/types.h"

namespace anomem::cpu {

struct Positions {
  const int64_t* data;  // [n] or [B, n], flat indices h·W + w
  int64_t count;        // n
  bool per_image;

  const int64_t* of(int64_t image) const { return per_image ? data + image * count : data; }
};

struct Gather {
  Type type;
  FeatureMap map;
  Positions positions;
  bool normalize;
  void* out;       // [n, B, C]
  void* inv_norm;  // [n, B], or null
};

struct Scatter {
  Type type;
  const void* dout;      // [n, B, C]
  const void* out;       // [n, B, C], the normalised vectors
  const void* inv_norm;  // [n, B]
  Positions positions;
  bool normalize;
  int64_t batch, channels, area;
  bool channels_last;
  void* dmap;  // [B, C, area], or [B, area, C] in memory when channels_last
};

ANOMEM_KERNEL(gather, Gather, type)
ANOMEM_KERNEL(scatter, Scatter, type)

}  // namespace anomem::cpu
