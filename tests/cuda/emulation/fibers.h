// Runs a kernel on the CPU: one fiber per CUDA thread, blocks one after another.
//
// A thread runs until it waits at a barrier. When no thread can run, every warp whose 32 lanes wait at a warp barrier
// goes on, else the block, if all of its threads wait at the block's. Anything else is a divergent barrier and ends the
// process. Threads take turns in a chosen order: a value read before its writer has passed a barrier is then the old
// one under some order. A block's shared memory is fresh from the heap and filled with NaN, so that a value nobody
// wrote shows and AddressSanitizer sees its end.
//
// What this cannot show: races inside of one order, memory models, speed.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "context.h"

namespace emulation {

struct Index {
  unsigned x = 0;
};

inline Index threadIdx, blockIdx, blockDim, gridDim;

constexpr int kWarp = 32;

// Which thread comes first is what a kernel may not rely on.
enum class Order { kForward, kBackward };
inline Order order = Order::kForward;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  std::abort();
}

enum class State { kReady, kAtWarp, kAtBlock, kDone };

struct Thread {
  static constexpr size_t kStack = 256 << 10;

  Context context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::kReady;
  uint64_t mail = 0;  // what the lane shows to its warp in a shuffle
};

class Block {
 public:
  explicit Block(int threads) : threads_(threads) {}

  void run(const std::function<void()>& body) {
    body_ = &body;
    current_ = this;
    scheduler_.adopt_own_stack();
    for (size_t t = 0; t < threads_.size(); ++t) start(threads_[t]);
    for (;;) {
      bool ran = false;
      for (size_t k = 0; k < threads_.size(); ++k) {
        const size_t t = order == Order::kForward ? k : threads_.size() - 1 - k;
        if (threads_[t].state != State::kReady) continue;
        active_ = t;
        threadIdx.x = static_cast<unsigned>(t);
        scheduler_.switch_to(threads_[t].context);
        ran = true;
      }
      if (!ran && !release()) return;
    }
  }

  void wait(State state) {
    Thread& thread = threads_[active_];
    thread.state = state;
    thread.context.switch_to(scheduler_);
  }

  Thread& thread(size_t t) { return threads_[t]; }
  size_t size() const { return threads_.size(); }
  size_t active() const { return active_; }
  static Block& current() { return *current_; }

 private:
  void start(Thread& thread) {
    thread.state = State::kReady;
    thread.context.prepare(thread.stack.get(), Thread::kStack, &Block::entry);
  }

  static void entry() {
    Block& block = current();
    block.threads_[block.active_].context.arrived();
    (*block.body_)();
    Thread& thread = block.threads_[block.active_];
    thread.state = State::kDone;
    thread.context.switch_to(block.scheduler_, true);
  }

  // Lets the threads go on that may; false when all are done.
  bool release() {
    size_t done = 0, at_block = 0;
    bool released = false;
    for (size_t first = 0; first < threads_.size(); first += kWarp) {
      int at_warp = 0;
      for (size_t t = first; t < first + kWarp; ++t) {
        done += threads_[t].state == State::kDone;
        at_block += threads_[t].state == State::kAtBlock;
        at_warp += threads_[t].state == State::kAtWarp;
      }
      if (at_warp != kWarp) continue;
      for (size_t t = first; t < first + kWarp; ++t) threads_[t].state = State::kReady;
      released = true;
    }
    if (released) return true;
    if (done == threads_.size()) return false;
    if (at_block != threads_.size()) fail("divergent barrier: not every thread of the warp or block reaches it");
    for (Thread& thread : threads_) thread.state = State::kReady;
    return true;
  }

  static inline Block* current_ = nullptr;

  std::vector<Thread> threads_;
  Context scheduler_;
  const std::function<void()>* body_ = nullptr;
  size_t active_ = 0;
};

inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

inline void block_barrier() { Block::current().wait(State::kAtBlock); }
inline void warp_barrier() { Block::current().wait(State::kAtWarp); }

inline void require_whole_warp(unsigned mask) {
  if (mask != 0xffffffffu) fail("only shuffles and barriers of whole warps are emulated");
}

// Every lane shows `value` and takes what lane `from` shows.
template <class T>
T exchange(T value, int from) {
  static_assert(sizeof(T) <= 8);
  Block& block = Block::current();
  std::memcpy(&block.thread(block.active()).mail, &value, sizeof(T));
  warp_barrier();
  std::memcpy(&value, &block.thread(block.active() / kWarp * kWarp + static_cast<size_t>(from)).mail, sizeof(T));
  warp_barrier();
  return value;
}

// body(shared) once for every thread of every block, with a fresh Shared for each block.
template <class Shared, class Body>
void run_grid(int64_t blocks, int threads, Body body) {
  blockDim.x = static_cast<unsigned>(threads);
  gridDim.x = static_cast<unsigned>(blocks);
  static Block block(threads);  // stacks are kept from launch to launch
  if (block.size() != static_cast<size_t>(threads)) fail("kernels of one size only");
  for (int64_t b = 0; b < blocks; ++b) {
    blockIdx.x = static_cast<unsigned>(b);
    const std::unique_ptr<Shared> shared(new Shared);
    std::memset(static_cast<void*>(shared.get()), 0xff, sizeof(Shared));
    block.run([&] { body(*shared); });
  }
}

}  // namespace emulation
