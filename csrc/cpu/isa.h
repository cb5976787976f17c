// Which instruction set the kernels run with, chosen once per process.
//
// Every kernel is compiled once per instruction set, in its own namespace (isa_baseline.cpp, isa_avx2.cpp,
// isa_avx512.cpp), so that one library runs on every processor of an architecture and is fast on the recent ones.
// avx512_bf16 has products of bfloat16 (pairs.h) and is for tensors of that type only.
#pragma once

#include "cpu/types.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ANOMEM_X86_VARIANTS 1
#else
#define ANOMEM_X86_VARIANTS 0
#endif

namespace anomem::cpu {

enum class Isa { baseline, avx2, avx512, avx512_bf16 };

// The best that the processor has, or what ANOMEM_CPU=baseline|avx2|avx512|avx512_bf16 asks for; throws when that cannot
// run here.
Isa isa();

}  // namespace anomem::cpu

// Declares a kernel `void name(const Arguments&)`, whose element type is `arguments.type`, in every namespace and, in
// anomem::cpu, the function that picks one.
#if ANOMEM_X86_VARIANTS
#define ANOMEM_KERNEL(name, Arguments, type)                        \
  namespace baseline { void name(const Arguments& arguments); }     \
  namespace avx2 { void name(const Arguments& arguments); }         \
  namespace avx512 { void name(const Arguments& arguments); }       \
  namespace avx512_bf16 { void name(const Arguments& arguments); }  \
  inline void name(const Arguments& arguments) {                    \
    switch (isa()) {                                                \
      case Isa::avx512_bf16:                                        \
        if (arguments.type == Type::bf16) return avx512_bf16::name(arguments); \
        [[fallthrough]];                                            \
      case Isa::avx512: return avx512::name(arguments);             \
      case Isa::avx2: return avx2::name(arguments);                 \
      default: return baseline::name(arguments);                    \
    }                                                               \
  }
#else
#define ANOMEM_KERNEL(name, Arguments, type)                     \
  namespace baseline { void name(const Arguments& arguments); }  \
  inline void name(const Arguments& arguments) { baseline::name(arguments); }
#endif
