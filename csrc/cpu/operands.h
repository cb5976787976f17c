// From torch's tensors to what the CPU kernels take: types, pointers, allocation.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>  // TORCH_ERROR_CODE_CHECK; torch 2.11 has no other

#include <algorithm>

#include "checks.h"
#include "cpu/library_product.h"
#include "cpu/memory.h"
#include "cpu/nearest.h"
#include "cpu/pages.h"
#include "cpu/scratch.h"
#include "cpu/types.h"

namespace anomem::cpu {

// Scratch memory of `count` numbers in which sums are accumulated.
class Workspace : public Scratch {
 public:
  Workspace(int64_t count, ScalarType sums)
      : Scratch(count * static_cast<int64_t>(sums == ScalarType::Double ? sizeof(double) : sizeof(float))) {}
};

inline Type type_of(const Tensor& tensor, const char* argument) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::kFloat32;
    case ScalarType::BFloat16: return Type::kBfloat16;
    case ScalarType::Double: return Type::kFloat64;
    default: refuse(argument, "float32, bfloat16 or float64", dtype_name(tensor.scalar_type()));
  }
}

// float64 for float64, else float32.
inline ScalarType accumulator(Type type) { return type == Type::kFloat64 ? ScalarType::Double : ScalarType::Float; }

// Uninitialised and contiguous, of at most four axes. By torch's shim itself: torch::stable::empty finds its operator
// by name, which takes longer than the arithmetic of a small call.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[4] = {1, 1, 1, 1};
  const int64_t axes = static_cast<int64_t>(sizes.size());
  const int64_t* const shape = sizes.begin();
  for (int64_t axis = axes - 2; axis >= 0; --axis)
    strides[axis] = strides[axis + 1] * std::max<int64_t>(shape[axis + 1], 1);
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(axes, shape, strides, dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// A result [rows, columns], uninitialised and contiguous. A large one is memory that the process keeps once the tensor
// is gone (scratch.h).
inline Tensor empty_result(int64_t rows, int64_t columns, ScalarType type) {
  constexpr int64_t kLeastKept = int64_t{1} << 20;
  const int64_t size = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
  const int64_t bytes = rows * columns * size;
  if (bytes < kLeastKept) return empty({rows, columns}, type);
  const int64_t shape[] = {rows, columns}, strides[] = {columns, 1};
  return torch::stable::from_blob(take_scratch(bytes), {shape, 2}, {strides, 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), type, give_scratch);
}

// A channels-last map [B, C, H, W], uninitialised; it is B·H·W rows of C channels.
inline Tensor empty_map(int64_t batch, int64_t channels, int64_t height, int64_t width, ScalarType type) {
  const int64_t shape[] = {batch, channels, height, width};
  Tensor map =
      torch::stable::empty({shape, 4}, type, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU),
                           std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  ask_for_huge_pages_if_fresh(map);
  return map;
}

inline void check_channels_last(const Tensor& map, const char* argument) {
  check_shape(map, argument, {"B", Axis("C", 1), "H", "W"});
  const int64_t channels = map.size(1), height = map.size(2), width = map.size(3);
  const int64_t strides[] = {height * width * channels, 1, width * channels, channels};
  for (int axis = 0; axis < 4; ++axis)
    if (map.numel() > 0 && map.size(axis) > 1 && map.stride(axis) != strides[axis])
      refuse(argument, "a channels-last map", strides_of(map));
}

// The shape of a map that must be channels-last.
inline MapShape shape_of_map(const Tensor& map, const char* argument) {
  check_channels_last(map, argument);
  return {map.size(0), map.size(1), map.size(2), map.size(3)};
}

// A 0-dim tensor.
inline Tensor scalar(double value, ScalarType type) {
  Tensor tensor = empty({}, type);
  if (type == ScalarType::Double) *tensor.mutable_data_ptr<double>() = value;
  else *tensor.mutable_data_ptr<float>() = static_cast<float>(value);
  return tensor;
}

// The value of a checked learned scalar, or `otherwise` without one.
inline double value_of(const OptionalTensor& tensor, double otherwise) {
  if (!tensor) return otherwise;
  if (tensor->scalar_type() == ScalarType::Double) return *tensor->const_data_ptr<double>();
  return *tensor->const_data_ptr<float>();
}

template <class T = void>
Optional<const T> optional_data(const OptionalTensor& tensor) {
  if (!tensor) return {false, nullptr};
  return {true, static_cast<const T*>(tensor->const_data_ptr())};
}

inline FeatureMap map_of(const Tensor& map) {
  check_map(map);
  return {map.const_data_ptr(), map.size(0),   map.size(1),   map.size(2),  map.size(3),
          map.stride(0),        map.stride(1), map.stride(2), map.stride(3)};
}

inline Queries queries_of(const Tensor& query) { return {query.const_data_ptr(), query.size(0), query.stride(0)}; }

// Rows [1 or L, N, d] beside the banks [L, M, d] of a memory.
inline BankRows bank_rows_of(const Tensor& rows, const char* argument, const Tensor& banks, const char* of_banks) {
  check_shape(banks, of_banks, {Axis("L", 1), Axis("M", 1), Axis("d", 1)});
  check_operand(banks, of_banks, rows, rows.scalar_type(), {"L", "M", "d"});
  check_shape(rows, argument, {rows.dim() == 3 && rows.size(0) == 1 ? 1 : banks.size(0), "N", banks.size(2)});
  check_unit_stride(rows, argument);
  return {rows.const_data_ptr(), rows.size(0), rows.size(1), rows.stride(0), rows.stride(1)};
}

// Kernels read through an index unchecked, so every value must lie in [0, size).
inline void check_indices(const Tensor& index, const char* argument, int64_t size) {
  const int64_t* values = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.numel(); ++i)
    if (values[i] < 0 || values[i] >= size)
      refuse(argument, "indices from 0 to " + std::to_string(size - 1), std::to_string(values[i]));
}

// The memory of a call whose queries have `features` features.
inline Memory memory_of(const Tensor& queries, int64_t features, const Tensor& keys, const OptionalTensor& values,
                        const OptionalTensor& beta, double scale, int64_t normalize) {
  const Type type = type_of(queries, "query");
  check_memory(queries, features, keys, values, beta, accumulator(type), normalize);
  const int64_t width = values ? values->size(1) : features;
  return {keys.const_data_ptr(),
          optional_data(values),
          keys.size(0),
          features,
          width,
          static_cast<Normalize>(normalize),
          scale * value_of(beta, 1),
          takes_library_products(type, queries.numel() / features, keys.size(0), std::min(features, width))};
}

}  // namespace anomem::cpu
