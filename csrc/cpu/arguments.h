// All that the kernels share with the rest of the library, and the standard headers they need.
//
// Every isa_*.cpp includes this before its target pragma. The linker keeps one copy of an inline function for all
// files. Compiled under the pragma, that copy could use instructions that the processor lacks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>

#include "cpu/augment.h"
#include "cpu/batch_norm.h"
#include "cpu/contrast.h"
#include "cpu/conv3x3.h"
#include "cpu/deviation_map.h"
#include "cpu/downsample.h"
#include "cpu/isa.h"
#include "cpu/library_product.h"
#include "cpu/nearest.h"
#include "cpu/parallel.h"
#include "cpu/read.h"
#include "cpu/retrieve.h"
#include "cpu/sampling.h"
#include "cpu/scratch.h"
#include "cpu/tile_product.h"
#include "cpu/types.h"
#include "cpu/usage.h"

#if ANOMEM_X86_VARIANTS
#include <immintrin.h>
#endif
