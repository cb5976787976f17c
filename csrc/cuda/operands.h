// From torch's tensors to what the CUDA kernels take: element types, pointers, views, allocation.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>

#include "checks.h"

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

}  // namespace anomem::cuda
