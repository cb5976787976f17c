// Torch's threads.
#include "cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

#include <exception>
#include <mutex>

namespace anomem::cpu {

void run_parallel(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
  if (count == 1) return body(0, 1, context);
  // An exception that passed torch's boundary in C would lose its type.
  std::mutex mutex;
  std::exception_ptr thrown;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    try {
      body(begin, end, context);
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!thrown) thrown = std::current_exception();
    }
  });
  if (thrown) std::rethrow_exception(thrown);
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

}  // namespace anomem::cpu
