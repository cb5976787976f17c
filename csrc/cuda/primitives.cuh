// Parts of every kernel body: conversions, 16-byte accesses, reductions in a fixed order.
//
// A kernel is a struct with `Arguments`, `Shared`, `kThreads`, `blocks(arguments)` on the host and a device function
// `run(arguments, shared)`. Bodies use neither torch nor launch syntax: g++ compiles them too, against
// tests/cuda/emulation. Blocks stride over their work items: a smaller grid than `blocks` computes the same result.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace anomem::cuda {

constexpr int kWarp = 32;
constexpr int kBlock = 256;  // threads of every kernel
constexpr int kWarps = kBlock / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLayerEps = 1e-5f;  // as in anomem/reference/retrieve.py
constexpr float kL2Eps = 1e-12f;

// Codes of anomem/ops/retrieve.py and deviation_map.py.
enum Normalize : int { kNone = 0, kLayer = 1, kL2 = 2 };
enum Distance : int { kCosine = 0, kEuclidean = 1 };

struct Nothing {};  // the `Shared` of a kernel without shared memory

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <class T>
__device__ inline T narrowed(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return __float2half_rn(x);
  }
}

// Elements of one 16-byte access.
template <class T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

template <class T>
__device__ inline bool aligned(const T* p) {
  return (reinterpret_cast<uintptr_t>(p) & 15) == 0;
}

// The one or two elements of a 32-bit word. (From an array of 16-bit elements nvcc makes four stores instead of one.)
template <class T>
__device__ inline unsigned packed(const float* x) {
  if constexpr (sizeof(T) == 4) {
    unsigned word;
    memcpy(&word, x, 4);
    return word;
  } else {
    const T low = narrowed<T>(x[0]), high = narrowed<T>(x[1]);
    uint16_t bits[2];
    memcpy(&bits[0], &low, 2);
    memcpy(&bits[1], &high, 2);
    return bits[0] | static_cast<unsigned>(bits[1]) << 16;
  }
}

// Loads N consecutive elements of global memory as floats, in 16-byte accesses if N and the address allow it, else one
// by one. The accesses are intrinsics: nvcc would merge both branches into the one-by-one branch.
template <class T, int N>
__device__ inline void load(float (&x)[N], const T* p) {
  if constexpr (N * sizeof(T) % 16 == 0) {
    if (aligned(p)) {
#pragma unroll
      for (int v = 0; v < N / kPack<T>; ++v) {
        const uint4 raw = __ldca(reinterpret_cast<const uint4*>(p) + v);
        T item[kPack<T>];
        memcpy(item, &raw, 16);
#pragma unroll
        for (int i = 0; i < kPack<T>; ++i) x[v * kPack<T> + i] = widen(item[i]);
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = widen(p[i]);
}

template <class T, int N>
__device__ inline void store(T* p, const float (&x)[N]) {
  if constexpr (N * sizeof(T) % 16 == 0) {
    if (aligned(p)) {
#pragma unroll
      for (int v = 0; v < N / kPack<T>; ++v) {
        unsigned word[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) word[w] = packed<T>(x + v * kPack<T> + w * kPack<T> / 4);
        const uint4 raw{word[0], word[1], word[2], word[3]};
        __stwb(reinterpret_cast<uint4*>(p) + v, raw);
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) p[i] = narrowed<T>(x[i]);
}

// The first `count` of N elements; the others read as zero and are not written.
template <class T, int N>
__device__ inline void load_some(float (&x)[N], const T* p, int64_t count) {
  if (count >= N) return load(x, p);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = i < count ? widen(p[i]) : 0.0f;
}

template <class T, int N>
__device__ inline void store_some(T* p, const float (&x)[N], int64_t count) {
  if (count >= N) return store(p, x);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < count) p[i] = narrowed<T>(x[i]);
  }
}

// A compile-time number of elements as an argument. (std::integral_constant converts on the host only.)
template <int kWidth>
struct Width {
  __host__ __device__ constexpr operator int() const { return kWidth; }
};

// Calls visit(width, i) for runs of `width` elements that cover a row of `count` once: whole packs from the row's first
// 16-byte boundary on, single elements before and after. `width` is a Width.
template <class T, class Visit>
__device__ inline void walk(const T* row, int64_t count, int lane, int lanes, Visit visit) {
  constexpr int64_t width = kPack<T>;
  const int64_t gap = (16 - (reinterpret_cast<uintptr_t>(row) & 15)) % 16 / static_cast<int>(sizeof(T));
  const int64_t head = gap < count ? gap : count;
  const int64_t tail = head + (count - head) / width * width;
  for (int64_t i = lane; i < head; i += lanes) visit(Width<1>{}, i);
  for (int64_t i = head + lane * width; i < tail; i += lanes * width) visit(Width<kPack<T>>{}, i);
  for (int64_t i = tail + lane; i < count; i += lanes) visit(Width<1>{}, i);
}

// A butterfly gives every lane the same bits: each step adds the same two numbers in both lanes of a pair.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

// A kernel with one warp per row. `Kernel` has the number of rows, `rows(arguments)`, and the work on one of them,
// `row(arguments, r, lane)`.
template <class Kernel, class KernelArguments>
struct WarpPerRow {
  using Arguments = KernelArguments;
  using Shared = Nothing;
  static constexpr int kThreads = kBlock;

  static int64_t blocks(const Arguments& a) { return ceil_div(Kernel::rows(a), kWarps); }

  __device__ static void run(const Arguments& a, Shared&) {
    const int lane = threadIdx.x % kWarp;
    const int64_t rows = Kernel::rows(a);
    for (int64_t r = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; r < rows;
         r += static_cast<int64_t>(gridDim.x) * kWarps) {
      Kernel::row(a, r, lane);
    }
  }
};

// The threads that share one row: a warp, or the whole block for long rows.
template <int kSize>
struct Team {
  static_assert(kSize == kWarp || kSize == kBlock);
  static constexpr int kPerBlock = kBlock / kSize;

  float* scratch;  // [kWarps], in shared memory; unused by a warp
  int lane;
  int index;  // of this team in its block

  __device__ explicit Team(float* scratch)
      : scratch(scratch),
        lane(static_cast<int>(threadIdx.x) % kSize),
        index(static_cast<int>(threadIdx.x) / kSize) {}

  __device__ float sum(float x) const {
    x = warp_sum(x);
    if constexpr (kSize == kBlock) {
      collect(x);
      x = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) x += scratch[w];
      __syncthreads();
    }
    return x;
  }

  __device__ float max(float x) const {
    x = warp_max(x);
    if constexpr (kSize == kBlock) {
      collect(x);
      x = scratch[0];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) x = fmaxf(x, scratch[w]);
      __syncthreads();
    }
    return x;
  }

 private:
  __device__ void collect(float x) const {
    if (lane % kWarp == 0) scratch[lane / kWarp] = x;
    __syncthreads();
  }
};

template <int kSize>
struct TeamShared {
  float scratch[kWarps];
};

}  // namespace anomem::cuda
