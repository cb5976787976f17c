// A memory as the kernels see it.
#pragma once

#include "cpu/types.h"

namespace anomem::cpu {

// The order is the encoding of anomem/ops/retrieve.py.
enum class Normalize { none, layer, l2 };

struct Memory {
  Type type;
  const void* keys;      // [M, d]
  const void* values;    // [M, dv], or null: V = norm(K)
  int64_t prototypes;    // M
  int64_t features;      // d
  int64_t value_features;  // dv; d without values
  Normalize normalize;
  double beta;
};

// Rows of queries that one work item takes at a time: multiples of every block's height, as many as leave the tile of
// scores in the second-level cache, and fewer where there would be too few items to share out. Depends on sizes alone.
inline int64_t chunk_rows(int64_t queries, int64_t prototypes) {
  if (prototypes > 1024 || queries < 16 * 126) return 42;
  return 126;
}

}  // namespace anomem::cpu
