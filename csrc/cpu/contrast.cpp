#include "cpu/operators.h"

namespace anomem {

void register_contrast(torch::stable::detail::StableLibrary&) {}

}  // namespace anomem
