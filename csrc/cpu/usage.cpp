// native_usage.
#include "cpu/usage.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/isa.h"
#include "cpu/operands.h"

namespace anomem::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> usage(const Tensor& query, const Tensor& keys, const OptionalTensor& beta,
                                                 double scale, int64_t normalize) {
  check_query(query);
  const Type type = type_of(query, "query");
  const Memory memory = memory_of(query, query.size(1), keys, std::nullopt, beta, scale, normalize);
  const ScalarType sums = accumulator(type);
  Tensor count = empty({memory.prototypes}, ScalarType::Long), mass = empty({memory.prototypes}, sums);
  Tensor entropy = empty({query.size(0)}, sums), direction = empty({memory.features}, sums);
  run(Usage{type, memory, queries_of(query), count.mutable_data_ptr<int64_t>(), mass.mutable_data_ptr(),
            entropy.mutable_data_ptr(), direction.mutable_data_ptr()});
  return {count, mass, entropy, direction};
}

}  // namespace
}  // namespace anomem::cpu

STABLE_TORCH_LIBRARY_IMPL(anomem, CPU, m) { m.impl("native_usage", TORCH_BOX(&anomem::cpu::usage)); }
