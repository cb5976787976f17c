// Arguments and workspaces of NT-Xent and InfoNCE (anomem/reference/contrast.py). S = element type, T = type of sums.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace anomem::cpu {

// Rows [G, count, d] of unit inner stride.
struct Rows {
  const void* data;  // S
  int64_t group_stride, row_stride;
};

// Products of the first `count` tiles of all groups, from the forward pass: the backward pass does not make them again.
template <class Data>
struct KeptProducts {
  int64_t count;
  Data* tiles;  // T [count, kept_elements]
  // Whether those of `tiles_of_group` tiles of a group are all among them.
  bool whole(int64_t group, int64_t tiles_of_group) const { return (group + 1) * tiles_of_group <= count; }
};

// In all of these: `library` says whether torch's library makes the products (library_product.h), or in its place the
// processor's tiles those of float32 (tile_product.h); `total` is left by
// the forward pass for the backward pass, see finish_row in contrast_sums.h; `wave` is the number of groups that are
// worked on together.

struct NtXentForward {
  Type type;
  bool library;
  int64_t groups, batch, features;
  double tau;
  Rows view[2];                   // S [G, B, d] each
  void *loss, *total, *inv_norm;  // T [G, 2B]
  KeptProducts<void> kept;
  void* workspace;  // T [wave, nt_xent_forward_workspace]
  int64_t wave;
};

struct NtXentBackward {
  Type type;
  bool library;
  int64_t groups, batch, features;
  double tau;
  Rows view[2];                                 // S [G, B, d] each
  const void *dloss, *loss, *total, *inv_norm;  // T [G, 2B]
  KeptProducts<const void> kept;
  void* dview[2];   // S [G, B, d], contiguous
  void* tau_terms;  // T [G, 2B], (1/tau) dU_i·u_i: terms of the temperature's gradient
  void* workspace;  // T [wave, nt_xent_backward_workspace]
  int64_t wave;
};

struct InfoNceForward {
  Type type;
  bool library;
  int64_t groups, count[2], features;  // count: R rows, C columns
  double tau;
  Rows side[2];                     // S [G, R, d] and [G, C, d]
  const int64_t* positive;          // [R]
  Optional<const int64_t> exclude;  // [R]
  void *loss, *total;               // T [G, R]
  void* inv_norm[2];                // T [G, R] and [G, C]
  KeptProducts<void> kept;
  void* workspace;  // T [wave, info_nce_forward_workspace]
  int64_t wave;
};

struct InfoNceBackward {
  Type type;
  bool library;
  int64_t groups, count[2], features;
  double tau;
  Rows side[2];                      // S [G, R, d] and [G, C, d]
  const void *dloss, *loss, *total;  // T [G, R]
  const void* inv_norm[2];           // T [G, R] and [G, C]
  const int64_t* positive;           // [R]
  Optional<const int64_t> exclude;   // [R]
  KeptProducts<const void> kept;
  void* dside[2];   // S [G, R, d] and [G, C, d], contiguous
  void* tau_terms;  // T [G, R]
  void* workspace;  // T [wave, info_nce_backward_workspace]
  int64_t wave;
};

// Two blocks of the rows of one group of NT-Xent, each [z; z_pair] of some pairs of the batch: a batch so large that
// its rows are made block by block. `same`: both are one block, in which a row sees neither itself nor its positive.

struct ContrastBlockForward {
  Type type;
  bool library, same;
  int64_t count[2], features;
  double tau;
  Rows block[2];    // S [1, R, d] and [1, C, d]
  double* lse[2];   // [R] and [C], log-sums of the block's logits over rows and columns; of the same block the first
  void* workspace;  // T [contrast_block_forward_workspace]
};

struct ContrastBlockBackward {
  Type type;
  bool library, same;
  int64_t count[2], features;
  double tau;
  Rows block[2];         // S [1, R, d] and [1, C, d]
  const double* lse[2];  // [R] and [C], of all that the rows see
  void* gradient;        // S [R, d]
  void* workspace;       // T [contrast_block_backward_workspace]
};

// Rows and features of a workspace are padded to multiples of these, so register blocks need no tails.
constexpr int64_t kRowPadding = 64;
constexpr int64_t kFeaturePadding = 32;

constexpr int64_t kLargestTile = 128;

// Rows of a tile. Large tiles cost less beside their products; for few short groups, small tiles leave work for more
// threads. Depends on sizes alone: results do not depend on the number of threads.
inline int64_t tile_rows(int64_t rows, int64_t groups) { return rows >= 1024 || rows <= 128 || groups >= 4 ? 128 : 64; }

// Where a forward pass needs rows: on the left of its products, on the right, or on both sides.
enum class ProductSide { kLeft, kRight, kBoth };

