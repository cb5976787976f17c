// A feature map as the kernels see it.
#pragma once

#include <cstdint>

namespace anomem::cpu {

// [B, C, H, W] of any strides, in elements.
struct FeatureMap {
  const void* data;
  int64_t batch, channels, height, width;
  int64_t batch_stride, channel_stride, row_stride, column_stride;

  int64_t area() const { return height * width; }

  // Where the vector at flat position h·W + w of an image starts.
  int64_t offset(int64_t image, int64_t position) const {
    return image * batch_stride + position / width * row_stride + position % width * column_stride;
  }
};

}  // namespace anomem::cpu
