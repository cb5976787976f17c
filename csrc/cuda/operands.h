// From torch's tensors to what the CUDA kernels take: element types, pointers, views, allocation, and the arguments of
// a take (take.cuh).
#pragma once

#include <cuda/launch.cuh>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>

#include "checks.h"
#include "take.cuh"

namespace anomem::cuda {

inline void check_element_type(const Tensor& tensor, const char* argument) {
  const ScalarType type = tensor.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::BFloat16 && type != ScalarType::Half)
    refuse(argument, "float32, bfloat16 or float16", dtype_name(type));
}

// Calls f with a value of the tensor's element type.
template <class F>
void with_type_of(const Tensor& tensor, F f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{});
    case ScalarType::Half: return f(__half{});
    default: return check_element_type(tensor, "tensor");
  }
}

// A contiguous tensor on the device of `like`, of its dtype unless another is given.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, std::optional<ScalarType> type = {}) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, type);
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
const T* data(const OptionalTensor& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

template <class T>
T* writable(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Rows start … start + count of a tensor, as a view.
inline Tensor rows(Tensor tensor, int64_t start, int64_t count) {
  return torch::stable::narrow(tensor, 0, start, count);
}

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// TakeRows for adjacent channels, else TakePlanes.
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
