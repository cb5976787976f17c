// The variance hinge, forward and backward (anomem/reference/variance.py).
#pragma once

#include "cpu/isa.h"
#include "cpu/types.h"

namespace anomem::cpu {

struct VarianceForward {
  Type type;
  const void* x;                     // [G, B, d]
  int64_t groups, batch, features;   // G, B ≥ 2, d
  double gamma, eps;
  void* loss;  // [G]
  void* mean;  // [G, d]
  void* std;   // [G, d], sqrt(var + eps)
};

struct VarianceBackward {
  Type type;
  const void* dloss;  // [G]
  const void* x;      // [G, B, d]
  const void* mean;   // [G, d]
  const void* std;    // [G, d]
  int64_t groups, batch, features;
  double gamma;
  void* dx;  // [G, B, d]
};

ANOMEM_KERNEL(variance_forward, VarianceForward, type)
ANOMEM_KERNEL(variance_backward, VarianceBackward, type)

}  // namespace anomem::cpu
