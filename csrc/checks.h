// Checks of an operator's tensors, for both devices. The Python layer has validated the user's arguments. These checks
// keep a direct call through torch.ops from reading outside a tensor.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace anomem {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The message of anomem.validation.require.
[[noreturn]] inline void refuse(const char* argument, const std::string& expected, const std::string& received) {
  throw std::runtime_error("`" + std::string(argument) + "`: expected " + expected + ", received " + received);
}

inline std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
    default: return "another dtype";
  }
}

inline std::string device_name(const torch::stable::Device& device) {
  using torch::headeronly::DeviceType;
  if (device.type() == DeviceType::CPU) return "cpu";
  return (device.type() == DeviceType::CUDA ? "cuda:" : "another device:") + std::to_string(device.index());
}

// "[4, 16]", the values of one(axis).
template <class F>
std::string for_axes(const Tensor& tensor, F one) {
  std::string text;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) text += (axis > 0 ? ", " : "") + std::to_string(one(axis));
  return "[" + text + "]";
}

inline std::string shape_of(const Tensor& tensor) {
  return "shape " + for_axes(tensor, [&](int64_t axis) { return tensor.size(axis); });
}

inline std::string strides_of(const Tensor& tensor) {
  return "strides " + for_axes(tensor, [&](int64_t axis) { return tensor.stride(axis); });
}

// One axis of an expected shape: a size, or the letter of an axis with at least `least` elements.
struct Axis {
  const char* letter = nullptr;
  int64_t size = 0;
  int64_t least = 0;

  Axis(int64_t size) : size(size) {}
  Axis(const char* letter, int64_t least = 0) : letter(letter), least(least) {}

  bool accepts(int64_t actual) const { return letter == nullptr ? actual == size : actual >= least; }
};

inline void check_shape(const Tensor& tensor, const char* argument, std::initializer_list<Axis> expected) {
  bool right = tensor.dim() == static_cast<int64_t>(expected.size());
  int64_t index = 0;
  for (const Axis& axis : expected) right = right && axis.accepts(tensor.size(index++));
  if (right) return;
  std::string shape, bounds;
  for (const Axis& axis : expected) {
    const std::string name = axis.letter == nullptr ? std::to_string(axis.size) : axis.letter;
    shape += (shape.empty() ? "" : ", ") + name;
    if (axis.least > 0) bounds += (bounds.empty() ? " with " : ", ") + name + " >= " + std::to_string(axis.least);
  }
  refuse(argument, "[" + shape + "]" + bounds, shape_of(tensor));
}

inline void check_type(const Tensor& tensor, const char* argument, ScalarType expected) {
  if (tensor.scalar_type() != expected) refuse(argument, dtype_name(expected), dtype_name(tensor.scalar_type()));
}

inline void check_contiguous(const Tensor& tensor, const char* argument) {
  if (!tensor.is_contiguous()) refuse(argument, "a contiguous tensor", strides_of(tensor));
}

// Rows may lie apart; the elements of one row are adjacent.
inline void check_unit_stride(const Tensor& tensor, const char* argument) {
  const int64_t last = tensor.dim() - 1, stride = tensor.stride(last);
  if (stride != 1 && tensor.size(last) > 1 && tensor.numel() > 0)
    refuse(argument, "unit stride on the last axis", strides_of(tensor));
}

inline void check_device(const Tensor& tensor, const char* argument, const Tensor& like) {
  if (!(tensor.device() == like.device()))
    refuse(argument, "a tensor on " + device_name(like.device()), device_name(tensor.device()));
}

// A contiguous tensor on the device of `like`.
inline void check_operand(const Tensor& tensor, const char* argument, const Tensor& like, ScalarType type,
                          std::initializer_list<Axis> shape) {
  check_device(tensor, argument, like);
  check_type(tensor, argument, type);
  check_shape(tensor, argument, shape);
  check_contiguous(tensor, argument);
}

inline void check_operand(const OptionalTensor& tensor, const char* argument, const Tensor& like, ScalarType type,
                          std::initializer_list<Axis> shape) {
  if (tensor) check_operand(*tensor, argument, like, type, shape);
}

