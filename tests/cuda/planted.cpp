// A kernel that reverses a block's numbers through shared memory, sound or with a bug planted, to show that the emulation
// catches such bugs. Usage: planted sound | missing-barrier | divergent-barrier | out-of-bounds | misaligned.
#include <cstdio>
#include <memory>
#include <string>

#include "cuda/primitives.cuh"

namespace {

constexpr int kThreads = anomem::cuda::kBlock;

struct Shared {
  float numbers[kThreads];
};

void reverse(const std::string& bug, const float* in, float* out, Shared& shared) {
  const int t = static_cast<int>(threadIdx.x);
  shared.numbers[t] = in[bug == "out-of-bounds" ? t + 1 : t];
  if (bug == "divergent-barrier") {
    if (t % anomem::cuda::kWarp < 16) __syncthreads();
  } else if (bug != "missing-barrier") {
    __syncthreads();
  }
  out[t] = shared.numbers[kThreads - 1 - t];
  if (bug == "misaligned" && t == 0) out[0] = static_cast<float>(reinterpret_cast<const uint4*>(in + 1)->x);
}

bool reversed_under(emulation::Order order, const std::string& bug) {
  const std::unique_ptr<float[]> in(new float[kThreads]), out(new float[kThreads]);
  for (int i = 0; i < kThreads; ++i) in[i] = static_cast<float>(i);
  emulation::order = order;
  emulation::run_grid<Shared>(1, kThreads, [&](Shared& shared) { reverse(bug, in.get(), out.get(), shared); });
  for (int i = 0; i < kThreads; ++i) {
    if (out[i] != static_cast<float>(kThreads - 1 - i)) return false;
  }
  return true;
}

}  // namespace

int main(int, char** arguments) {
  const std::string bug = arguments[1];
  for (const emulation::Order order : {emulation::Order::kForward, emulation::Order::kBackward}) {
    if (!reversed_under(order, bug)) {
      std::fprintf(stderr, "wrong result\n");
      return 1;
    }
  }
  return 0;
}
