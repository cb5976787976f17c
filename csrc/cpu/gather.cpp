// Torch's side of the gather of sampled positions and its gradient.
#include "cpu/gather.h"

#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/operators.h"
#include "map_checks.h"

namespace anomem {
namespace {

cpu::Positions positions_of(const Tensor& positions, int64_t batch, int64_t area) {
  const bool per_image = positions.dim() == 2;
  STD_TORCH_CHECK(positions.dim() == 1 || (per_image && positions.size(0) == batch),
                  "positions: expected [n] or [B, n]");
  check_type(positions, "positions", ScalarType::Long);
  check_contiguous(positions, "positions");
  const int64_t* data = positions.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < positions.numel(); ++i)
    STD_TORCH_CHECK(data[i] >= 0 && data[i] < area, "positions: index out of range");
  return {data, positions.size(positions.dim() - 1), per_image};
}

std::tuple<Tensor, Tensor> gather_fwd(const Tensor& map, const Tensor& positions, bool normalize) {
  const cpu::Type type = type_of(map, "map");
  const cpu::FeatureMap features = map_of(map);
  const cpu::Positions sampled = positions_of(positions, features.batch, features.area());
  const ScalarType sums = accumulator(type);
  Tensor out = empty({sampled.count, features.batch, features.channels}, map.scalar_type());
  Tensor inv_norm = normalize ? empty({sampled.count, features.batch}, sums) : empty({0}, sums);
  cpu::gather({type, features, sampled, normalize, out.mutable_data_ptr(), inv_norm.mutable_data_ptr()});
  return {out, inv_norm};
}

Tensor gather_bwd(const Tensor& dout, const Tensor& out, const Tensor& inv_norm, const Tensor& positions,
                  std::vector<int64_t> map_shape, bool channels_last, bool normalize) {
  const cpu::Type type = type_of(dout, "dout");
  STD_TORCH_CHECK(map_shape.size() == 4, "map_shape: expected B, C, H, W");
  const int64_t batch = map_shape[0], channels = map_shape[1], area = map_shape[2] * map_shape[3];
  const cpu::Positions sampled = positions_of(positions, batch, area);
  for (const Tensor* vectors : {&dout, &out}) {
    check_shape(*vectors, "dout and out", {sampled.count, batch, channels});
    check_type(*vectors, "dout and out", dout.scalar_type());
    check_contiguous(*vectors, "dout and out");
  }
  if (normalize) {
    check_shape(inv_norm, "inv_norm", {sampled.count, batch});
    check_type(inv_norm, "inv_norm", accumulator(type));
    check_contiguous(inv_norm, "inv_norm");
  }
  using torch::headeronly::MemoryFormat;
  Tensor dmap = torch::stable::empty(map_shape, dout.scalar_type(), std::nullopt,
                                     torch::stable::Device(torch::headeronly::DeviceType::CPU), std::nullopt,
                                     channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  if (dmap.numel() == 0) return dmap;
  cpu::scatter({type, dout.const_data_ptr(), out.const_data_ptr(), inv_norm.const_data_ptr(), sampled, normalize,
                batch, channels, area, channels_last, dmap.mutable_data_ptr()});
  return dmap;
}

}  // namespace

void register_gather(torch::stable::detail::StableLibrary& library) {
  library.impl("native_gather_fwd", TORCH_BOX(&gather_fwd));
  library.impl("native_gather_bwd", TORCH_BOX(&gather_bwd));
}

}  // namespace anomem
