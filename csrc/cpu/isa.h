// Which instruction set the kernels run with, chosen once per process.
//
// Every kernel is compiled once per instruction set, in its own namespace (isa_baseline.cpp, isa_avx2.cpp,
// isa_avx512.cpp), so that one library runs on every processor of an architecture and is fast on the recent ones.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ANOMEM_X86_VARIANTS 1
#else
#define ANOMEM_X86_VARIANTS 0
#endif

namespace anomem::cpu {

enum class Isa { baseline, avx2, avx512 };

// The best the processor has, or what ANOMEM_CPU=baseline|avx2|avx512 asks for; throws when that cannot run here.
Isa isa();

}  // namespace anomem::cpu

// Declares a kernel `void name(const Arguments&)` in every namespace and, in anomem::cpu, the function that picks one.
#if ANOMEM_X86_VARIANTS
#define ANOMEM_KERNEL(name, Arguments)                           \
  namespace baseline { void name(const Arguments& arguments); }  \
  namespace avx2 { void name(const Arguments& arguments); }      \
  namespace avx512 { void name(const Arguments& arguments); }    \
  inline void name(const Arguments& arguments) {                 \
    switch (isa()) {                                             \
      case Isa::avx512: return avx512::name(arguments);          \
      case Isa::avx2: return avx2::name(arguments);              \
      default: return baseline::name(arguments);                 \
    }                                                            \
  }
#else
#define ANOMEM_KERNEL(name, Arguments)                           \
  namespace baseline { void name(const Arguments& arguments); }  \
  inline void name(const Arguments& arguments) { baseline::name(arguments); }
#endif
