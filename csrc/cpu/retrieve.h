// Arguments of retrieval and shrunk retrieval (anomem/reference/retrieve.py). S = element type, T = type of sums.
#pragma once

#include "cpu/memory.h"
#include "cpu/types.h"

namespace anomem::cpu {

// What happens to the softmax's weights before they read the values.
struct Shrinkage {
  bool entropy = false;  // whether the entropy of the weights is an output
  double threshold = 0;  // of MemAE's hard shrinkage; 0: none
};

struct RetrieveForward {
  Type type;
  Memory memory;
  Shrinkage shrinkage;
  Queries query;  // S [N, d]
  void* out;      // S [N, dv]
  void* lse;      // T [N]
  void* entropy;  // T [N], with shrinkage.entropy only
};

struct RetrieveBackward {
  Type type;
  Memory memory;
  Shrinkage shrinkage;
  Queries query;                  // S [N, d]
  const void* lse;                // T [N], from the forward pass
  const void* dout;               // S [N, dv]
  Optional<const void> dlse;      // T [N]
  Optional<const void> dentropy;  // T [N]
  void* dquery;                   // S [N, d]
  void* dkeys;                    // S [M, d]; for a tied memory the sum of both gradients
  void* dvalues;                  // S [M, dv]; not written for a tied memory
  double* dbeta;                  // one number, or null
  void* workspace;                // T [BackwardPlan::workspace]
};

// How the backward pass is divided. The memory's gradient is a sum over all queries. Chunks of queries are shared out
// to `slots` partial sums, which are added in order: the result does not depend on the number of threads.
struct BackwardPlan {
  int64_t rows, chunks, slots;       // rows of a chunk
  int64_t key_stride, value_stride;  // row strides of a slot's sums, [M, d] and [M, dv]; no values if tied: 0
  int64_t workspace;                 // elements of all sums

  BackwardPlan(Type type, const Memory& memory, int64_t queries) {
    const bool is_float64 = type == Type::kFloat64;
    const auto padded = [&](int64_t n) { return is_float64 ? padded_stride<double>(n) : padded_stride<float>(n); };
    key_stride = padded(memory.features);
    value_stride = memory.tied() ? 0 : padded(memory.value_features);
    rows = chunk_rows(queries, memory.prototypes);
    // A chunk's two tiles of scores and four of rows should stay in the second-level cache.
    const int64_t bytes = (is_float64 ? 16 : 8) * (memory.prototypes + memory.features + memory.value_features);
    if (rows > 84 && bytes * rows > (int64_t{896} << 10)) rows = 84;
    chunks = (queries + rows - 1) / rows;
    const int64_t sums = memory.prototypes * (key_stride + value_stride);
    const int64_t affordable = (int64_t{1} << 22) / sums;  // 16 MiB of floats
    const int64_t worthwhile = chunks / 8;                 // filling and adding them stays small beside the products
    const int64_t wanted = affordable < worthwhile ? affordable : worthwhile;
    slots = wanted < 16 ? 16 : wanted > 64 ? 64 : wanted;
    if (chunks < slots) slots = chunks;
    workspace = slots * sums;
  }
};

}  // namespace anomem::cpu
