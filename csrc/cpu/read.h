// Arguments of the read of a filled memory (anomem/reference/read.py). S = element type, T = type of sums.
#pragma once

#include "cpu/nearest.h"

namespace anomem::cpu {

struct Read {
  Type type;
  BankRows query;
  const void* keys;  // S [L, M, d]
  int64_t banks, prototypes, features;
  Normalize normalize;
  double beta;
  Optional<const void> bias;  // T [L, M]
  int64_t top_k;              // prototypes that are read, the largest scores; 0: all
  bool nearest;               // whether distance and index are outputs
  bool deviation;             // out is norm(q) − read
  void* out;                  // S [L, N, d]
  void *residual, *cosine;    // T [L, N]
  void* distance;             // T [L, N], with `nearest` only
  int64_t* index;             // [L, N], with `nearest` only
  void *entropy, *lse;        // T [L, N]
};

template <>
inline constexpr bool kRoughProducts<Read> = true;

}  // namespace anomem::cpu
