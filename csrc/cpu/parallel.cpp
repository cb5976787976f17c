// Torch's threads.
#include "cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace anomem::cpu {

void run_parallel(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
  if (count == 1) return body(0, 1, context);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

}  // namespace anomem::cpu
