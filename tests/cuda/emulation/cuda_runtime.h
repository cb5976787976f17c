// Stands in for CUDA's header of this name: enough of the device language for csrc/cuda/*.cuh to be plain C++.
#pragma once

#include <cmath>
#include <cstdint>

#include "fibers.h"

#define __device__
#define __host__
#define __global__

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using emulation::blockDim;
using emulation::blockIdx;
using emulation::gridDim;
using emulation::threadIdx;

// A macro, because a recent C library has a function of this name.
#define rsqrtf(x) (1.0f / std::sqrt(x))
inline float __fdividef(float x, float y) { return x / y; }

inline uint4 __ldca(const uint4* p) { return *p; }
inline void __stwb(uint4* p, uint4 value) { *p = value; }

inline void __syncthreads() { emulation::block_barrier(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulation::require_whole_warp(mask);
  emulation::warp_barrier();
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  emulation::require_whole_warp(mask);
  return emulation::exchange(value, emulation::lane() ^ lane_mask);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta) {
  emulation::require_whole_warp(mask);
  const int from = emulation::lane() + delta;
  return emulation::exchange(value, from < emulation::kWarp ? from : emulation::lane());
}
