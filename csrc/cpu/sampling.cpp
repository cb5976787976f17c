// native_gather_fwd, native_gather_bwd, native_variance_fwd, native_variance_bwd.
#include "cpu/sampling.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/operands.h"

namespace anomem::cpu {
namespace {

Positions positions_of(const Tensor& positions, const Tensor& like, int64_t batch, int64_t area) {
  const int64_t count = check_positions(positions, like, batch);
  check_indices(positions, "positions", area);
  return {positions.const_data_ptr<int64_t>(), count, positions.dim() == 2};
}

std::tuple<Tensor, Tensor> gather_forward(const Tensor& map, const Tensor& positions, bool normalize) {
  const Type type = type_of(map, "map");
  const FeatureMap features = map_of(map);
  const Positions sampled = positions_of(positions, map, features.batch, features.area());
  const ScalarType sums = accumulator(type);
  Tensor out = empty({sampled.count, features.batch, features.channels}, map.scalar_type());
  Tensor inv_norm = normalize ? empty({sampled.count, features.batch}, sums) : empty({0}, sums);
  run(Gather{type, features, sampled, normalize, out.mutable_data_ptr(), inv_norm.mutable_data_ptr()});
  return {out, inv_norm};
}

Tensor gather_backward(const Tensor& dout, const Tensor& out, const Tensor& inv_norm, const Tensor& positions,
                       const std::vector<int64_t>& map_shape, bool channels_last, bool normalize) {
  const Type type = type_of(dout, "dout");
  check_map_shape(map_shape);
  const int64_t batch = map_shape[0], channels = map_shape[1], area = map_shape[2] * map_shape[3];
  const Positions sampled = positions_of(positions, dout, batch, area);
  check_gathered(dout, out, inv_norm, accumulator(type), sampled.count, batch, channels, normalize);
  using torch::headeronly::MemoryFormat;
  Tensor dmap = torch::stable::empty({map_shape.data(), map_shape.size()}, dout.scalar_type(), std::nullopt,
                                     torch::stable::Device(torch::headeronly::DeviceType::CPU), std::nullopt,
                                     channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  if (dmap.numel() == 0) return dmap;
  run(Scatter{type, dout.const_data_ptr(), out.const_data_ptr(), inv_norm.const_data_ptr(), sampled, normalize, batch,
              channels, area, channels_last, dmap.mutable_data_ptr()});
  return dmap;
}

std::tuple<Tensor, Tensor, Tensor> variance_forward(const Tensor& x, double gamma, double eps) {
  const Type type = type_of(x, "x");
  check_variance(x);
  const int64_t groups = x.size(0), batch = x.size(1), features = x.size(2);
  const ScalarType sums = accumulator(type);
  Tensor loss = empty({groups}, sums), mean = empty({groups, features}, sums), std = empty({groups, features}, sums);
  run(VarianceForward{type, x.const_data_ptr(), groups, batch, features, gamma, eps, loss.mutable_data_ptr(),
                      mean.mutable_data_ptr(), std.mutable_data_ptr()});
  return {loss, mean, std};
}

Tensor variance_backward(const Tensor& dloss, const Tensor& x, const Tensor& mean, const Tensor& std, double gamma) {
  const Type type = type_of(x, "x");
  check_variance_gradient(dloss, x, mean, std, accumulator(type));
  const int64_t groups = x.size(0), batch = x.size(1), features = x.size(2);
  Tensor dx = empty({groups, batch, features}, x.scalar_type());
  run(VarianceBackward{type, dloss.const_data_ptr(), x.const_data_ptr(), mean.const_data_ptr(), std.const_data_ptr(),
                       groups, batch, features, gamma, dx.mutable_data_ptr()});
  return dx;
}

}  // namespace
}  // namespace anomem::cpu

STABLE_TORCH_LIBRARY_IMPL(anomem, CPU, m) {
  m.impl("native_gather_fwd", TORCH_BOX(&anomem::cpu::gather_forward));
  m.impl("native_gather_bwd", TORCH_BOX(&anomem::cpu::gather_backward));
  m.impl("native_variance_fwd", TORCH_BOX(&anomem::cpu::variance_forward));
  m.impl("native_variance_bwd", TORCH_BOX(&anomem::cpu::variance_backward));
}
