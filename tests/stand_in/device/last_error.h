// The runtime's last error, kept until it is read.
#pragma once

#include <cuda_runtime_api.h>

namespace stand_in {

inline cudaError_t& last_error() {
  thread_local cudaError_t error = cudaSuccess;
  return error;
}

inline cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error() = error;
  return error;
}

}  // namespace stand_in
