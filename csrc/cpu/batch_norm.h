// Arguments of batch norm (anomem/reference/batch_norm.py) on channels-last maps, as R = B·H·W rows of C channels.
// S = element type, T = type of sums.
#pragma once

#include "cpu/types.h"

namespace anomem::cpu {

struct BatchNormStatistics {
  Type type;
  const void* x;  // S [R, C]
  int64_t rows, channels;
  void* mean;      // T [C]
  void* variance;  // T [C], biased
};

// y = (x − mean) / sqrt(variance + eps) · weight + bias, then + add, then max(y, 0).
struct Affine {
  const void* mean;             // T [C]
  const void* variance;         // T [C]
  Optional<const void> weight;  // T [C]
  Optional<const void> bias;    // T [C]
  double eps;
  bool relu;
};

struct BatchNormApply {
  Type type;
  const void* x;  // S [R, C]
  int64_t rows, channels;
  Affine affine;
  Optional<const void> add;  // S [R, C]
  void* out;                 // S [R, C]
};

struct BatchNormSums {
  Type type;
  const void* dout;  // S [R, C]
  const void* x;     // S [R, C]
  int64_t rows, channels;
  Affine affine;
  Optional<const void> out;  // S [R, C]: where it is positive the ReLU passes; without it y is made again
  void* constant;            // T [C], Σ g, g = dout where the ReLU passes
  void* along;               // T [C], Σ g · (x − mean) / sqrt(variance + eps)
};

struct BatchNormGradient {
  Type type;
  const void* dout;  // S [R, C]
  const void* x;     // S [R, C]
  int64_t rows, channels;
  Affine affine;
  Optional<const void> out;  // as in BatchNormSums
  const void* constant;      // T [C], over all rows that were normalised together
  const void* along;         // T [C], likewise
  int64_t count;             // of those rows
  void* dx;                  // S [R, C]
  Optional<void> dadd;       // S [R, C], g
};

}  // namespace anomem::cpu
