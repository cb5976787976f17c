// Retrieval and shrunk retrieval, forward and backward.
#pragma once

#include "cpu/isa.h"
#include "cpu/memory.h"

namespace anomem::cpu {

// How the softmax's weights are changed before they read the values.
struct Shrinkage {
  bool entropy = false;  // whether the entropy of the weights is wanted (or has a gradient)
  double threshold = 0;  // of MemAE's hard shrinkage; 0: none
};

struct RetrieveForward {
  Memory memory;
  Shrinkage shrinkage;
  const void* query;   // [N, d], rows `query_row` apart
  int64_t queries;     // N
  int64_t query_row;
  void* out;           // [N, dv]
  void* lse;           // [N]
  void* entropy;       // [N], or null
};

struct RetrieveBackward {
  Memory memory;
  Shrinkage shrinkage;
  const void* query;     // [N, d], rows `query_row` apart
  int64_t queries;       // N
  int64_t query_row;
  const void* lse;       // [N], from the forward pass
  const void* dout;      // [N, dv]
  const void* dlse;      // [N], or null
  const void* dentropy;  // [N], or null
  void* dquery;          // [N, d]
  void* dkeys;           // [M, d], with the values' gradient in it when there are no values
  void* dvalues;         // [M, dv], or null
  double* dbeta;         // one number, or null
  void* workspace;       // [BackwardPlan::workspace]
};

// How the backward pass is divided. The gradient of the memory is summed over all queries: chunks of them are shared out
// to `slots` partial sums, which are then added in order, so that the result does not depend on the number of threads.
struct BackwardPlan {
  int64_t rows, chunks, slots;  // rows of a chunk
  int64_t key_row, value_row;   // row lengths of a slot's sums, [M, key_row] and [M, value_row]; 0 without values
  int64_t workspace;            // elements of all sums

  BackwardPlan(const Memory& memory, int64_t queries) {
    const bool wide = memory.type == Type::f64;
    const auto padded = [&](int64_t n) { return wide ? padded_row<double>(n) : padded_row<float>(n); };
    key_row = padded(memory.features);
    value_row = memory.values == nullptr ? 0 : padded(memory.value_features);
    rows = chunk_rows(queries, memory.prototypes);
    // A chunk's two tiles of scores and four of rows should stay in the second-level cache.
    const int64_t bytes = (wide ? 16 : 8) * (memory.prototypes + memory.features + memory.value_features);
    if (rows > 84 && bytes * rows > (int64_t(896) << 10)) rows = 84;
    chunks = (queries + rows - 1) / rows;
    const int64_t sums = memory.prototypes * (key_row + value_row);
    const int64_t affordable = (int64_t(1) << 22) / sums;  // 16 MiB of floats
    const int64_t worthwhile = chunks / 8;                 // filling and adding them stays small beside the products
    const int64_t wanted = affordable < worthwhile ? affordable : worthwhile;
    slots = wanted < 16 ? 16 : wanted > 64 ? 64 : wanted;
    if (chunks < slots) slots = chunks;
    workspace = slots * sums;
  }
};

ANOMEM_KERNEL(retrieve_forward, RetrieveForward, memory.type)
ANOMEM_KERNEL(retrieve_backward, RetrieveBackward, memory.type)

}  // namespace anomem::cpu
