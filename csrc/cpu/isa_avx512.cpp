// The kernels for processors with AVX-512 (F, DQ, BW, VL).
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
// After the standard headers: their inline functions may be shared with other files and must run everywhere.
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define ANOMEM_ISA avx512
#define ANOMEM_VECTOR_BYTES 64
#include "cpu/kernels.h"
#endif
