// native_retrieve_fwd, native_retrieve_bwd, native_retrieve_kept_fwd, native_retrieve_kept_bwd, native_retrieve_blocks,
// native_shrink_fwd, native_shrink_bwd.
#include "cpu/retrieve.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/isa.h"
#include "cpu/operands.h"

namespace anomem::cpu {
namespace {

struct Forward {
  Tensor out, lse;
  std::optional<Tensor> entropy, kept;  // where there are any
};

// Numbers kept of each query.
int64_t kept_width(bool in_blocks, Type type, const Memory& memory, int64_t queries) {
  return in_blocks ? kept_in_blocks(type, memory.value_features, queries) : kept_stride(memory.prototypes);
}

Forward forward(const Tensor& query, const Tensor& keys, const OptionalTensor& values, const OptionalTensor& beta,
                double scale, int64_t normalize, const Shrinkage& shrinkage, std::optional<int64_t> kept = {}) {
  check_query(query);
  const Type type = type_of(query, "query");
  const Memory memory = memory_of(query, query.size(1), keys, values, beta, scale, normalize);
  const int64_t queries = query.size(0);
  const ScalarType sums = accumulator(type);
  Tensor out = empty_result(queries, memory.value_features, query.scalar_type());
  Tensor lse = empty({queries}, sums);
  std::optional<Tensor> entropy, weights;
  if (shrinkage.entropy) entropy = empty({queries}, sums);
  const bool in_blocks = reads_in_blocks(type, memory);
  if (kept) {
    if (*kept < 0 || *kept > queries) refuse("kept", "0 to N queries", std::to_string(*kept));
    weights = empty_result(*kept, kept_width(in_blocks, type, memory, queries), in_blocks ? sums : query.scalar_type());
  }
  run(RetrieveForward{type,
                      memory,
                      shrinkage,
                      queries_of(query),
                      out.mutable_data_ptr(),
                      lse.mutable_data_ptr(),
                      entropy ? entropy->mutable_data_ptr() : nullptr,
                      {kept.value_or(0), weights ? weights->mutable_data_ptr() : nullptr, in_blocks}});
  return {out, lse, entropy, weights};
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Backward backward(const Tensor& dout, const OptionalTensor& dlse, const OptionalTensor& dentropy, const Tensor& query,
                  const Tensor& keys, const OptionalTensor& values, const OptionalTensor& beta, double scale,
                  int64_t normalize, const Shrinkage& shrinkage, const Tensor& lse,
                  const OptionalTensor& weights = std::nullopt) {
  check_query(query);
  const Type type = type_of(query, "query");
  const Memory memory = memory_of(query, query.size(1), keys, values, beta, scale, normalize);
  const int64_t queries = query.size(0);
  const ScalarType elements = query.scalar_type(), sums = accumulator(type);
  check_operand(dout, "dout", query, elements, {queries, memory.value_features});
  check_operand(lse, "lse", query, sums, {queries});
  check_operand(dlse, "dlse", query, sums, {queries});
  check_operand(dentropy, "dentropy", query, sums, {queries});
  // The forward pass decided what is kept; torch.backends.mkldnn may have changed since.
  const bool told_by_type = elements != sums;  // else by the width: a memory in blocks has four prototypes a feature
  const bool of_blocks =
      weights && weights->dim() == 2 &&
      (told_by_type ? weights->scalar_type() == sums : weights->size(1) != kept_stride(memory.prototypes));
  check_operand(weights, "weights", query, of_blocks ? sums : elements,
                {"kept", kept_width(of_blocks, type, memory, queries)});
  const bool in_blocks = of_blocks && reads_in_blocks(type, memory);
  Kept<const void> kept{weights ? weights->size(0) : 0, optional_data(weights).data, in_blocks};
  if (kept.rows > queries) refuse("weights", "at most N rows", std::to_string(kept.rows));
  if (of_blocks && !in_blocks) kept = {};
  Tensor dquery = empty_result(queries, memory.features, elements);
  Tensor dkeys = empty_result(memory.prototypes, memory.features, elements);
  Tensor dvalues = values ? empty_result(memory.prototypes, memory.value_features, elements) : empty({0}, elements);
  Workspace workspace(BackwardPlan(type, memory, queries, in_blocks).workspace, sums);
  double slope = 0;
  run(RetrieveBackward{type, memory, shrinkage, queries_of(query), lse.const_data_ptr(), dout.const_data_ptr(),
                       optional_data(dlse), optional_data(dentropy), dquery.mutable_data_ptr(),
                       dkeys.mutable_data_ptr(), dvalues.mutable_data_ptr(), beta ? &slope : nullptr, workspace.data(),
                       kept});
  Tensor dbeta = beta ? scalar(scale * slope, sums) : empty({0}, sums);
  return {dquery, dkeys, dvalues, dbeta};
}

std::tuple<Tensor, Tensor> retrieve_forward(const Tensor& query, const Tensor& keys, const OptionalTensor& values,
                                            const OptionalTensor& beta, double scale, int64_t normalize) {
  Forward result = forward(query, keys, values, beta, scale, normalize, {});
  return {result.out, result.lse};
}

std::tuple<Tensor, Tensor, Tensor> retrieve_kept_forward(const Tensor& query, const Tensor& keys,
                                                         const OptionalTensor& values, double scale, int64_t normalize,
                                                         int64_t kept) {
  Forward result = forward(query, keys, values, std::nullopt, scale, normalize, {}, kept);
  return {result.out, result.lse, *result.kept};
}

std::tuple<Tensor, Tensor, Tensor> retrieve_kept_backward(const Tensor& dout, const OptionalTensor& dlse,
                                                          const Tensor& query, const Tensor& keys,
                                                          const OptionalTensor& values, double scale, int64_t normalize,
                                                          const Tensor& lse, const Tensor& weights) {
  Backward result =
      backward(dout, dlse, std::nullopt, query, keys, values, std::nullopt, scale, normalize, {}, lse, weights);
  return {std::get<0>(result), std::get<1>(result), std::get<2>(result)};
}

Backward retrieve_backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& query, const Tensor& keys,
                           const OptionalTensor& values, const OptionalTensor& beta, double scale, int64_t normalize,
                           const Tensor& /* out */, const Tensor& lse) {
  return backward(dout, dlse, std::nullopt, query, keys, values, beta, scale, normalize, {}, lse);
}

std::tuple<Tensor, Tensor, Tensor> shrink_forward(const Tensor& query, const Tensor& keys, const OptionalTensor& values,
                                                  const OptionalTensor& beta, double scale, int64_t normalize,
                                                  double shrink) {
  Forward result = forward(query, keys, values, beta, scale, normalize, {true, shrink});
  return {result.out, result.lse, *result.entropy};
}

Backward shrink_backward(const Tensor& dout, const OptionalTensor& dlse, const OptionalTensor& dentropy,
                         const Tensor& query, const Tensor& keys, const OptionalTensor& values,
                         const OptionalTensor& beta, double scale, int64_t normalize, double shrink,
                         const Tensor& lse) {
  return backward(dout, dlse, dentropy, query, keys, values, beta, scale, normalize, {true, shrink}, lse);
}

bool tells_blocks(const Tensor& query, const Tensor& keys, const OptionalTensor& values) {
  check_query(query);
  return reads_in_blocks(type_of(query, "query"), memory_of(query, query.size(1), keys, values, std::nullopt, 1, 0));
}

}  // namespace
}  // namespace anomem::cpu

STABLE_TORCH_LIBRARY_IMPL(anomem, CPU, m) {
  m.impl("native_retrieve_fwd", TORCH_BOX(&anomem::cpu::retrieve_forward));
  m.impl("native_retrieve_bwd", TORCH_BOX(&anomem::cpu::retrieve_backward));
  m.impl("native_retrieve_kept_fwd", TORCH_BOX(&anomem::cpu::retrieve_kept_forward));
  m.impl("native_retrieve_kept_bwd", TORCH_BOX(&anomem::cpu::retrieve_kept_backward));
  m.impl("native_retrieve_blocks", TORCH_BOX(&anomem::cpu::tells_blocks));
  m.impl("native_shrink_fwd", TORCH_BOX(&anomem::cpu::shrink_forward));
  m.impl("native_shrink_bwd", TORCH_BOX(&anomem::cpu::shrink_backward));
}
