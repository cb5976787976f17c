// All kernels; each isa_*.cpp compiles this file in its own namespace. Start here.
//
// A retrieval call passes, from top to bottom:
//
//   retrieve.cpp         the operator: checks (checks.h), tensors to pointers (operands.h), outputs, cpu::run
//   isa.h, isa.cpp       the instruction set, chosen once
//   run (below)          the element type S; sums are kept in T = accumulator_t<S> (types.h)
//   retrieve_kernel.h    chunks of queries, shared out to threads (parallel.h); memory.h sets their length
//     retrieve_blocks.h  the same from a large memory, block after block of it
//     panels.h           keys and values, normalised (rows.h) and packed once for all chunks
//     raw_scores.h       scores of bfloat16 rows as they are, by the library
//     factors.h          what products multiply: T, or pairs of bfloat16; packing as left and right factor
//     product.h          scores = Q Kᵀ, by its own blocks, by those of torch's library (library_product.h) or in tiles
//                        (tile_product.h)
//     softmax.h          scores become exponentials, their sum and lse; shrinkage and entropy
//     product.h          out = P V, divided by the sum
//   simd.h               the vectors and 2^x under all of these
//
// The backward pass of retrieval makes the scores again and multiplies five times (BackwardChunk in retrieve_kernel.h).
// usage_kernel.h and deviation_map_kernel.h read a memory in the same way. contrast_kernel.h multiplies normalised rows
// (contrast_rows.h) tile by tile (contrast_tile.h), in the order of contrast_schedule.h, and sums exponentials
// (contrast_sums.h) or weighs rows (contrast_gradients.h); contrast_block_kernel.h does so with two blocks of a batch
// that is never there as a whole. nearest_kernel.h and read_kernel.h find the largest scores by a rough product and
// compute those again (candidates.h). augment_kernel.h passes over one image at a time. conv3x3_kernel.h multiplies
// transformed tiles of a map (conv3x3_tile.h) by the blocks of product.h, and in bfloat16 on processors with AMX the
// map itself by the library (conv3x3_direct.h). sampling_kernel.h, batch_norm_kernel.h and downsample_kernel.h need
// rows.h only.
#include "cpu/augment_kernel.h"
#include "cpu/batch_norm_kernel.h"
#include "cpu/contrast_block_kernel.h"
#include "cpu/contrast_kernel.h"
#include "cpu/conv3x3_kernel.h"
#include "cpu/deviation_map_kernel.h"
#include "cpu/downsample_kernel.h"
#include "cpu/nearest_kernel.h"
#include "cpu/read_kernel.h"
#include "cpu/retrieve_kernel.h"
#include "cpu/sampling_kernel.h"
#include "cpu/usage_kernel.h"

namespace anomem::cpu::ANOMEM_ISA {

// Runs `compute<S>` for the element type S of the arguments.
template <class Arguments>
void run(const Arguments& arguments) {
#if ANOMEM_BFLOAT16_PAIRS  // an instruction set for that type and for rough products
  if constexpr (kRoughProducts<Arguments>)
    if (arguments.type == Type::kFloat32) return compute<float>(arguments);
  compute<Bfloat16>(arguments);
#else
  switch (arguments.type) {
    case Type::kFloat32: return compute<float>(arguments);
    case Type::kBfloat16: return compute<Bfloat16>(arguments);
    case Type::kFloat64: return compute<double>(arguments);
  }
#endif
}

// Images are augmented in float32 alone.
template <>
void run(const Augment& arguments) {
  compute_views(arguments);
}

template void run(const RetrieveForward& arguments);
template void run(const RetrieveBackward& arguments);
template void run(const NtXentForward& arguments);
template void run(const NtXentBackward& arguments);
template void run(const InfoNceForward& arguments);
template void run(const InfoNceBackward& arguments);
template void run(const ContrastBlockForward& arguments);
template void run(const ContrastBlockBackward& arguments);
template void run(const Gather& arguments);
template void run(const Scatter& arguments);
template void run(const VarianceForward& arguments);
template void run(const VarianceBackward& arguments);
template void run(const DeviationMap& arguments);
template void run(const Usage& arguments);
template void run(const Nearest& arguments);
template void run(const KCenter& arguments);
template void run(const Read& arguments);
template void run(const BatchNormStatistics& arguments);
template void run(const BatchNormApply& arguments);
template void run(const BatchNormSums& arguments);
template void run(const BatchNormGradient& arguments);
template void run(const DownsampleTake& arguments);
template void run(const DownsampleAdd& arguments);
template void run(const Conv3x3& arguments);
template void run(const Conv3x3Weight& arguments);

}  // namespace anomem::cpu::ANOMEM_ISA
