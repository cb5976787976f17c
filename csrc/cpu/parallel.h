// Torch's threads without torch's headers: the kernels compile fast, and none of torch's inline functions are compiled
// for one instruction set (see arguments.h).
#pragma once

#include <cstdint>

namespace anomem::cpu {

// Runs body(begin, end, context) over [0, count) in contiguous pieces, on the threads of torch.set_num_threads.
void run_parallel(int64_t count, void (*body)(int64_t, int64_t, void*), void* context);

// torch.get_num_threads.
int64_t thread_count();

// Calls f(begin, end) for contiguous pieces of [0, count), in parallel: for scratch that all items of a piece share.
template <class F>
void parallel_ranges(int64_t count, const F& f) {
  run_parallel(
      count, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// Calls f(item) for every item in [0, count), in parallel. Results do not depend on the number of threads if items are
// independent of each other and their division does not depend on it.
template <class F>
void parallel(int64_t count, const F& f) {
  parallel_ranges(count, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) f(item);
  });
}

}  // namespace anomem::cpu
