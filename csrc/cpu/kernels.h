// All kernel bodies, compiled by each isa_*.cpp in its own namespace. One line per operator.
#include "cpu/deviation_kernel.h"
#include "cpu/gather_kernel.h"
#include "cpu/info_nce_kernel.h"
#include "cpu/nt_xent_kernel.h"
#include "cpu/retrieve_kernel.h"
#include "cpu/usage_kernel.h"
#include "cpu/variance_kernel.h"
