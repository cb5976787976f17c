// Torch's side of the deviation map.
#include "cpu/deviation.h"

#include "checks.h"
#include "cpu/operators.h"
#include "map_checks.h"
#include "memory_checks.h"

namespace anomem {
namespace {

using std::optional;

Tensor deviation_map(const Tensor& map, const Tensor& keys, const optional<Tensor>& values,
                     const optional<Tensor>& beta, double scale, int64_t normalize, int64_t distance,
                     const optional<Tensor>& log_prior) {
  const cpu::FeatureMap features = map_of(map);
  const cpu::Memory memory = memory_of(map, features.channels, keys, values, beta, scale, normalize);
  STD_TORCH_CHECK(memory.value_features == memory.features, "values: expected [M, d], as wide as the keys");
  STD_TORCH_CHECK(distance == 0 || distance == 1, "distance: expected 0 or 1");
  const ScalarType sums = accumulator(memory.type);
  if (log_prior) {
    check_shape(*log_prior, "log_prior", {features.area(), memory.prototypes});
    check_type(*log_prior, "log_prior", sums);
    check_contiguous(*log_prior, "log_prior");
  }
  Tensor out = empty({features.batch, features.height, features.width}, sums);
  cpu::deviation_map({memory, features, cpu::Distance(distance), log_prior ? log_prior->const_data_ptr() : nullptr,
                      out.mutable_data_ptr()});
  return out;
}

}  // namespace

void register_deviation(torch::stable::detail::StableLibrary& library) {
  library.impl("native_deviation_map", TORCH_BOX(&deviation_map));
}

}  // namespace anomem
