// The kernels for processors with AVX-512 (F, DQ, BW, VL).
#include "cpu/arguments.h"

#if ANOMEM_X86_VARIANTS
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define ANOMEM_ISA avx512
#define ANOMEM_VECTOR_BYTES 64
#include "cpu/kernels.h"
#endif
