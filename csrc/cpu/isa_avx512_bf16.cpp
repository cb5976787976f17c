// The kernels of bfloat16 tensors for processors that multiply pairs of bfloat16 (AVX512-BF16). They multiply quads of
// bytes too (AVX512-VNNI).
#include "cpu/arguments.h"

#if ANOMEM_X86_VARIANTS
#include <immintrin.h>

#pragma GCC target("avx512bf16,avx512vnni,avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define ANOMEM_ISA avx512_bf16
#define ANOMEM_VECTOR_BYTES 64
#define ANOMEM_BFLOAT16_PAIRS 1
#include "cpu/kernels.h"
#endif
