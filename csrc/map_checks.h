// What the operators that read a feature map have in common: its checks.
#pragma once

#include "checks.h"
#include "cpu/feature_map.h"

namespace anomem {

inline cpu::FeatureMap map_of(const Tensor& map) {
  STD_TORCH_CHECK(map.dim() == 4, "map: expected [B, C, H, W]");
  return {map.const_data_ptr(), map.size(0),   map.size(1),   map.size(2),  map.size(3),
          map.stride(0),        map.stride(1), map.stride(2), map.stride(3)};
}

}  // namespace anomem
