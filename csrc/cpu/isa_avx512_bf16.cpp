// The kernels of bfloat16 tensors for processors with AVX-512 that multiply pairs of such numbers (AVX512-BF16).
#define ANOMEM_BFLOAT16_PAIRS 1

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/types.h"

#if ANOMEM_X86_VARIANTS
#include <immintrin.h>

// After the standard headers: their inline functions may be shared with other files and must run everywhere.
#pragma GCC target("avx512bf16,avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define ANOMEM_ISA avx512_bf16
#define ANOMEM_VECTOR_BYTES 64
#include "cpu/kernels.h"
#endif
