// native_gather_fwd, native_gather_bwd, native_variance_fwd, native_variance_bwd.
#include <cuda/launch.cuh>
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "operands.h"
#include "scatter.cuh"
#include "sampling_variance.cuh"

namespace anomem::cuda {
namespace {

// Positions per image, n. The lists of scatter.cuh hold them as 32-bit numbers.
int64_t position_count(const Tensor& positions, const Tensor& like, int64_t batch) {
  const int64_t count = check_positions(positions, like, batch);
  if (count > INT32_MAX) refuse("positions", "fewer than 2^31 for one image", std::to_string(count));
  return count;
}

std::tuple<Tensor, Tensor> gather_forward(const Tensor& map, const Tensor& positions, bool normalize) {
  check_map(map);
  check_element_type(map, "map");
  const int64_t batch = map.size(0), channels = map.size(1);
  const int64_t count = position_count(positions, map, batch);
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
  check_element_type(dout, "dout");
  check_map_shape(map_shape);
  const int64_t batch = map_shape[0], channels = map_shape[1], size = map_shape[2] * map_shape[3];
  const int64_t count = position_count(positions, dout, batch);
  check_gathered(dout, out, inv_norm, ScalarType::Float, count, batch, channels, normalize);
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

std::tuple<Tensor, Tensor, Tensor> variance_forward(const Tensor& x, double gamma, double eps) {
  check_variance(x);
  check_element_type(x, "x");
  const DeviceScope scope(x);
  const int64_t groups = x.size(0), batch = x.size(1), features = x.size(2);
  const Tensor loss = empty(x, {groups}, ScalarType::Float);
  const Tensor mean = empty(x, {groups, features}, ScalarType::Float);
  const Tensor std = empty(x, {groups, features}, ScalarType::Float);
  const int64_t splits = ceil_div(batch, kRowsPerSplit);
  const Tensor pivot = empty(x, {groups, features}, ScalarType::Float);
  const Tensor split_mean = empty(x, {splits, groups, features}, ScalarType::Float);
  const Tensor split_square = empty(x, {splits, groups, features}, ScalarType::Float);
  with_type_of(x, [&](auto zero) {
    using T = decltype(zero);
    launch<VarianceMoments<T>>(
        scope, {data<T>(x), groups, batch, features, writable<float>(pivot), writable<float>(split_mean),
                writable<float>(split_square)});
  });
  launch<VarianceLoss>(scope, {data<float>(pivot), data<float>(split_mean), data<float>(split_square), groups, batch,
                               features, static_cast<float>(gamma), static_cast<float>(eps), writable<float>(loss),
                               writable<float>(mean), writable<float>(std)});
  return {loss, mean, std};
}

Tensor variance_backward(const Tensor& dloss, const Tensor& x, const Tensor& mean, const Tensor& std, double gamma) {
  check_variance_gradient(dloss, x, mean, std, ScalarType::Float);
  check_element_type(x, "x");
  const int64_t groups = x.size(0), batch = x.size(1), features = x.size(2);
  const DeviceScope scope(x);
  const Tensor dx = empty(x, {groups, batch, features});
  with_type_of(x, [&](auto zero) {
    using T = decltype(zero);
    launch<VarianceBackward<T>>(scope, {data<float>(dloss), data<T>(x), data<float>(mean), data<float>(std), groups,
                                        batch, features, static_cast<float>(gamma), writable<T>(dx)});
  });
  return dx;
}

}  // namespace
}  // namespace anomem::cuda

STABLE_TORCH_LIBRARY_IMPL(anomem, ANOMEM_KEY, m) {
  m.impl("native_gather_fwd", TORCH_BOX(&anomem::cuda::gather_forward));
  m.impl("native_gather_bwd", TORCH_BOX(&anomem::cuda::gather_backward));
  m.impl("native_variance_fwd", TORCH_BOX(&anomem::cuda::variance_forward));
  m.impl("native_variance_bwd", TORCH_BOX(&anomem::cuda::variance_backward));
}
