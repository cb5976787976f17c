// native_nearest, native_k_center.
#include "cpu/nearest.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/isa.h"
#include "cpu/operands.h"

namespace anomem::cpu {
namespace {

std::tuple<Tensor, Tensor> nearest(const Tensor& x, const Tensor& prototypes, int64_t k) {
  const Type type = type_of(x, "x");
  const BankRows rows = bank_rows_of(x, "x", prototypes, "prototypes");
  const int64_t banks = prototypes.size(0), count = prototypes.size(1), features = prototypes.size(2);
  const int64_t most = count < kMostCandidates ? count : kMostCandidates;
  if (k < 1 || k > most) refuse("k", "1 to " + std::to_string(most), std::to_string(k));
  Tensor distance = empty({banks, rows.count, k}, accumulator(type));
  Tensor index = empty({banks, rows.count, k}, ScalarType::Long);
  run(Nearest{type, rows, prototypes.const_data_ptr(), banks, count, features, k, distance.mutable_data_ptr(),
              index.mutable_data_ptr<int64_t>()});
  return {distance, index};
}

Tensor k_center(const Tensor& x, int64_t count, int64_t first) {
  check_shape(x, "x", {Axis("N", 1), Axis("d", 1)});
  check_unit_stride(x, "x");
  if (count < 1 || count > x.size(0)) refuse("count", "1 to " + std::to_string(x.size(0)), std::to_string(count));
  if (first < 0 || first >= x.size(0))
    refuse("first", "an index from 0 to " + std::to_string(x.size(0) - 1), std::to_string(first));
  Tensor index = empty({count}, ScalarType::Long);
  run(KCenter{type_of(x, "x"), queries_of(x), x.size(1), first, count, index.mutable_data_ptr<int64_t>()});
  return index;
}

}  // namespace
}  // namespace anomem::cpu

STABLE_TORCH_LIBRARY_IMPL(anomem, CPU, m) {
  m.impl("native_nearest", TORCH_BOX(&anomem::cpu::nearest));
  m.impl("native_k_center", TORCH_BOX(&anomem::cpu::k_center));
}
