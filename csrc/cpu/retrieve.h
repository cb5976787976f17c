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
};

ANOMEM_KERNEL(retrieve_forward, RetrieveForward)
ANOMEM_KERNEL(retrieve_backward, RetrieveBackward)

}  // namespace anomem::cpu
