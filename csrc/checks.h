// What every operator checks and allocates. The Python layer has validated what a user passed; these checks keep a
// direct call through torch.ops from reading outside a tensor.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "cpu/types.h"

namespace anomem {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline cpu::Type type_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return cpu::Type::f32;
    case ScalarType::BFloat16: return cpu::Type::bf16;
    case ScalarType::Double: return cpu::Type::f64;
    default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float64"); return cpu::Type::f32;
  }
}

// float64 for float64, else float32.
inline ScalarType accumulator(cpu::Type type) { return type == cpu::Type::f64 ? ScalarType::Double : ScalarType::Float; }

inline void check_type(const Tensor& tensor, const char* name, ScalarType expected) {
  STD_TORCH_CHECK(tensor.scalar_type() == expected, name, ": wrong dtype");
}

inline void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> expected) {
  bool right = tensor.dim() == int64_t(expected.size());
  int64_t axis = 0;
  for (int64_t size : expected) right = right && tensor.size(axis++) == size;
  STD_TORCH_CHECK(right, name, ": wrong shape");
}

inline void check_contiguous(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

// Uninitialised and contiguous, through torch: deterministic mode fills it.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::empty(
      torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type, std::nullopt,
      torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

// A 0-dim tensor.
inline Tensor scalar(double value, ScalarType type) {
  Tensor tensor = empty({}, type);
  if (type == ScalarType::Double)
    *static_cast<double*>(tensor.mutable_data_ptr()) = value;
  else
    *static_cast<float*>(tensor.mutable_data_ptr()) = float(value);
  return tensor;
}

// The value of a learned 0-dim scalar in the accumulation dtype.
inline double scalar_value(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == 1, name, ": expected a 0-dim tensor");
  if (tensor.scalar_type() == ScalarType::Double) return *tensor.const_data_ptr<double>();
  return *tensor.const_data_ptr<float>();
}

}  // namespace anomem
