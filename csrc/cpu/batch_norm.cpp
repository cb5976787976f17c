// native_batch_norm_statistics, native_batch_norm_apply, native_batch_norm_sums, native_batch_norm_gradient.
#include "cpu/batch_norm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/isa.h"
#include "cpu/operands.h"

namespace anomem::cpu {
namespace {

void check_map_like(const Tensor& map, const char* argument, const Tensor& x) {
  check_device(map, argument, x);
  check_type(map, argument, x.scalar_type());
  check_shape(map, argument, {x.size(0), x.size(1), x.size(2), x.size(3)});
  check_channels_last(map, argument);
}

void check_map_like(const OptionalTensor& map, const char* argument, const Tensor& x) {
  if (map) check_map_like(*map, argument, x);
}

int64_t rows_of(const Tensor& x) { return x.size(0) * x.size(2) * x.size(3); }

Tensor map_like(const Tensor& x) { return empty_map(x.size(0), x.size(1), x.size(2), x.size(3), x.scalar_type()); }

Affine affine_of(const Tensor& x, const Tensor& mean, const Tensor& variance, const OptionalTensor& weight,
                 const OptionalTensor& bias, double eps, bool relu) {
  const ScalarType sums = accumulator(type_of(x, "x"));
  const Axis channels(x.size(1));
  check_operand(mean, "mean", x, sums, {channels});
  check_operand(variance, "variance", x, sums, {channels});
  check_operand(weight, "weight", x, sums, {channels});
  check_operand(bias, "bias", x, sums, {channels});
  return {mean.const_data_ptr(), variance.const_data_ptr(), optional_data(weight), optional_data(bias), eps, relu};
}

std::tuple<Tensor, Tensor> statistics(const Tensor& x) {
  const Type type = type_of(x, "x");
  check_channels_last(x, "x");
  if (rows_of(x) == 0) refuse("x", "at least one row", shape_of(x));
  const ScalarType sums = accumulator(type);
  Tensor mean = empty({x.size(1)}, sums), variance = empty({x.size(1)}, sums);
  run(BatchNormStatistics{type, x.const_data_ptr(), rows_of(x), x.size(1), mean.mutable_data_ptr(),
                          variance.mutable_data_ptr()});
  return {mean, variance};
}

Tensor apply(const Tensor& x, const Tensor& mean, const Tensor& variance, const OptionalTensor& weight,
             const OptionalTensor& bias, const OptionalTensor& add, double eps, bool relu) {
  const Type type = type_of(x, "x");
  check_channels_last(x, "x");
  check_map_like(add, "add", x);
  Tensor out = map_like(x);
  if (out.numel() == 0) return out;
  run(BatchNormApply{type, x.const_data_ptr(), rows_of(x), x.size(1),
                     affine_of(x, mean, variance, weight, bias, eps, relu), optional_data(add),
                     out.mutable_data_ptr()});
  return out;
}

std::tuple<Tensor, Tensor> sums(const Tensor& dout, const Tensor& x, const OptionalTensor& out, const Tensor& mean,
                                const Tensor& variance, const OptionalTensor& weight, const OptionalTensor& bias,
                                double eps, bool relu) {
  const Type type = type_of(x, "x");
  check_channels_last(x, "x");
  check_map_like(dout, "dout", x);
  check_map_like(out, "out", x);
  Tensor constant = empty({x.size(1)}, accumulator(type)), along = empty({x.size(1)}, accumulator(type));
  run(BatchNormSums{type, dout.const_data_ptr(), x.const_data_ptr(), rows_of(x), x.size(1),
                    affine_of(x, mean, variance, weight, bias, eps, relu), optional_data(out),
                    constant.mutable_data_ptr(), along.mutable_data_ptr()});
  return {constant, along};
}

std::tuple<Tensor, Tensor> gradient(const Tensor& dout, const Tensor& x, const OptionalTensor& out, const Tensor& mean,
                                    const Tensor& variance, const OptionalTensor& weight, const OptionalTensor& bias,
                                    const Tensor& constant, const Tensor& along, int64_t count, double eps, bool relu,
                                    bool add) {
  const Type type = type_of(x, "x");
  check_channels_last(x, "x");
  check_map_like(dout, "dout", x);
  check_map_like(out, "out", x);
  const Affine affine = affine_of(x, mean, variance, weight, bias, eps, relu);
  check_operand(constant, "constant", x, accumulator(type), {x.size(1)});
  check_operand(along, "along", x, accumulator(type), {x.size(1)});
  Tensor dx = map_like(x), dadd = add ? map_like(x) : empty({0}, x.scalar_type());
  if (dx.numel() == 0) return {dx, dadd};
  run(BatchNormGradient{type,
                        dout.const_data_ptr(),
                        x.const_data_ptr(),
                        rows_of(x),
                        x.size(1),
                        affine,
                        optional_data(out),
                        constant.const_data_ptr(),
                        along.const_data_ptr(),
                        count,
                        dx.mutable_data_ptr(),
                        {add, dadd.mutable_data_ptr()}});
  return {dx, dadd};
}

}  // namespace
}  // namespace anomem::cpu

STABLE_TORCH_LIBRARY_IMPL(anomem, CPU, m) {
  m.impl("native_batch_norm_statistics", TORCH_BOX(&anomem::cpu::statistics));
  m.impl("native_batch_norm_apply", TORCH_BOX(&anomem::cpu::apply));
  m.impl("native_batch_norm_sums", TORCH_BOX(&anomem::cpu::sums));
  m.impl("native_batch_norm_gradient", TORCH_BOX(&anomem::cpu::gradient));
}
