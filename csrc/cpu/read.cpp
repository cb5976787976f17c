// native_read.
#include "cpu/read.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/isa.h"
#include "cpu/operands.h"

namespace anomem::cpu {
namespace {

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Result read(const Tensor& query, const Tensor& keys, const OptionalTensor& beta, double scale,
            const OptionalTensor& bias, int64_t normalize, int64_t top_k, bool nearest, bool deviation) {
  const Type type = type_of(query, "query");
  const BankRows rows = bank_rows_of(query, "query", keys, "keys");
  const int64_t banks = keys.size(0), prototypes = keys.size(1), features = keys.size(2);
  const ScalarType sums = accumulator(type);
  check_scalar(beta, "beta", query, sums);
  check_operand(bias, "bias", query, sums, {banks, prototypes});
  if (normalize < 0 || normalize > 2) refuse("normalize", "0, 1 or 2", std::to_string(normalize));
  const int64_t most = prototypes < kMostCandidates ? prototypes : kMostCandidates;
  if (top_k < 0 || top_k > most) refuse("top_k", "0 to " + std::to_string(most), std::to_string(top_k));
  const auto numbers = [&](bool wanted, ScalarType of) { return empty({banks, wanted ? rows.count : 0}, of); };
  Tensor out = empty({banks, rows.count, features}, query.scalar_type());
  Tensor residual = numbers(true, sums), cosine = numbers(true, sums), distance = numbers(nearest, sums);
  Tensor index = numbers(nearest, ScalarType::Long), entropy = numbers(true, sums), lse = numbers(true, sums);
  run(Read{type, rows, keys.const_data_ptr(), banks, prototypes, features, static_cast<Normalize>(normalize),
           scale * value_of(beta, 1), optional_data(bias), top_k, nearest, deviation, out.mutable_data_ptr(),
           residual.mutable_data_ptr(), cosine.mutable_data_ptr(), distance.mutable_data_ptr(),
           index.mutable_data_ptr<int64_t>(), entropy.mutable_data_ptr(), lse.mutable_data_ptr()});
  return {out, residual, cosine, distance, index, entropy, lse};
}

}  // namespace
}  // namespace anomem::cpu

STABLE_TORCH_LIBRARY_IMPL(anomem, CPU, m) { m.impl("native_read", TORCH_BOX(&anomem::cpu::read)); }
