// Arguments of the usage of a memory over a set of queries (anomem/reference/usage.py). T = type of sums.
#pragma once

#include "cpu/memory.h"
#include "cpu/types.h"

namespace anomem::cpu {

struct Usage {
  Type type;
  Memory memory;    // tied
  Queries query;    // [N, d]
  int64_t* count;   // [M], queries whose strongest prototype this is
  void* mass;       // T [M], mean weight
  void* entropy;    // T [N], of each query's weights
  void* direction;  // T [d], mean of HF(q) / |HF(q)|
};

}  // namespace anomem::cpu
