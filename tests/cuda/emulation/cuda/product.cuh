// Stands in for csrc/cuda/product.cuh: torch's CPU has no product with a wider result, so the factors are widened.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace anomem::cuda {

// out [m, n] = a [m, k] b [k, n], summed in float32 whatever the dtypes.
inline void product(torch::stable::Tensor out, const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  constexpr auto wide = torch::headeronly::ScalarType::Float;
  torch::stable::copy_(out, torch::stable::matmul(torch::stable::to(a, wide), torch::stable::to(b, wide)));
}

}  // namespace anomem::cuda
