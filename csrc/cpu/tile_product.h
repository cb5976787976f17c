// Products of float32 in the processor's tiles of bfloat16 (AMX).
//
// A float32 number is the sum of three of bfloat16, exactly. Of the nine products of two numbers' parts six are made;
// the others are below 2^-24.9 of the whole each, and below 2^-23.9 together. Tiles round sums less often than vectors
// do: the error is half that of MKL's float32 products (random numbers, up to 2048 terms).
//
// Measured on one core (Intel family 6, AMX; Gflop/s of float32): blocks of 126 × 512 × 64 to 512 from given parts 340
// to 425, oneDNN's float32 micro-kernels 185 to 220. With the splitting of the larger factor, blocks of 192 × 256 and
// 64 to 256: 290 to 390; 210 to 320 if it is split first.
#pragma once

#include "cpu/types.h"

namespace anomem::cpu {

// Whether this process makes float32 products so: it takes the library's (library_product.h), the processor has tiles,
// the system lends them, and a product of exact numbers was right.
bool splits_products();

// Elements of a factor's parts; `lines` are rows of a left or columns of a right factor.
inline int64_t parts_size(int64_t lines, int64_t terms) { return 3 * round_up(lines, 32) * round_up(terms, 32); }

// The parts of A [m, k] or of B [k, n], `stride` between rows. False where a product needs the range of float32: tiles
// take numbers below 2^-126 for zero, parts and products alike. With a largest element between 2^-45 and 2^30 that
// changes a product by 2^-96 at most, and by 2^-36 of the largest possible one.
bool split_left(const float* a, int64_t stride, int64_t m, int64_t k, Bfloat16* to);
bool split_right(const float* b, int64_t stride, int64_t k, int64_t n, Bfloat16* to);

// The panels of a right factor: `step` elements for each column before one, `stride` between its rows (0: its width).
// Its terms are `all`, those of a product begin at `first`, a multiple of 32. `parts` of the whole factor may be null.
struct Panels {
  const float* data;
  int64_t step, stride;
  const Bfloat16* parts;
  int64_t first, all;
  int64_t widest;  // columns of a panel

  int64_t width(int64_t column, int64_t n) const { return at_most(widest, round_up(n, 32) - column); }
};

// C [m, n] = A B or C += A B over k terms, on a thread that has a `LibraryProducts`. `a_parts`: those of A, or null.
// Columns up to the end of the last panel are written. Where parts are not given, those of the larger factor are made
// while the tiles multiply. Lines that need the range of float32 get a product of the library.
void product_in_tiles(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_stride, const Bfloat16* a_parts,
                      const Panels& b, float* c, int64_t c_stride, bool accumulate);

// Sets up the tiles of the calling thread and gives them back.
void take_tiles();
void release_tiles();

}  // namespace anomem::cpu
