// native_deviation_map.
#include "cpu/deviation_map.h"

#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "cpu/operands.h"

namespace anomem::cpu {
namespace {

Tensor deviation_map(const Tensor& map, const Tensor& keys, const OptionalTensor& values, const OptionalTensor& beta,
                     double scale, int64_t normalize, int64_t distance, const OptionalTensor& log_prior) {
  const Type type = type_of(map, "map");
  const FeatureMap features = map_of(map);
  const Memory memory = memory_of(map, features.channels, keys, values, beta, scale, normalize);
  const ScalarType sums = accumulator(type);
  check_deviation_map(map, keys, values, distance, log_prior, sums);
  Tensor out = empty({features.batch, features.height, features.width}, sums);
  run(DeviationMap{type, memory, features, static_cast<Distance>(distance), optional_data(log_prior),
                   out.mutable_data_ptr()});
  return out;
}

}  // namespace
}  // namespace anomem::cpu

STABLE_TORCH_LIBRARY_IMPL(anomem, CPU, m) { m.impl("native_deviation_map", TORCH_BOX(&anomem::cpu::deviation_map)); }
