// The CUDA kernel of a body; see primitives.cuh.
#pragma once

#include <cuda_runtime.h>

namespace anomem::cuda {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads) entry(const __grid_constant__ typename Kernel::Arguments arguments) {
  __shared__ typename Kernel::Shared shared;
  Kernel::run(arguments, shared);
}

}  // namespace anomem::cuda
