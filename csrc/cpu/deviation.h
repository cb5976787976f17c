// The deviation map of inference (anomem/reference/deviation.py).
#pragma once

#include "cpu/feature_map.h"
#include "cpu/isa.h"
#include "cpu/memory.h"

namespace anomem::cpu {

// The order is the encoding of anomem/ops/inference.py.
enum class Distance { cosine, l2 };

struct DeviationMap {
  Memory memory;
  FeatureMap map;
  Distance distance;
  const void* log_prior;  // [H·W, M], or null
  void* out;              // [B, H, W]
};

ANOMEM_KERNEL(deviation_map, DeviationMap, memory.type)

}  // namespace anomem::cpu
