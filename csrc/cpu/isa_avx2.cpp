// The kernels for processors with AVX2 and FMA.
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
#pragma GCC target("avx2,fma")
#define ANOMEM_ISA avx2
#define ANOMEM_VECTOR_BYTES 32
#include "cpu/kernels.h"
#endif
