// Registers the CPU implementations of the operators whose schemas anomem/ops/*.py defines.
#include "cpu/operators.h"

STABLE_TORCH_LIBRARY_IMPL(anomem, CPU, m) {
  anomem::register_contrast(m);
  anomem::register_deviation(m);
  anomem::register_gather(m);
  anomem::register_retrieve(m);
  anomem::register_usage(m);
  anomem::register_variance(m);
}
