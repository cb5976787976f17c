// Advice to the system about the pages of large blocks.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace anomem::cpu {

// For a large block that one call fills: in huge pages, where the system gives them on request, a tenth of the time of
// a retrieval's forward pass is not spent on page faults.
inline void ask_for_huge_pages(const void* block, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const uintptr_t data = reinterpret_cast<uintptr_t>(block);
  const uintptr_t begin = (data + page - 1) / page * page;
  const uintptr_t end = (data + static_cast<uintptr_t>(bytes)) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice may be refused
#endif
}

// The same for a map, which goes back to the allocator: glibc takes only blocks from this size on from the system anew.
inline void ask_for_huge_pages_if_fresh(const torch::stable::Tensor& map) {
  const int64_t bytes = map.numel() * map.element_size();
  if (bytes >= int64_t{32} << 20) ask_for_huge_pages(map.const_data_ptr(), bytes);
}

}  // namespace anomem::cpu
