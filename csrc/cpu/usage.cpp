// Torch's side of the usage of a memory.
#include "cpu/usage.h"

#include <tuple>

#include "checks.h"
#include "cpu/operators.h"
#include "memory_checks.h"

namespace anomem {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> usage(const Tensor& query, const Tensor& keys,
                                                 const std::optional<Tensor>& beta, double scale, int64_t normalize) {
  check_queries(query);
  const cpu::Memory memory = memory_of(query, query.size(1), keys, std::nullopt, beta, scale, normalize);
  const ScalarType sums = accumulator(memory.type);
  Tensor count = empty({memory.prototypes}, ScalarType::Long), mass = empty({memory.prototypes}, sums);
  Tensor entropy = empty({query.size(0)}, sums), direction = empty({memory.features}, sums);
  cpu::usage({memory, query.const_data_ptr(), query.size(0), query.stride(0), count.mutable_data_ptr<int64_t>(),
              mass.mutable_data_ptr(), entropy.mutable_data_ptr(), direction.mutable_data_ptr()});
  return {count, mass, entropy, direction};
}

}  // namespace

void register_usage(torch::stable::detail::StableLibrary& library) {
  library.impl("native_usage", TORCH_BOX(&usage));
}

}  // namespace anomem
