// native_variance_fwd, native_variance_bwd.
#include <cuda/launch.cuh>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "operands.h"
#include "variance.cuh"

namespace anomem::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> variance_forward(const Tensor& x, double gamma, double eps) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) >= 2 && x.size(2) >= 1, "x: expected [G, B, d] with B ≥ 2, d ≥ 1");
  check_contiguous(x, "x");
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
  STD_TORCH_CHECK(x.dim() == 3, "x: expected [G, B, d]");
  const int64_t groups = x.size(0), batch = x.size(1), features = x.size(2);
  check_contiguous(x, "x");
  check_like(dloss, "dloss", x, ScalarType::Float);
  check_shape(dloss, "dloss", {groups});
  check_contiguous(dloss, "dloss");
  for (const Tensor* moment : {&mean, &std}) {
    check_like(*moment, "mean, std", x, ScalarType::Float);
    check_shape(*moment, "mean, std", {groups, features});
    check_contiguous(*moment, "mean, std");
  }
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
  m.impl("native_variance_fwd", TORCH_BOX(&anomem::cuda::variance_forward));
  m.impl("native_variance_bwd", TORCH_BOX(&anomem::cuda::variance_backward));
}
