// Matrix products by torch's GEMM library. The emulation in tests/cuda has its own version of this file: on the CPU
// torch has no product with a wider result.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>  // TORCH_ERROR_CODE_CHECK; torch 2.11 has no other

#include <array>

namespace anomem::cuda {

// out [m, n] = a [m, k] b [k, n]. `out` may be float32 where the factors are bfloat16 or float16; it then keeps the
// precision of the sums. Float32 factors follow torch.backends.cuda.matmul: TF32 only where the user allows it.
inline void product(const torch::stable::Tensor& out, const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  using torch::stable::detail::from;
  const auto call = [](const char* overload, StableIValue* stack) {
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", overload, stack, TORCH_ABI_VERSION));
    torch::stable::detail::to<torch::stable::Tensor>(stack[0]);  // takes the reference to `out` that came back
  };
  if (out.scalar_type() == a.scalar_type()) {
    std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
    return call("out", stack.data());
  }
  std::array<StableIValue, 4> stack{from(a), from(b), from(out.scalar_type()), from(out)};
  call("dtype_out", stack.data());
}

}  // namespace anomem::cuda
