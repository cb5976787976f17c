// The choice between the two ways to take rows out of a map.
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
