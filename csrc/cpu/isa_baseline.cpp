// The kernels for every processor of the architecture: SSE2, NEON.
#include "cpu/arguments.h"

#define ANOMEM_ISA baseline
#define ANOMEM_VECTOR_BYTES 16
#include "cpu/kernels.h"
