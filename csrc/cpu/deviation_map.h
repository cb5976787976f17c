// Arguments of the deviation map (anomem/reference/deviation_map.py). T = type of sums.
#pragma once

#include "cpu/memory.h"
#include "cpu/types.h"

namespace anomem::cpu {

// The order is the encoding of anomem/ops/deviation_map.py.
enum class Distance { kCosine, kEuclidean };

struct DeviationMap {
  Type type;
  Memory memory;
  FeatureMap map;
  Distance distance;
  Optional<const void> log_prior;  // T [H·W, M]
  void* out;                       // T [B, H, W]
};

}  // namespace anomem::cpu
