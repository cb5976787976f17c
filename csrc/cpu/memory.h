// The memory of a call, and how its queries are cut into chunks.
#pragma once

#include "cpu/tile_product.h"
#include "cpu/types.h"

namespace anomem::cpu {

// The order is the encoding of anomem/ops/retrieve.py.
enum class Normalize { kNone, kLayer, kL2 };

struct Memory {
  const void* keys;             // [M, d]
  Optional<const void> values;  // [M, dv]; without: V = norm(K)
  int64_t prototypes;           // M
  int64_t features;             // d
  int64_t value_features;       // dv; d without values
  Normalize normalize;
  double beta;
  bool library;  // whether the library makes the products of its reads (library_product.h)

  bool tied() const { return !values.given; }
};

// Rows [N, d] of queries.
struct Queries {
  const void* data;
  int64_t count;   // N
  int64_t stride;  // between rows
};

// Rows of a chunk of many queries: a multiple of every register block's height. Tiles take rows by the 32.
inline int64_t long_chunk(bool library) { return library && splits_products() ? 128 : 126; }

// Rows of a chunk of queries, as many as leave the chunk's scores in the second-level cache. Short inputs get shorter
// chunks, so that all threads have work. Depends on sizes alone. With the library's products a memory of many
// prototypes is read less often instead.
inline int64_t chunk_rows(int64_t queries, int64_t prototypes, bool library) {
  if (queries < 16 * 126) return library && splits_products() ? 64 : 42;
  return prototypes > 1024 && !library ? 42 : long_chunk(library);
}

}  // namespace anomem::cpu
