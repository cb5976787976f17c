// Scratch memory of kernels. A process keeps what it gave back, up to kKeptScratch: a large block that comes from the
// system anew costs a page fault every 4 KiB. In trials the first touch of a memory's sums took a seventh to a quarter
// of the time of all products of a retrieval in bfloat16.
#pragma once

#include <cstdint>

namespace anomem::cpu {

// Bytes of unused blocks that a process keeps.
constexpr int64_t kKeptScratch = int64_t{64} << 20;

// Uninitialised memory, aligned to a cache line. Throws std::bad_alloc.
void* take_scratch(int64_t bytes);
void give_scratch(void* data);

class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(take_scratch(bytes)) {}
  ~Scratch() { give_scratch(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* data() { return data_; }

 private:
  void* data_;
};

}  // namespace anomem::cpu
