// Stands in for csrc/cuda/launch.cuh: runs a kernel body on CPU tensors in the emulation.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#define ANOMEM_KEY CPU

namespace anomem::cuda {

// Small, so that small problems have several chunks.
constexpr int64_t kScratchBytes = 64 << 10;
// Fewer than most kernels want, so that blocks stride over their items; a prime, so that they do so unevenly.
constexpr int64_t kMaxBlocks = 7;

class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor&) : grad_(aoti_torch_grad_mode_is_enabled()) {
    aoti_torch_grad_mode_set_enabled(false);
    const char* wanted = std::getenv("ANOMEM_EMULATION_ORDER");
    const bool backward = wanted != nullptr && *wanted == 'b';
    emulation::order = backward ? emulation::Order::kBackward : emulation::Order::kForward;
  }
  ~DeviceScope() { aoti_torch_grad_mode_set_enabled(grad_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  bool grad_;
};

template <class Kernel>
void launch(const DeviceScope&, const typename Kernel::Arguments& arguments) {
  const int64_t blocks = std::min(Kernel::blocks(arguments), kMaxBlocks);
  emulation::run_grid<typename Kernel::Shared>(
      blocks, Kernel::kThreads, [&](typename Kernel::Shared& shared) { Kernel::run(arguments, shared); });
}

}  // namespace anomem::cuda
