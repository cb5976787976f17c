// Launches kernel bodies on a tensor's device, on its current stream. This is the only file with launch syntax; the
// emulation in tests/cuda has its own version of it.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>  // TORCH_ERROR_CODE_CHECK; torch 2.11 has no other

#include <algorithm>
#include <cstdint>

#include "entry.cuh"

// The dispatch key under which operators are registered.
#define ANOMEM_KEY CUDA

namespace anomem::cuda {

// Scratch of a chunk of rows: well within the L2 cache of sm_80 (40 MB) and sm_90 (50 MB).
constexpr int64_t kScratchBytes = 24 << 20;
constexpr int64_t kMaxBlocks = 0x7fffffff;  // of a grid's first axis

// Makes a tensor's device current and disables autograd until the end of the scope.
class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor& tensor)
      : guard_(tensor.get_device_index()), grad_(aoti_torch_grad_mode_is_enabled()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    aoti_torch_grad_mode_set_enabled(false);
  }
  ~DeviceScope() { aoti_torch_grad_mode_set_enabled(grad_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  bool grad_;
  cudaStream_t stream_;
};

template <class Kernel>
void launch(const DeviceScope& scope, const typename Kernel::Arguments& arguments) {
  const int64_t blocks = std::min(Kernel::blocks(arguments), kMaxBlocks);
  if (blocks == 0) return;
  entry<Kernel><<<static_cast<unsigned>(blocks), Kernel::kThreads, 0, scope.stream()>>>(arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace anomem::cuda
