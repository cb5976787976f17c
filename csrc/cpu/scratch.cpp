// native_scratch_peak
#include "cpu/scratch.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#include "cpu/pages.h"
#include "cpu/types.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace anomem::cpu {
namespace {

// Before a block's data, in a cache line of its own.
struct alignas(64) Header {
  int64_t bytes;  // of the data
  int64_t asked;  // of them; a kept block may be larger
};

// Smaller blocks are the allocator's: it takes none of them from the system anew.
constexpr int64_t kLeastKept = int64_t{64} << 10, kHugePage = int64_t{2} << 20;

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
constexpr int64_t kPage = int64_t{64} << 10;  // a multiple of the page of any system

// At a multiple of a huge page, or null.
void* map_pages(int64_t size) {
  void* const mapped = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* const start = static_cast<char*>(mapped);
  char* const block = start + (kHugePage - reinterpret_cast<uintptr_t>(start) % kHugePage) % kHugePage;
  if (block > start) munmap(start, block - start);
  if (char* const end = block + size; start + kHugePage > block) munmap(end, start + kHugePage - block);
  return block;
}

void unmap_pages(void* block, int64_t size) { munmap(block, size); }
#else
constexpr int64_t kPage = kHugePage;

void* map_pages(int64_t size) { return std::aligned_alloc(kHugePage, size); }
void unmap_pages(void* block, int64_t) { std::free(block); }
#endif

// A number of bytes and the most that it has been.
class Level {
 public:
  void add(int64_t bytes) {
    const int64_t now = now_.fetch_add(bytes, std::memory_order_relaxed) + bytes;
    int64_t most = most_.load(std::memory_order_relaxed);
    while (now > most && !most_.compare_exchange_weak(most, now, std::memory_order_relaxed)) {
    }
  }

  void subtract(int64_t bytes) { now_.fetch_sub(bytes, std::memory_order_relaxed); }

  int64_t most() const { return most_.load(std::memory_order_relaxed); }

  // The most since the last call, beyond what it was then.
  int64_t take_rise() {
    const int64_t now = now_.load(), most = most_.exchange(now), before = before_.exchange(now);
    return most - before;
  }

 private:
  std::atomic<int64_t> now_{0}, most_{0}, before_{0};
};

// Of the blocks in use: what was asked for, and their sizes. Kept blocks are larger than asked for, by what calls
// before have left.
Level asked, held;

class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(int64_t bytes) {
    std::snprintf(text_, sizeof text_, "anomem: out of memory, for %lld bytes", static_cast<long long>(bytes));
  }
  const char* what() const noexcept override { return text_; }

 private:
  char text_[64];
};

// Null where there is no memory. A large block begins at a huge page, and its end takes no other. It comes from the
// system: on the allocator's heap kept blocks would hold freed memory between them.
Header* allocate(int64_t bytes) {
  const int64_t least = bytes + static_cast<int64_t>(sizeof(Header));
  const bool large = least > kHugePage;
  const int64_t size = round_up(least, large ? kPage : 64);
  void* const block = large ? map_pages(size) : std::aligned_alloc(64, size);
  if (block == nullptr) return nullptr;
  if (large) ask_for_huge_pages(block, size);
  return new (block) Header{size - static_cast<int64_t>(sizeof(Header)), 0};
}

void release(Header* block) {
  const int64_t size = block->bytes + static_cast<int64_t>(sizeof(Header));
  if (size > kHugePage) unmap_pages(block, size);
  else std::free(block);
}

// Unused blocks, the oldest first. The lock is only tried: a child of fork may find it taken for ever.
class Kept {
 public:
  Kept() { blocks_.reserve(256); }

  // A block that is not much too large, or null.
  Header* take(int64_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    size_t best = blocks_.size();
    for (size_t i = 0; i < blocks_.size(); ++i)
      if (blocks_[i]->bytes >= bytes && blocks_[i]->bytes <= bytes + bytes / 4 + kLeastKept &&
          (best == blocks_.size() || blocks_[i]->bytes <= blocks_[best]->bytes))  // the newest: it may be in a cache
        best = i;
    if (best == blocks_.size()) return nullptr;
    Header* const block = blocks_[best];
    blocks_.erase(blocks_.begin() + static_cast<int64_t>(best));
    bytes_ -= block->bytes;
    return block;
  }

  void give(Header* block) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    // A longer list would have to be allocated, and blocks are given back while memory is short.
    if (!lock || block->bytes > kKeptScratch || blocks_.size() == blocks_.capacity()) return release(block);
    blocks_.push_back(block);
    bytes_ += block->bytes;
    shrink(std::min(kKeptScratch, held.most()));
  }

  void clear() {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (lock) shrink(0);
  }

 private:
  void shrink(int64_t most) {
    while (bytes_ > most) {
      bytes_ -= blocks_.front()->bytes;
      release(blocks_.front());
      blocks_.erase(blocks_.begin());
    }
  }

  std::mutex mutex_;
  std::vector<Header*> blocks_;
  int64_t bytes_ = 0;
};

bool poisons() {
  static const bool wanted = std::getenv("ANOMEM_POISON") != nullptr;
  return wanted;
}

// Never destroyed: threads may give back blocks while the process ends.
Kept& kept() {
  static Kept& blocks = *new Kept;
  return blocks;
}

// The sanitizer finds blocks that are read after they were given back, if they are freed.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kKeeps = false;
#else
constexpr bool kKeeps = true;
#endif

}  // namespace

void* take_scratch(int64_t bytes) {
  Header* block = kKeeps && bytes >= kLeastKept ? kept().take(bytes) : nullptr;
  if (block == nullptr) block = allocate(bytes);
  if (block == nullptr) {
    kept().clear();
    block = allocate(bytes);
  }
  if (block == nullptr) throw OutOfMemory(bytes);
  block->asked = bytes;
  asked.add(bytes);
  held.add(block->bytes);
  if (poisons()) std::memset(block + 1, 0xff, bytes);
  return block + 1;
}

void give_scratch(void* data) {
  Header* const block = static_cast<Header*>(data) - 1;
  asked.subtract(block->asked);
  held.subtract(block->bytes);
  if (kKeeps && block->bytes >= kLeastKept) kept().give(block);
  else release(block);
}

namespace {

int64_t take_peak(const torch::stable::Tensor&) { return asked.take_rise(); }

}  // namespace
}  // namespace anomem::cpu

STABLE_TORCH_LIBRARY_IMPL(anomem, CPU, m) { m.impl("native_scratch_peak", TORCH_BOX(&anomem::cpu::take_peak)); }
