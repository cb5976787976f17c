// native_downsample_take, native_downsample_add.
#include "cpu/downsample.h"

#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "cpu/operands.h"

namespace anomem::cpu {
namespace {

Tensor take(const Tensor& x) {
  const Type type = type_of(x, "x");
  const MapShape shape = shape_of_map(x, "x");
  Tensor sampled =
      empty_map(shape.batch, shape.channels, shape.sampled_height(), shape.sampled_width(), x.scalar_type());
  if (sampled.numel() > 0) run(DownsampleTake{type, x.const_data_ptr(), shape, sampled.mutable_data_ptr()});
  return sampled;
}

void add(Tensor map, const Tensor& sampled) {
  const Type type = type_of(map, "map");
  const MapShape shape = shape_of_map(map, "map");
  check_device(sampled, "sampled", map);
  check_type(sampled, "sampled", map.scalar_type());
  check_shape(sampled, "sampled", {shape.batch, shape.channels, shape.sampled_height(), shape.sampled_width()});
  check_channels_last(sampled, "sampled");
  if (sampled.numel() > 0) run(DownsampleAdd{type, map.mutable_data_ptr(), shape, sampled.const_data_ptr()});
}

}  // namespace
}  // namespace anomem::cpu

STABLE_TORCH_LIBRARY_IMPL(anomem, CPU, m) {
  m.impl("native_downsample_take", TORCH_BOX(&anomem::cpu::take));
  m.impl("native_downsample_add", TORCH_BOX(&anomem::cpu::add));
}
