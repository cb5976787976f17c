// How a memory is used over a set of queries (anomem/reference/usage.py), in one pass.
#pragma once

#include "cpu/isa.h"
#include "cpu/memory.h"

namespace anomem::cpu {

struct Usage {
  Memory memory;        // without values
  const void* query;    // [N, d], rows `query_row` apart
  int64_t queries;      // N
  int64_t query_row;
  int64_t* count;       // [M], queries whose strongest prototype this is
  void* mass;           // [M], mean weight
  void* entropy;        // [N], of each query's weights
  void* direction;      // [d], mean of HF(q) / |HF(q)|
};

ANOMEM_KERNEL(usage, Usage, memory.type)

}  // namespace anomem::cpu
