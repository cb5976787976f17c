// Registers the CPU implementations of the operators whose schemas anomem/ops/*.py defines.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(anomem, CPU, m) {}
