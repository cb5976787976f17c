// The instruction set that the kernels run with, chosen once per process.
//
// kernels.h is compiled once per instruction set, in a namespace of its own (isa_baseline.cpp, isa_avx2.cpp,
// isa_avx512.cpp, isa_avx512_bf16.cpp). One library therefore runs on every processor of an architecture and is fast on
// recent ones. avx512_bf16 multiplies pairs of bfloat16 (factors.h). It serves tensors of that type, and those of
// float32 where a rough product finds candidates (candidates.h).
#pragma once

#include "cpu/types.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ANOMEM_X86_VARIANTS 1
#else
#define ANOMEM_X86_VARIANTS 0
#endif

namespace anomem::cpu {

enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

// The best that the processor has, or the one that ANOMEM_CPU=baseline|avx2|avx512|avx512_bf16 names. Throws if the
// processor lacks it.
Isa isa();

// The kernel of these arguments in each instruction set; kernels.h has the instances.
namespace baseline {
template <class Arguments>
void run(const Arguments& arguments);
}
namespace avx2 {
template <class Arguments>
void run(const Arguments& arguments);
}
namespace avx512 {
template <class Arguments>
void run(const Arguments& arguments);
}
namespace avx512_bf16 {
template <class Arguments>
void run(const Arguments& arguments);
}

// Runs the kernel of these arguments, for the element type `arguments.type`, with the chosen instruction set.
template <class Arguments>
void run(const Arguments& arguments) {
#if ANOMEM_X86_VARIANTS
  switch (isa()) {
    case Isa::kAvx512Bf16:
      if (arguments.type == Type::kBfloat16 || (kRoughProducts<Arguments> && arguments.type == Type::kFloat32))
        return avx512_bf16::run(arguments);
      [[fallthrough]];
    case Isa::kAvx512: return avx512::run(arguments);
    case Isa::kAvx2: return avx2::run(arguments);
    case Isa::kBaseline: break;
  }
#endif
  baseline::run(arguments);
}

}  // namespace anomem::cpu
