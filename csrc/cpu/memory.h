// A memory as the kernels see it.
#pragma once

#include "cpu/types.h"

namespace anomem::cpu {

// The order is the encoding of anomem/ops/retrieve.py.
enum class Normalize { none, layer, l2 };

struct Memory {
  Type type;
  const void* keys;      // [M, d]
  const void* values;    // [M, dv], or null: V = norm(K)
  int64_t prototypes;    // M
  int64_t features;      // d
  int64_t value_features;  // dv; d without values
  Normalize normalize;
  double beta;
};

}  // namespace anomem::cpu
