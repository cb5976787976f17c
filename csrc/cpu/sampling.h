// Arguments of the sampling operators (anomem/reference/sampling.py): the gather of positions with optional L2
// normalisation, its scatter, and the variance hinge. S = element type, T = type of sums.
#pragma once

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
  void* out;       // S [n, B, C]
  void* inv_norm;  // T [n, B], with normalize only
};

struct Scatter {
  Type type;
  const void* dout;      // S [n, B, C]
  const void* out;       // S [n, B, C], the normalised vectors
  const void* inv_norm;  // T [n, B], with normalize only
  Positions positions;
  bool normalize;
  int64_t batch, channels, area;
  bool channels_last;
  void* dmap;  // S [B, C, area], or [B, area, C] in memory when channels_last
};

struct VarianceForward {
  Type type;
  const void* x;                    // S [G, B, d]
  int64_t groups, batch, features;  // G, B ≥ 2, d
  double gamma, eps;
  void* loss;  // T [G]
  void* mean;  // T [G, d]
  void* std;   // T [G, d], sqrt(var + eps)
};

struct VarianceBackward {
  Type type;
  const void* dloss;  // T [G]
  const void* x;      // S [G, B, d]
  const void* mean;   // T [G, d]
  const void* std;    // T [G, d]
  int64_t groups, batch, features;
  double gamma;
  void* dx;  // S [G, B, d]
};

}  // namespace anomem::cpu
