// Arguments of the contrast kernels. T = the accumulation type: float, or double for float64; S = the element type.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/types.h"

namespace anomem::cpu {

// `total` is what the forward leaves for the backward to make P of: see finish_row in contrast_tile.h.

// Rows [G, count, d] of unit inner stride.
struct Rows {
  const void* data;  // S
  int64_t group_stride, row_stride;
};

struct NtXentForward {
  Type type;
  int64_t groups, batch, features;
  double tau;
  Rows view[2];                   // [G, B, d] each
  void *loss, *total, *inv_norm;    // T [G, 2B]
  void* workspace;                // T [wave, nt_xent_forward_workspace]
  int64_t wave;                   // groups that are worked on together
};

struct NtXentBackward {
  Type type;
  int64_t groups, batch, features;
  double tau;
  Rows view[2];                        // [G, B, d] each
  const void *dloss, *total, *inv_norm;  // T [G, 2B]
  void* dview[2];                      // S [G, B, d], contiguous
  void* along;                         // T [G, 2B]: (1/tau) dU_i·u_i, of which the temperature's gradient is made
  void* workspace;                     // T [wave, nt_xent_backward_workspace]
  int64_t wave;
};

struct InfoNceForward {
  Type type;
  int64_t groups, count[2], features;  // count: R rows, C columns
  double tau;
  Rows side[2];                        // [G, R, d] and [G, C, d]
  const int64_t *positive, *exclude;   // [R]; exclude may be null
  void *loss, *total;                    // T [G, R]
  void* inv_norm[2];                   // T [G, R] and [G, C]
  void* workspace;                     // T [wave, info_nce_forward_workspace]
  int64_t wave;
};

struct InfoNceBackward {
  Type type;
  int64_t groups, count[2], features;
  double tau;
  Rows side[2];
  const void *dloss, *total;             // T [G, R]
  const void* inv_norm[2];
  const int64_t *positive, *exclude;
  void* dside[2];                      // S [G, R, d] and [G, C, d], contiguous
  void* along;                         // T [G, R]
  void* workspace;                     // T [wave, info_nce_backward_workspace]
  int64_t wave;
};

ANOMEM_KERNEL(nt_xent_forward, NtXentForward, type)
ANOMEM_KERNEL(nt_xent_backward, NtXentBackward, type)
ANOMEM_KERNEL(info_nce_forward, InfoNceForward, type)
ANOMEM_KERNEL(info_nce_backward, InfoNceBackward, type)

// Rows of a workspace are padded to a multiple of this, so that register blocks need no tails.
constexpr int64_t row_padding = 64;
constexpr int64_t feature_padding = 32;

// Rows of a tile. Large tiles cost less beside their products; where a group is short and there are few groups, small
// ones leave work for more threads. A function of the problem alone, so results do not depend on the number of threads.
inline int64_t tile_rows(int64_t rows, int64_t groups) { return rows >= 1024 || rows <= 128 || groups >= 4 ? 128 : 64; }

inline int64_t nt_xent_forward_workspace(int64_t rows, int64_t features) {
  return round_up(rows, row_padding) * (features + 3);
}
inline int64_t nt_xent_backward_workspace(int64_t rows, int64_t features) {
  return round_up(rows, row_padding) * (features + 2 * round_up(features, feature_padding) + 3);
}
inline int64_t info_nce_forward_workspace(int64_t rows, int64_t columns, int64_t features) {
  return (round_up(rows, row_padding) + round_up(columns, row_padding)) * (features + 1);
}
inline int64_t info_nce_backward_workspace(int64_t rows, int64_t columns, int64_t features) {
  return (round_up(rows, row_padding) + round_up(columns, row_padding)) *
         (features + 2 * round_up(features, feature_padding) + 3);
}

// Groups worked on together: enough items in every round for all threads, and no more, for their workspace adds up.
inline int64_t groups_in_a_wave(int64_t groups, int64_t items_per_group, int64_t threads) {
  const int64_t wanted = (4 * threads + items_per_group - 1) / items_per_group;
  return wanted < groups ? wanted : groups;
}

}  // namespace anomem::cpu
