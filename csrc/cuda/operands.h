// What the CUDA operators check, allocate and dispatch on. The Python layer has validated what a user passed; these
// checks keep a direct call through torch.ops from reading outside of a tensor.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>

namespace anomem::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls f with a value of the tensor's element type.
template <class F>
void with_type_of(const Tensor& tensor, F f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{});
    case ScalarType::Half: return f(__half{});
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16 on CUDA");
  }
}

inline void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> expected) {
  bool right = tensor.dim() == static_cast<int64_t>(expected.size());
  int64_t axis = 0;
  for (const int64_t size : expected) right = right && tensor.size(axis++) == size;
  STD_TORCH_CHECK(right, name, ": wrong shape");
}

inline void check_like(const Tensor& tensor, const char* name, const Tensor& like, ScalarType type) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": wrong dtype");
  STD_TORCH_CHECK(tensor.device() == like.device(), name, ": on another device");
}

inline void check_contiguous(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

// A contiguous tensor on the device of `like`: of its dtype, or of another.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, std::optional<ScalarType> type = {}) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, type);
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
const T* data(const std::optional<Tensor>& tensor) {
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
