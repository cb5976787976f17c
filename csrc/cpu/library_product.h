// Matrix products of the library that torch brings, on blocks that stay in a cache: oneDNN's micro-kernels, which torch
// exports for its attention. They are generated for the processor at hand and use AMX where it has it.
//
// Measured on one core (AMD family 25, AVX512-BF16; Gflop/s): float32 112 to 117, the blocks of
// product.h 90 to 97; pairs of bfloat16 209 to 231, those of product.h 133 to 154. Intel family 6, AMX: float32 185 to
// 220, pairs of bfloat16 1,350 to 2,650.
#pragma once

#include "cpu/types.h"

namespace anomem::cpu {

// Whether a read of `prototypes` rows of `features` elements by many queries makes its products with the library. It
// does where they run, give right numbers (tried once per process) and are large enough. They are not part of torch's
// stable ABI: the answer is false where a torch lacks them, where ANOMEM_CPU names an instruction set and, of bfloat16,
// where torch.backends.mkldnn is off. Off, torch makes those of float32 by another library.
bool takes_library_products(Type type, int64_t queries, int64_t prototypes, int64_t features);

// Whether they multiply pairs of bfloat16 in the processor's tiles (AMX): about ten times as fast as float32.
bool multiplies_in_tiles();

// C [m, n] = A [m, k] B [k, n], or C += A B, on the calling thread; row-major, with strides between rows. With bfloat16
// B is [k / 2][b_stride] pairs of neighbouring rows' elements and k is even. One kernel is generated and kept for each
// combination of sizes: sizes should come from few values.
void library_product(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_stride, const float* b,
                     int64_t b_stride, float* c, int64_t c_stride, bool accumulate);
void library_product(int64_t m, int64_t n, int64_t k, const Bfloat16* a, int64_t a_stride, const Bfloat16* b,
                     int64_t b_stride, float* c, int64_t c_stride, bool accumulate);

// Made before the products of a thread, which are of pairs or of float32 (tile_product.h); gives the processor's tiles
// back at the end of its scope.
class LibraryProducts {
 public:
  LibraryProducts(bool used, bool pairs);
  ~LibraryProducts();
  LibraryProducts(const LibraryProducts&) = delete;
  LibraryProducts& operator=(const LibraryProducts&) = delete;

 private:
  bool used_, pairs_, tiles_;
};

}  // namespace anomem::cpu
