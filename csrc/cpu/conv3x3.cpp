// native_conv3x3, native_conv3x3_weight, native_conv3x3_direct.
#include "cpu/conv3x3.h"

#include <torch/csrc/stable/library.h>

#include <cstring>

#include "cpu/isa.h"
#include "cpu/library_product.h"
#include "cpu/operands.h"

namespace anomem::cpu {
namespace {

// Whether a convolution is a direct one: products in tiles take less time than transforms.
bool is_direct(Type type) { return type == Type::kBfloat16 && multiplies_in_tiles(); }

Tensor convolve(const Tensor& x, const Tensor& weight, bool transposed) {
  const Type type = type_of(x, "x");
  const MapShape shape = shape_of_map(x, "x");
  check_device(weight, "weight", x);
  check_type(weight, "weight", x.scalar_type());
  if (transposed) check_shape(weight, "weight", {shape.channels, Axis("C", 1), 3, 3});
  else check_shape(weight, "weight", {Axis("K", 1), shape.channels, 3, 3});
  check_channels_last(weight, "weight");
  const int64_t channels_out = weight.size(transposed ? 1 : 0);
  Tensor y = empty_map(shape.batch, channels_out, shape.height, shape.width, x.scalar_type());
  if (y.numel() > 0)
    run(Conv3x3{type, x.const_data_ptr(), shape, weight.const_data_ptr(), channels_out, transposed, is_direct(type),
                y.mutable_data_ptr()});
  return y;
}

Tensor gradient_of_weight(const Tensor& x, const Tensor& grad) {
  const Type type = type_of(x, "x");
  const MapShape shape = shape_of_map(x, "x");
  check_device(grad, "grad", x);
  check_type(grad, "grad", x.scalar_type());
  check_shape(grad, "grad", {shape.batch, Axis("K", 1), shape.height, shape.width});
  check_channels_last(grad, "grad");
  Tensor dweight = empty_map(grad.size(1), shape.channels, 3, 3, x.scalar_type());
  if (x.numel() == 0 || grad.numel() == 0) {
    std::memset(dweight.mutable_data_ptr(), 0, dweight.numel() * dweight.element_size());
    return dweight;
  }
  run(Conv3x3Weight{type, x.const_data_ptr(), shape, grad.const_data_ptr(), grad.size(1), is_direct(type),
                    dweight.mutable_data_ptr()});
  return dweight;
}

// For Python: whether the forward pass of such maps is as exact as a direct convolution's.
bool tells_direct(const Tensor& x) { return is_direct(type_of(x, "x")); }

}  // namespace
}  // namespace anomem::cpu

STABLE_TORCH_LIBRARY_IMPL(anomem, CPU, m) {
  m.impl("native_conv3x3", TORCH_BOX(&anomem::cpu::convolve));
  m.impl("native_conv3x3_direct", TORCH_BOX(&anomem::cpu::tells_direct));
  m.impl("native_conv3x3_weight", TORCH_BOX(&anomem::cpu::gradient_of_weight));
}
