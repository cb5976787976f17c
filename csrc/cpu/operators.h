// The CPU implementations that csrc/ops.cpp registers. Each file csrc/cpu/<operator>.cpp checks, allocates and calls the
// kernel in <operator>_kernel.h; the schemas are in anomem/ops/*.py.
#pragma once

#include <torch/csrc/stable/library.h>

namespace anomem {

void register_contrast(torch::stable::detail::StableLibrary& library);
void register_deviation(torch::stable::detail::StableLibrary& library);
void register_gather(torch::stable::detail::StableLibrary& library);
void register_retrieve(torch::stable::detail::StableLibrary& library);
void register_usage(torch::stable::detail::StableLibrary& library);
void register_variance(torch::stable::detail::StableLibrary& library);

}  // namespace anomem
