// Torch's side of the variance hinge.
#include "cpu/variance.h"

#include <tuple>

#include "checks.h"
#include "cpu/operators.h"

namespace anomem {
namespace {

cpu::Type check_rows(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) >= 2 && x.size(2) > 0, "x: expected [G, B, d] with B >= 2 and d >= 1");
  check_contiguous(x, "x");
  return type_of(x, "x");
}

std::tuple<Tensor, Tensor, Tensor> variance_fwd(const Tensor& x, double gamma, double eps) {
  const cpu::Type type = check_rows(x);
  const int64_t groups = x.size(0), features = x.size(2);
  const ScalarType sums = accumulator(type);
  Tensor loss = empty({groups}, sums), mean = empty({groups, features}, sums), std = empty({groups, features}, sums);
  cpu::variance_forward({type, x.const_data_ptr(), groups, x.size(1), features, gamma, eps, loss.mutable_data_ptr(),
                         mean.mutable_data_ptr(), std.mutable_data_ptr()});
  return {loss, mean, std};
}

Tensor variance_bwd(const Tensor& dloss, const Tensor& x, const Tensor& mean, const Tensor& std, double gamma) {
  const cpu::Type type = check_rows(x);
  const int64_t groups = x.size(0), features = x.size(2);
  const ScalarType sums = accumulator(type);
  check_shape(dloss, "dloss", {groups});
  check_type(dloss, "dloss", sums);
  check_contiguous(dloss, "dloss");
  for (const Tensor* statistic : {&mean, &std}) {
    check_shape(*statistic, "mean and std", {groups, features});
    check_type(*statistic, "mean and std", sums);
    check_contiguous(*statistic, "mean and std");
  }
  Tensor dx = empty({groups, x.size(1), features}, x.scalar_type());
  cpu::variance_backward({type, dloss.const_data_ptr(), x.const_data_ptr(), mean.const_data_ptr(),
                          std.const_data_ptr(), groups, x.size(1), features, gamma, dx.mutable_data_ptr()});
  return dx;
}

}  // namespace

void register_variance(torch::stable::detail::StableLibrary& library) {
  library.impl("native_variance_fwd", TORCH_BOX(&variance_fwd));
  library.impl("native_variance_bwd", TORCH_BOX(&variance_bwd));
}

}  // namespace anomem
