// native_augment.
#include "cpu/augment.h"

#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "cpu/operands.h"

namespace anomem::cpu {
namespace {

Tensor augment(const Tensor& images, const OptionalTensor& matrices, const OptionalTensor& brightness,
               const OptionalTensor& contrast, const OptionalTensor& saturation, const OptionalTensor& blur,
               const OptionalTensor& noise, const OptionalTensor& keys, int64_t views, int64_t radius, int64_t padding,
               bool channels_last) {
  check_shape(images, "images", {Axis("B"), Axis("C", 1), Axis("H", 1), Axis("W", 1)});
  const bool bytes = images.scalar_type() == ScalarType::Byte;
  if (!bytes) check_type(images, "images", ScalarType::Float);
  const int64_t batch = images.size(0), height = images.size(2), width = images.size(3);
  // Places in a packed image are 32-bit.
  if (height > 1 << 14 || width > 1 << 14) refuse("images", "sides of at most 16384 pixels", shape_of(images));
  if (views < 0 || (batch == 0 ? views != 0 : views % batch != 0))
    refuse("views", "a multiple of " + std::to_string(batch), std::to_string(views));
  if (padding < 0 || padding > 2) refuse("padding", "0, 1 or 2", std::to_string(padding));
  const int64_t least = height < width ? height : width;
  if (radius < 0 || radius >= least) refuse("radius", "0 to " + std::to_string(least - 1), std::to_string(radius));
  const auto given = [&](const OptionalTensor& numbers, const char* argument) {
    check_operand(numbers, argument, images, ScalarType::Float, {views});
    return optional_data<float>(numbers);
  };
  check_operand(matrices, "matrices", images, ScalarType::Float, {views, 2, 3});
  check_operand(keys, "keys", images, ScalarType::Long, {views});
  if (noise.has_value() != keys.has_value()) refuse("keys", "keys where there is noise", "one of the two");
  using torch::headeronly::MemoryFormat;
  const int64_t shape[] = {views, images.size(1), height, width};
  Tensor out = torch::stable::empty({shape, 4}, ScalarType::Float, std::nullopt,
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU), std::nullopt,
                                    channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  if (out.numel() == 0) return out;
  run(Augment{Type::kFloat32, map_of(images), bytes, views, static_cast<Padding>(padding), radius,
              optional_data<float>(matrices), given(brightness, "brightness"), given(contrast, "contrast"),
              given(saturation, "saturation"), given(blur, "blur"), given(noise, "noise"), optional_data<int64_t>(keys),
              channels_last, out.mutable_data_ptr<float>()});
  return out;
}

}  // namespace
}  // namespace anomem::cpu

STABLE_TORCH_LIBRARY_IMPL(anomem, CPU, m) { m.impl("native_augment", TORCH_BOX(&anomem::cpu::augment)); }
