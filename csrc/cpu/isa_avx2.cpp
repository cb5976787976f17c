// The kernels for processors with AVX2 and FMA.
#include "cpu/arguments.h"

#if ANOMEM_X86_VARIANTS
#pragma GCC target("avx2,fma")
#define ANOMEM_ISA avx2
#define ANOMEM_VECTOR_BYTES 32
#include "cpu/kernels.h"
#endif