// Elements of a row in a forward pass. The library's products take rows as they are on the left and packed on the
// right, the others packed on both sides.
inline int64_t forward_row(int64_t features, bool library, ProductSide side) {
  const int64_t packed = !library || side != ProductSide::kLeft ? features : 0;
  return packed + 1 + (library && side != ProductSide::kRight ? round_up(features, kFeaturePadding) : 0);
}

// Elements of a row in a backward pass: as a right factor, one number, and where products are made again packed for
// those.
inline int64_t backward_row(int64_t features, bool all_kept) {
  return round_up(features, kFeaturePadding) + 1 + (all_kept ? 0 : features);
}
// Elements of its gradient.
inline int64_t gradient_row(int64_t features) { return round_up(features, kFeaturePadding); }

// Rows of a strip of NT-Xent, or 0 where groups are not cut into strips. The rows of a pair of strips are packed when
// it is worked on: packing those of a group at once takes twice the memory of its gradient. The tiles of the pair then
// come from a thread's own cache. A pair is one item; there are enough of them for 32 threads. Depends on sizes alone.
inline int64_t strip_rows(int64_t rows, int64_t groups) {
  constexpr int64_t fewest_rows = 16384, shortest = 512, longest = 2048;  // multiples of kLargestTile
  const int64_t strip = rows * groups / 64 / kLargestTile * kLargestTile;
  if (rows < fewest_rows || strip < shortest) return 0;
  return strip < longest ? strip : longest;
}

// Tiles of products are kept with this row stride: a power of two would put a column of one into a few sets of a cache.
inline int64_t kept_stride_of_tile(int64_t columns) { return columns + 16; }

// Elements of a kept tile.
inline int64_t kept_elements(int64_t rows, int64_t columns) { return rows * kept_stride_of_tile(columns); }

// Tiles of a group: pairs first ≤ second, or of rows and columns.
inline int64_t nt_xent_tiles(int64_t rows, int64_t groups) {
  const int64_t tile = tile_rows(rows, groups), tiles = (rows + tile - 1) / tile;
  return tiles * (tiles + 1) / 2;
}
inline int64_t info_nce_tiles(int64_t rows, int64_t columns, int64_t groups) {
  const int64_t tile = tile_rows(rows, groups);
  return (rows + tile - 1) / tile * ((columns + kLargestTile - 1) / kLargestTile);
}

inline int64_t nt_xent_forward_workspace(int64_t rows, int64_t groups, int64_t features, bool library) {
  const int64_t packed = strip_rows(rows, groups) > 0 ? 0 : forward_row(features, library, ProductSide::kBoth);
  return round_up(rows, kRowPadding) * (packed + 2);
}
inline int64_t nt_xent_backward_workspace(int64_t rows, int64_t groups, int64_t features, bool all_kept) {
  const int64_t packed = strip_rows(rows, groups) > 0 ? 0 : backward_row(features, all_kept);
  return round_up(rows, kRowPadding) * (gradient_row(features) + packed + 2);
}
inline int64_t info_nce_forward_workspace(int64_t rows, int64_t columns, int64_t features, bool library) {
  return round_up(rows, kRowPadding) * forward_row(features, library, ProductSide::kLeft) +
         round_up(columns, kRowPadding) * forward_row(features, library, ProductSide::kRight);
}
inline int64_t info_nce_backward_workspace(int64_t rows, int64_t columns, int64_t features, bool all_kept) {
  const int64_t row = gradient_row(features) + backward_row(features, all_kept);
  return (round_up(rows, kRowPadding) + round_up(columns, kRowPadding)) * row + 2 * round_up(rows, kRowPadding);
}

// Of the same block the second side has no rows of its own.
inline int64_t contrast_block_forward_workspace(const int64_t (&count)[2], int64_t features, bool library, bool same) {
  const int64_t left = forward_row(features, library, same ? ProductSide::kBoth : ProductSide::kLeft) + 2;
  const int64_t right = forward_row(features, library, ProductSide::kRight) + 2;
  return round_up(count[0], kRowPadding) * left + (same ? 0 : round_up(count[1], kRowPadding) * right);
}
inline int64_t contrast_block_backward_workspace(const int64_t (&count)[2], int64_t features, bool same) {
  const int64_t row = backward_row(features, false) + 3;
  const int64_t left = round_up(count[0], kRowPadding), right = same ? 0 : round_up(count[1], kRowPadding);
  return (left + right) * row + left * gradient_row(features);
}

// Groups worked on together: enough items in every round for all threads. More would need more workspace, which one
// thread would have to fetch from a farther cache.
inline int64_t groups_in_a_wave(int64_t groups, int64_t items_per_group, int64_t threads) {
  const int64_t wanted = threads == 1 ? 1 : (4 * threads + items_per_group - 1) / items_per_group;
  return wanted < groups ? wanted : groups;
}

}  // namespace anomem::cpu
