// The deviation map of inference (anomem/reference/deviation.py).
#pragma once

#include "cpu/isa.h"
#include "cpu/memory.h"

namespace anomem::cpu {

// The order is the encoding of anomem/ops/inference.py.
enum class Distance { cosine, l2 };

// A feature map [B, C, H, W] of any strides, in elements.
struct FeatureMap {
  const void* data;
  int64_t batch, channels, height, width;
  int64_t batch_stride, channel_stride, row_stride, column_stride;

  // Where the vector at flat position h·W + w of an image starts.
  int64_t offset(int64_t image, int64_t position) const {
    return image * batch_stride + position / width * row_stride + position % width * column_stride;
  }
};

struct DeviationMap {
  Memory memory;
  FeatureMap map;
  Distance distance;
  const void* log_prior;  // [H·W, M], or null
  void* out;              // [B, H, W]
};

ANOMEM_KERNEL(deviation_map, DeviationMap)

}  // namespace anomem::cpu
