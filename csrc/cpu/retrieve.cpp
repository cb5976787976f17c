// Torch's side of retrieval and shrunk retrieval: checks, outputs, scalars.
#include "cpu/retrieve.h"

#include <tuple>

#include "checks.h"
#include "cpu/operators.h"
#include "memory_checks.h"

namespace anomem {
namespace {

using std::optional;

using Forward = std::tuple<Tensor, Tensor, Tensor>;

Forward forward(const Tensor& query, const Tensor& keys, const optional<Tensor>& values, const optional<Tensor>& beta,
                double scale, int64_t normalize, const cpu::Shrinkage& shrinkage) {
  check_queries(query);
  const cpu::Memory memory = memory_of(query, query.size(1), keys, values, beta, scale, normalize);
  const int64_t queries = query.size(0);
  const ScalarType sums = accumulator(memory.type);
  Tensor out = empty({queries, memory.value_features}, query.scalar_type());
  Tensor lse = empty({queries}, sums), entropy = empty({shrinkage.entropy ? queries : 0}, sums);
  cpu::retrieve_forward({memory, shrinkage, query.const_data_ptr(), queries, query.stride(0), out.mutable_data_ptr(),
                         lse.mutable_data_ptr(), entropy.mutable_data_ptr()});
  return {out, lse, entropy};
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Backward backward(const Tensor& dout, const optional<Tensor>& dlse, const optional<Tensor>& dentropy,
                  const Tensor& query, const Tensor& keys, const optional<Tensor>& values,
                  const optional<Tensor>& beta, double scale, int64_t normalize, const cpu::Shrinkage& shrinkage,
                  const Tensor& lse) {
  check_queries(query);
  const cpu::Memory memory = memory_of(query, query.size(1), keys, values, beta, scale, normalize);
  const int64_t queries = query.size(0);
  const ScalarType sums = accumulator(memory.type);
  check_shape(dout, "dout", {queries, memory.value_features});
  check_type(dout, "dout", query.scalar_type());
  check_contiguous(dout, "dout");
  for (const optional<Tensor>& per_query : {optional<Tensor>(lse), dlse, dentropy}) {
    if (!per_query) continue;
    check_shape(*per_query, "lse, dlse and dentropy", {queries});
    check_type(*per_query, "lse, dlse and dentropy", sums);
    check_contiguous(*per_query, "lse, dlse and dentropy");
  }
  Tensor dquery = empty({queries, memory.features}, query.scalar_type());
  Tensor dkeys = empty({memory.prototypes, memory.features}, query.scalar_type());
  Tensor dvalues = values ? empty({memory.prototypes, memory.value_features}, query.scalar_type())
                          : empty({0}, query.scalar_type());
  Tensor workspace = empty({cpu::BackwardPlan(memory, queries).workspace}, sums);
  double slope = 0;
  cpu::retrieve_backward({memory, shrinkage, query.const_data_ptr(), queries, query.stride(0), lse.const_data_ptr(),
                          dout.const_data_ptr(), dlse ? dlse->const_data_ptr() : nullptr,
                          dentropy ? dentropy->const_data_ptr() : nullptr, dquery.mutable_data_ptr(),
                          dkeys.mutable_data_ptr(), values ? dvalues.mutable_data_ptr() : nullptr,
                          beta ? &slope : nullptr, workspace.mutable_data_ptr()});
  Tensor dbeta = beta ? scalar(scale * slope, sums) : empty({0}, sums);
  return {dquery, dkeys, dvalues, dbeta};
}

std::tuple<Tensor, Tensor> retrieve_fwd(const Tensor& query, const Tensor& keys, const optional<Tensor>& values,
                                        const optional<Tensor>& beta, double scale, int64_t normalize) {
  Forward result = forward(query, keys, values, beta, scale, normalize, {});
  return {std::get<0>(result), std::get<1>(result)};
}

Backward retrieve_bwd(const Tensor& dout, const optional<Tensor>& dlse, const Tensor& query, const Tensor& keys,
                      const optional<Tensor>& values, const optional<Tensor>& beta, double scale, int64_t normalize,
                      const Tensor&, const Tensor& lse) {
  return backward(dout, dlse, std::nullopt, query, keys, values, beta, scale, normalize, {}, lse);
}

Forward shrink_fwd(const Tensor& query, const Tensor& keys, const optional<Tensor>& values,
                   const optional<Tensor>& beta, double scale, int64_t normalize, double shrink) {
  return forward(query, keys, values, beta, scale, normalize, {true, shrink});
}

Backward shrink_bwd(const Tensor& dout, const optional<Tensor>& dlse, const optional<Tensor>& dentropy,
                    const Tensor& query, const Tensor& keys, const optional<Tensor>& values,
                    const optional<Tensor>& beta, double scale, int64_t normalize, double shrink, const Tensor&,
                    const Tensor& lse, const Tensor&) {
  return backward(dout, dlse, dentropy, query, keys, values, beta, scale, normalize, {true, shrink}, lse);
}

}  // namespace

void register_retrieve(torch::stable::detail::StableLibrary& library) {
  library.impl("native_retrieve_fwd", TORCH_BOX(&retrieve_fwd));
  library.impl("native_retrieve_bwd", TORCH_BOX(&retrieve_bwd));
  library.impl("native_shrink_fwd", TORCH_BOX(&shrink_fwd));
  library.impl("native_shrink_bwd", TORCH_BOX(&shrink_bwd));
}

}  // namespace anomem
