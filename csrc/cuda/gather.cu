// native_gather_fwd, native_gather_bwd.
#include <cuda/launch.cuh>
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "operands.h"
#include "scatter.cuh"
#include "take.h"

namespace anomem::cuda {
namespace {

// Number of positions per image, n.
int64_t check_positions(const Tensor& positions, const Tensor& like, int64_t batch) {
  check_like(positions, "positions", like, ScalarType::Long);
  check_contiguous(positions, "positions");
  const bool shared = positions.dim() == 1;
  STD_TORCH_CHECK(shared || (positions.dim() == 2 && positions.size(0) == batch), "positions: expected [n] or [B, n]");
  const int64_t count = positions.size(shared ? 0 : 1);
  STD_TORCH_CHECK(count <= INT32_MAX, "positions: expected fewer than 2^31 for one image");
  return count;
}

std::tuple<Tensor, Tensor> gather_forward(const Tensor& map, const Tensor& positions, bool normalize) {
  STD_TORCH_CHECK(map.dim() == 4, "map: expected [B, C, H, W]");
  const int64_t batch = map.size(0), channels = map.size(1);
  const int64_t count = check_positions(positions, map, batch);
  const DeviceScope scope(map);
  const Tensor out = empty(map, {count, batch, channels});
  const Tensor inv_norm =
      normalize ? empty(map, {count, batch}, ScalarType::Float) : empty(map, {0}, ScalarType::Float);
  with_type_of(map, [&](auto zero) {
    using T = decltype(zero);
    TakeArguments<T> a = take_from<T>(map);
    a.positions = data<int64_t>(positions);
    a.positions_stride = positions.dim() == 1 ? 0 : count;
    a.count = count;
    a.out = writable<T>(out);
    a.out_stride_position = batch * channels;
    a.out_stride_batch = channels;
    a.inv_norm = normalize ? writable<float>(inv_norm) : nullptr;
    a.normalize = normalize ? kL2 : kNone;
    take(scope, a);
  });
  return {out, inv_norm};
}

Tensor gather_backward(const Tensor& dout, const Tensor& out, const Tensor& inv_norm, const Tensor& positions,
                       const std::vector<int64_t>& map_shape, bool channels_last, bool normalize) {
  STD_TORCH_CHECK(map_shape.size() == 4, "map_shape: expected [B, C, H, W]");
  const int64_t batch = map_shape[0], channels = map_shape[1], size = map_shape[2] * map_shape[3];
  const int64_t count = check_positions(positions, dout, batch);
  check_shape(dout, "dout", {count, batch, channels});
  check_contiguous(dout, "dout");
  if (normalize) {
    check_like(out, "out", dout, dout.scalar_type());
    check_shape(out, "out", {count, batch, channels});
    check_contiguous(out, "out");
    check_like(inv_norm, "inv_norm", dout, ScalarType::Float);
    check_shape(inv_norm, "inv_norm", {count, batch});
    check_contiguous(inv_norm, "inv_norm");
  }
  const DeviceScope scope(dout);
  const Tensor dmap = torch::stable::empty(
      {map_shape.data(), map_shape.size()}, dout.scalar_type(), std::nullopt, dout.device(), std::nullopt,
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
  const int64_t sets = positions.dim() == 1 ? 1 : batch;
  const Tensor first = empty(dout, {sets, size}, ScalarType::Int);
  const Tensor latest = empty(dout, {sets, size}, ScalarType::Int);
  const Tensor next = empty(dout, {sets, count}, ScalarType::Int);
  launch<ListPositions>(scope, {data<int64_t>(positions), sets, count, size, writable<int32_t>(first),
                                writable<int32_t>(latest), writable<int32_t>(next)});
  const Tensor dots = empty(dout, {normalize ? count * batch : 0}, ScalarType::Float);
  with_type_of(dout, [&](auto zero) {
    using T = decltype(zero);
    if (normalize) {
      launch<RowDots<T>>(scope, {data<T>(dout), data<T>(out), count * batch, channels, writable<float>(dots)});
    }
    ScatterArguments<T> a{};
    a.dout = data<T>(dout);
    a.out = normalize ? data<T>(out) : nullptr;
    a.inv_norm = data<float>(inv_norm);
    a.dots = data<float>(dots);
    a.first = data<int32_t>(first);
    a.next = data<int32_t>(next);
    a.first_stride = sets == 1 ? 0 : size;
    a.next_stride = sets == 1 ? 0 : count;
    a.batch = batch;
    a.channels = channels;
    a.size = size;
    a.dmap = writable<T>(dmap);
    if (channels_last) {
      launch<ScatterRows<T>>(scope, a);
    } else {
      launch<ScatterPlanes<T>>(scope, a);
    }
  });
  return dmap;
}

}  // namespace
}  // namespace anomem::cuda

STABLE_TORCH_LIBRARY_IMPL(anomem, ANOMEM_KEY, m) {
  m.impl("native_gather_fwd", TORCH_BOX(&anomem::cuda::gather_forward));
  m.impl("native_gather_bwd", TORCH_BOX(&anomem::cuda::gather_backward));
}
