// What retrieval and the deviation map share: the memory's operands, the length of a chunk, the softmax of its scores.
#pragma once

#include <cuda/launch.cuh>
#include <cuda/product.cuh>

#include "operands.h"
#include "softmax.cuh"
#include "take.h"

namespace anomem::cuda {

// K normalised and V as they are multiplied, with the factor on the scores.
struct Memory {
  Tensor keys;    // [M, d], norm(K)
  Tensor values;  // [M, dv]; `keys` itself when tied
  bool tied;
  float scale;
  const float* beta;  // on the device, or null

  int64_t size() const { return keys.size(0); }
};

inline void check_memory(const Tensor& queries, int64_t features, const Tensor& keys,
                         const std::optional<Tensor>& values, const std::optional<Tensor>& beta) {
  check_like(keys, "keys", queries, queries.scalar_type());
  STD_TORCH_CHECK(keys.dim() == 2 && keys.size(0) >= 1 && features >= 1, "keys: expected [M, d] with M, d ≥ 1");
  check_shape(keys, "keys", {keys.size(0), features});
  check_contiguous(keys, "keys");
  if (values) {
    check_like(*values, "values", queries, queries.scalar_type());
    STD_TORCH_CHECK(values->dim() == 2 && values->size(0) == keys.size(0), "values: expected [M, dv]");
    check_contiguous(*values, "values");
  }
  if (beta) {
    check_like(*beta, "beta", queries, ScalarType::Float);
    STD_TORCH_CHECK(beta->numel() == 1, "beta: expected a 0-dim tensor");
  }
}

inline Memory make_memory(const DeviceScope& scope, const Tensor& keys, const std::optional<Tensor>& values,
                          const std::optional<Tensor>& beta, double scale, int64_t normalize) {
  Tensor unit = keys;
  if (normalize != kNone) {
    unit = empty(keys, {keys.size(0), keys.size(1)});
    with_type_of(keys, [&](auto zero) {
      normalize_rows<decltype(zero)>(scope, keys, unit, static_cast<int>(normalize));
    });
  }
  return {unit, values ? *values : unit, !values, static_cast<float>(scale), data<float>(beta)};
}

// Rows of a chunk whose scratch, of so many bytes a row, stays in L2; whole tiles of the library's GEMM.
inline int64_t chunk_rows(int64_t rows, int64_t bytes) {
  constexpr int64_t tile = 128;
  return std::min(rows, std::max(kScratchBytes / bytes / tile, int64_t{1}) * tile);
}

// Where each row's prior lies; see SoftmaxArguments.
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
