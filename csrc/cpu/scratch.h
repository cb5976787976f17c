// Memory of kernels: their scratch and their large results. A process keeps what they gave back: a large block that
// comes from the system anew costs a page fault every 4 KiB. In trials these took a third of both passes of a retrieval
// from 64 prototypes, and the first touch of a memory's sums took a seventh to a quarter of the time of all products of
// one in bfloat16.
#pragma once

#include <cstdint>

namespace anomem::cpu {

// Most bytes of unused blocks that a process keeps; nor are they ever more than blocks in use took at once.
constexpr int64_t kKeptScratch = int64_t{512} << 20;

// Uninitialised memory, aligned to a cache line; with ANOMEM_POISON set, NaN. Throws a std::bad_alloc that names the
// bytes: in Python a MemoryError. Before, unused blocks go back to the system.
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
