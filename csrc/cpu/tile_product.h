// Products of float32 in the processor's tiles of bfloat16 (AMX).
//
// A float32 number is the sum of three of bfloat16, exactly. Of the nine products of two numbers' parts six are made;
// the others are below 2^-26 of the whole. Tiles round sums less often than vectors do: the error is half that of MKL's
// float32 products (random numbers, up to 2048 terms).
//
// Measured on one core (Intel family 6, AMX; Gflop/s of float32, blocks of 126 × 512 × 64 to 512): 340 to 425, oneDNN's
// float32 micro-kernels 185 to 220. Splitting takes 6 to 10 cycles for 16 numbers.
#pragma once

#include "cpu/types.h"

namespace anomem::cpu {

// Whether this process makes float32 products so: it takes the library's (library_product.h), the processor has tiles,
// the system lends them, and a product of exact numbers was right.
bool splits_products();

// Terms that are split at a time. A left factor's parts then stay in the second-level cache.
constexpr int64_t kSplitTerms = 512;

// Elements of a factor's parts; `lines` are rows of a left or columns of a right factor.
inline int64_t parts_size(int64_t lines, int64_t terms) { return 3 * round_up(lines, 32) * round_up(terms, 32); }

// The parts of A [m, k] or of B [k, n], `stride` between rows. False where a product needs the range of float32: tiles
// take numbers below 2^-126 for zero, parts and products alike. With a largest element between 2^-45 and 2^30 that
// changes a product by 2^-96 at most, and by 2^-36 of the largest possible one.
bool split_left(const float* a, int64_t stride, int64_t m, int64_t k, Bfloat16* to);
bool split_right(const float* b, int64_t stride, int64_t k, int64_t n, Bfloat16* to);

// C [m, n] = A B or C += A B on a thread that has a `Tiles`, from the parts of `k` terms of both. `right_terms`: terms
// of the whole right factor, which begin at a multiple of 32 for these.
void multiply_parts(int64_t m, int64_t n, int64_t k, const Bfloat16* left, const Bfloat16* right, int64_t right_terms,
                    float* c, int64_t c_stride, bool accumulate);

// Memory of the calling thread for the parts of a left and of a right factor; a thread keeps it.
Bfloat16* left_parts(int64_t size);
Bfloat16* right_parts(int64_t size);

// Sets up the tiles of the calling thread and gives them back.
void take_tiles();
void release_tiles();

}  // namespace anomem::cpu
