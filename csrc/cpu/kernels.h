// All kernel bodies, compiled by each isa_*.cpp in its own namespace. One line per operator.
#include "cpu/gemm.h"
#include "cpu/info_nce_kernel.h"
#include "cpu/nt_xent_kernel.h"
#include "cpu/retrieve_kernel.h"
#include "cpu/simd.h"
