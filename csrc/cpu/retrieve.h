// Arguments of retrieval and shrunk retrieval (anomem/reference/retrieve.py). S = element type, T = type of sums.
#pragma once

#include "cpu/library_product.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/tile_product.h"
#include "cpu/types.h"

namespace anomem::cpu {

// What happens to the softmax's weights before they read the values.
struct Shrinkage {
  bool entropy = false;  // whether the entropy of the weights is an output
  double threshold = 0;  // of MemAE's hard shrinkage; 0: none
};

// Whether queries pass over the memory block after block (retrieve_blocks.h): where products are so fast that the
// passes over scores which leave the second-level cache take most of the time. With fewer prototypes, or fewer for each
// feature, kept weights were as fast. As in anomem/ops/retrieve.py.
inline bool reads_in_blocks(Type type, const Memory& memory) {
  const int64_t features = at_least(memory.features, memory.value_features);
  if (!memory.library) return false;
  if (type == Type::kBfloat16) return multiplies_in_tiles() && memory.prototypes >= 1536;
  return type == Type::kFloat32 && splits_products() && memory.prototypes >= at_least(512, 4 * features);
}

// Numbers kept of a query that read the memory in blocks: two, and the output in the type of sums. In bfloat16 that is
// larger than the output itself; calls that would keep more than 31 MiB go without. As in anomem/ops/retrieve.py.
inline int64_t kept_in_blocks(Type type, int64_t value_features, int64_t queries) {
  constexpr int64_t most = int64_t{31} << 20;
  const int64_t width = 2 + value_features;
  return type == Type::kBfloat16 && queries * width * static_cast<int64_t>(sizeof(float)) > most ? 2 : width;
}

// Rows of a chunk that reads the memory in blocks: many, since each chunk fetches all of it. Few queries are divided
// evenly, because products are of whole chunks.
inline int64_t rows_in_blocks(int64_t queries) {
  constexpr int64_t most = 192;
  const int64_t chunks = at_least(1, (queries + most - 1) / most);
  return chunks >= 16 ? most : at_least(32, round_up((queries + chunks - 1) / chunks, 32));
}

// Row stride of kept weights: whole panels of every instruction set, and no multiple of 1 KiB (padded_stride).
inline int64_t kept_stride(int64_t prototypes) {
  const int64_t padded = round_up(prototypes, 32);
  return padded % 256 == 0 ? padded + 32 : padded;
}

// What the forward pass keeps of the first `rows` queries for the backward pass.
// - exp(logit − largest logit), S [rows, kept_stride(M)]: the softmax's weights up to their sum.
// - Of a memory read in blocks what retrieve_blocks.h says, T [rows, kept_in_blocks]. Rows of a chunk that was not read
//   in blocks begin with NaN.
template <class Data>
struct Kept {
  int64_t rows = 0;
  Data* data = nullptr;
  bool of_blocks = false;
};

struct RetrieveForward {
  Type type;
  Memory memory;
  Shrinkage shrinkage;
  Queries query;  // S [N, d]
  void* out;      // S [N, dv]
  void* lse;      // T [N]
  void* entropy;  // T [N], with shrinkage.entropy only
  Kept<void> kept;
};

struct RetrieveBackward {
  Type type;
  Memory memory;
  Shrinkage shrinkage;
  Queries query;                  // S [N, d]
  const void* lse;                // T [N], from the forward pass
  const void* dout;               // S [N, dv]
  Optional<const void> dlse;      // T [N]
  Optional<const void> dentropy;  // T [N]
  void* dquery;                   // S [N, d]
  void* dkeys;                    // S [M, d]; for a tied memory the sum of both gradients
  void* dvalues;                  // S [M, dv]; not written for a tied memory
  double* dbeta;                  // one number, or null
  void* workspace;                // T [BackwardPlan::workspace]
  Kept<const void> kept;          // from the forward pass
};

// How the backward pass is divided. The memory's gradient is a sum over all queries, in one of two ways. Neither result
// depends on the number of threads.
// - Chunks of queries are shared out to `slots` partial sums, which are added in order.
// - A large memory has one sum. Its sums do not stay in a cache while chunks pass by: a group of chunks is worked on
//   first, then all of them are added to one panel of the sum after another.
struct BackwardPlan {
  int64_t rows, chunks, slots;  // rows of a chunk
  // A slot's sums: [M, d] and [M, dv], or with the library's products [d, M] and [dv, M].
  int64_t key_stride, value_stride;  // between rows
  int64_t key_sums, value_sums;      // elements; no values if tied: 0
  int64_t tiles;                     // elements that one chunk leaves for the sums (retrieve_kernel.h)
  int64_t group;                     // chunks of a group, or 0 with slots
  int64_t workspace;                 // elements of all slots and of a group's tiles

  // `in_blocks`: for a memory read in blocks, whose rows are kept.
  BackwardPlan(Type type, const Memory& memory, int64_t queries, bool in_blocks) {
    const bool is_float64 = type == Type::kFloat64;
    const auto padded = [&](int64_t n) { return is_float64 ? padded_stride<double>(n) : padded_stride<float>(n); };
    key_stride = padded(memory.library ? memory.prototypes : memory.features);
    value_stride = padded(memory.library ? memory.prototypes : memory.value_features);
    key_sums = key_stride * (memory.library ? memory.features : memory.prototypes);
    value_sums = memory.tied() ? 0 : value_stride * (memory.library ? memory.value_features : memory.prototypes);
    rows = chunk_rows(queries, memory.prototypes, memory.library);
    const bool is_long = rows == long_chunk(memory.library) && !in_blocks;
    if (in_blocks) rows = rows_in_blocks(queries);
    const int64_t sums = key_sums + value_sums;
    const bool in_groups = memory.library && sums > int64_t{1} << 18 && !in_blocks;
    // A chunk's two tiles of scores and four of rows should stay in the second-level cache. Those of a large memory do
    // not; twice as many rows then read the memory half as often. Tiles take rows by the 32, and processors that have
    // them have larger caches.
    const int64_t bytes = (is_float64 ? 16 : 8) * (memory.prototypes + memory.features + memory.value_features);
    if (in_groups && is_long) rows *= 2;
    else if (is_long && bytes * rows > (int64_t{896} << 10) && !(type == Type::kFloat32 && splits_products()))
      rows = 84;
    chunks = (queries + rows - 1) / rows;
    const int64_t affordable = (int64_t{1} << 22) / sums;  // 16 MiB of floats
    const int64_t worthwhile = chunks / 8;                 // filling and adding them stays small beside the products
    const int64_t wanted = affordable < worthwhile ? affordable : worthwhile;
    slots = wanted < 16 ? 16 : wanted > 64 ? 64 : wanted;
    if (in_blocks) {  // few sums, as each of them is large; of few chunks one each, so that threads share them
      const int64_t most = at_least(4, (int64_t{1} << 24) / sums);
      slots = at_most(at_most(most, 16), at_least(at_most(chunks, 8), chunks / 4));
    }
    if (chunks < slots) slots = chunks;
    tiles = 2 * rows * padded(memory.prototypes) + padded(rows * (memory.features + memory.value_features));
    group = 0;
    if (in_groups) {
      const int64_t threads = thread_count(), least = is_long ? 2 : 4;
      group = threads < least ? least : threads > 16 ? 16 : threads;
      if (group > chunks) group = chunks;
      slots = 1;
    }
    workspace = slots * sums + group * tiles;
  }
};

}  // namespace anomem::cpu
