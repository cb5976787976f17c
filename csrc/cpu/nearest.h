// Arguments of the nearest prototypes and of greedy k-center (anomem/reference/nearest.py). S = element type, T = type
// of sums.
#pragma once

#include "cpu/memory.h"
#include "cpu/types.h"

namespace anomem::cpu {

// Rows [L, N, d], or [1, N, d] for all banks.
struct BankRows {
  const void* data;
  int64_t banks;        // 1 or L
  int64_t count;        // N
  int64_t bank_stride;  // in elements
  int64_t stride;       // between rows

  template <class S>
  const S* of_bank(int64_t bank) const {
    return static_cast<const S*>(data) + (banks == 1 ? 0 : bank) * bank_stride;
  }
};

struct Nearest {
  Type type;
  BankRows x;
  const void* prototypes;  // S [L, M, d]
  int64_t banks, count, features;
  int64_t k;       // 1 to kMostCandidates, at most M
  void* distance;  // T [L, N, k], squared
  int64_t* index;  // [L, N, k]
};

struct KCenter {
  Type type;
  Queries x;  // S [N, d]
  int64_t features, first, count;
  int64_t* index;  // [count]
};

// Of one search. A row's columns fall into twice as many groups (candidates.h).
constexpr int64_t kMostCandidates = 32;

template <>
inline constexpr bool kRoughProducts<Nearest> = true;
template <>
inline constexpr bool kRoughProducts<KCenter> = true;

}  // namespace anomem::cpu
