// What retrieval and the deviation map share: the memory's operands, the length of a chunk, the softmax of scores.
#pragma once

#include <cuda/launch.cuh>
#include <cuda/product.cuh>

#include "operands.h"
#include "softmax.cuh"

namespace anomem::cuda {

// The right factors of a retrieval, with the factors on its scores.
struct Memory {
  Tensor keys;    // [M, d], norm(K)
  Tensor values;  // [M, dv]; `keys` itself when tied
  bool tied;
  float scale;
  const float* beta;  // on the device, or null

  int64_t size() const { return keys.size(0); }
};

inline Memory make_memory(const DeviceScope& scope, const Tensor& keys, const OptionalTensor& values,
                          const OptionalTensor& beta, double scale, int64_t normalize) {
  Tensor unit = keys;
  if (normalize != kNone) {
    unit = empty(keys, {keys.size(0), keys.size(1)});
    with_type_of(keys, [&](auto zero) {
      normalize_rows<decltype(zero)>(scope, keys, unit, static_cast<int>(normalize));
    });
  }
  return {unit, values ? *values : unit, !values, static_cast<float>(scale), data<float>(beta)};
}

// Rows of a chunk whose scratch, `bytes` a row, stays in L2. A multiple of the GEMM library's tile.
inline int64_t chunk_rows(int64_t rows, int64_t bytes) {
  constexpr int64_t tile = 128;
  return std::min(rows, std::max(kScratchBytes / bytes / tile, int64_t{1}) * tile);
}

// The prior of each row; see SoftmaxArguments.
struct Prior {
  const float* log_prior = nullptr;
  int64_t positions = 1;
  int64_t first = 0;
};

// scores [R, M] float32 -> weights [R, M], lse [R].
inline void softmax(const DeviceScope& scope, const Memory& memory, const Tensor& scores, const Prior& prior,
                    const Tensor& weights, float* lse) {
  with_type_of(weights, [&](auto zero) {
    using T = decltype(zero);
    const SoftmaxArguments<T> a{data<float>(scores), scores.size(0), scores.size(1), memory.scale,
                                memory.beta,         prior.log_prior, prior.positions, prior.first,
                                writable<T>(weights), lse};
    if (a.columns <= kColumnsPerWarp) {
      launch<Softmax<T, kWarp>>(scope, a);
    } else {
      launch<Softmax<T, kBlock>>(scope, a);
    }
  });
}

}  // namespace anomem::cuda
