// The kernels for what every processor of the architecture has: SSE2, NEON.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/types.h"

#define ANOMEM_ISA baseline
#define ANOMEM_VECTOR_BYTES 16
#include "cpu/kernels.h"
