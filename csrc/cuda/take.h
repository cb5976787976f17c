// Taking rows from a map: the arguments, and the choice between TakeRows and TakePlanes.
#pragma once

#include <cuda/launch.cuh>

#include "operands.h"
#include "take.cuh"

namespace anomem::cuda {

template <class T>
void take(const DeviceScope& scope, const TakeArguments<T>& arguments) {
  if (arguments.stride_channel == 1) return launch<TakeRows<T>>(scope, arguments);
  launch<TakePlanes<T>>(scope, arguments);
}

// Arguments of a take from a map [B, C, H, W]. The caller fills in positions and output.
template <class T>
TakeArguments<T> take_from(const Tensor& map) {
  TakeArguments<T> a{};
  a.map = data<T>(map);
  a.batch = map.size(0);
  a.channels = map.size(1);
  a.width = map.size(3);
  a.size = map.size(2) * map.size(3);
  a.stride_batch = map.stride(0);
  a.stride_channel = map.stride(1);
  a.stride_height = map.stride(2);
  a.stride_width = map.stride(3);
  return a;
}

// norm(x) of rows [N, d] with unit inner stride, into y [N, d].
template <class T>
void normalize_rows(const DeviceScope& scope, const Tensor& x, const Tensor& y, int normalize) {
  TakeArguments<T> a{};
  a.map = data<T>(x);
  a.batch = 1;
  a.channels = x.size(1);
  a.width = a.size = a.count = x.size(0);
  a.stride_channel = 1;
  a.stride_width = x.stride(0);
  a.out = writable<T>(y);
  a.out_stride_position = a.channels;
  a.normalize = normalize;
  launch<TakeRows<T>>(scope, a);
}

}  // namespace anomem::cuda