// A learned scalar: one number.
inline void check_scalar(const OptionalTensor& tensor, const char* argument, const Tensor& like, ScalarType type) {
  if (!tensor) return;
  if (tensor->numel() != 1) refuse(argument, "a 0-dim tensor", shape_of(*tensor));
  check_device(*tensor, argument, like);
  check_type(*tensor, argument, type);
}

inline void check_query(const Tensor& query) {
  check_shape(query, "query", {"N", "d"});
  check_unit_stride(query, "query");
}

// Keys [M, d], values [M, dv] and a learned beta, for queries of d features.
inline void check_memory(const Tensor& queries, int64_t features, const Tensor& keys, const OptionalTensor& values,
                         const OptionalTensor& beta, ScalarType sums, int64_t normalize) {
  check_shape(keys, "keys", {Axis("M", 1), Axis("d", 1)});
  check_operand(keys, "keys", queries, queries.scalar_type(), {"M", features});
  check_operand(values, "values", queries, queries.scalar_type(), {keys.size(0), "dv"});
  check_scalar(beta, "beta", queries, sums);
  if (normalize < 0 || normalize > 2) refuse("normalize", "0, 1 or 2", std::to_string(normalize));
}

inline void check_map(const Tensor& map) { check_shape(map, "map", {"B", "C", "H", "W"}); }

// What a deviation map takes beside its memory: values as wide as the keys, and log_prior [H·W, M].
inline void check_deviation_map(const Tensor& map, const Tensor& keys, const OptionalTensor& values, int64_t distance,
                                const OptionalTensor& log_prior, ScalarType sums) {
  if (values) check_shape(*values, "values", {keys.size(0), keys.size(1)});
  check_operand(log_prior, "log_prior", map, sums, {map.size(2) * map.size(3), keys.size(0)});
  if (distance < 0 || distance > 1) refuse("distance", "0 or 1", std::to_string(distance));
}

// Positions [n], or [B, n] for a batch of images. Returns n.
inline int64_t check_positions(const Tensor& positions, const Tensor& like, int64_t batch) {
  const bool shared = positions.dim() == 1;
  if (!shared && (positions.dim() != 2 || positions.size(0) != batch))
    refuse("positions", "[n] or [" + std::to_string(batch) + ", n]", shape_of(positions));
  check_device(positions, "positions", like);
  check_type(positions, "positions", ScalarType::Long);
  check_contiguous(positions, "positions");
  return positions.size(shared ? 0 : 1);
}

// The gradient dout [n, B, C] of gathered vectors; with `normalize`, what the forward pass left for it.
inline void check_gathered(const Tensor& dout, const Tensor& out, const Tensor& inv_norm, ScalarType sums,
                           int64_t count, int64_t batch, int64_t channels, bool normalize) {
  check_operand(dout, "dout", dout, dout.scalar_type(), {count, batch, channels});
  if (!normalize) return;
  check_operand(out, "out", dout, dout.scalar_type(), {count, batch, channels});
  check_operand(inv_norm, "inv_norm", dout, sums, {count, batch});
}

// Shape [B, C, H, W] of the map to scatter to.
inline void check_map_shape(const std::vector<int64_t>& map_shape) {
  if (map_shape.size() != 4) refuse("map_shape", "[B, C, H, W]", std::to_string(map_shape.size()) + " numbers");
}

// Rows [G, B, d] of the variance hinge.
inline void check_variance(const Tensor& x) {
  check_shape(x, "x", {"G", Axis("B", 2), Axis("d", 1)});
  check_contiguous(x, "x");
}

inline void check_variance_gradient(const Tensor& dloss, const Tensor& x, const Tensor& mean, const Tensor& std,
                                    ScalarType sums) {
  check_variance(x);
  check_operand(dloss, "dloss", x, sums, {x.size(0)});
  check_operand(mean, "mean", x, sums, {x.size(0), x.size(2)});
  check_operand(std, "std", x, sums, {x.size(0), x.size(2)});
}

}  // namespace anomem
