// native_retrieve_fwd, native_retrieve_bwd: chunks of queries through the GEMM library, with one fused row pass between
// its products. Nothing of size [N, M] is kept: a chunk's scores live in a scratch that fits into L2.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "memory.h"
#include "rows.cuh"

namespace anomem::cuda {
namespace {

// norm(q) of some rows: a copy in the scratch; without normalisation the rows themselves.
Tensor unit_rows(const DeviceScope& scope, const Tensor& query, const Tensor& scratch, int64_t normalize) {
  if (normalize == kNone) return query;
  const Tensor unit = rows(scratch, 0, query.size(0));
  with_type_of(query, [&](auto zero) {
    normalize_rows<decltype(zero)>(scope, query, unit, static_cast<int>(normalize));
  });
  return unit;
}

std::tuple<Tensor, Tensor> retrieve_forward(const Tensor& query, const Tensor& keys,
                                            const OptionalTensor& values, const OptionalTensor& beta, double scale,
                                            int64_t normalize) {
  check_query(query);
  check_element_type(query, "query");
  check_memory(query, query.size(1), keys, values, beta, ScalarType::Float, normalize);
  const DeviceScope scope(query);
  const Memory memory = make_memory(scope, keys, values, beta, scale, normalize);
  const int64_t count = query.size(0), size = memory.size(), features = query.size(1);
  const Tensor out = empty(query, {count, memory.values.size(1)});
  const Tensor lse = empty(query, {count}, ScalarType::Float);
  const int64_t item = static_cast<int64_t>(query.element_size());
  const int64_t chunk = chunk_rows(count, size * (4 + item) + features * item);
  const Tensor scores = empty(query, {chunk, size}, ScalarType::Float);
  const Tensor weights = empty(query, {chunk, size});
  const Tensor unit = empty(query, {normalize == kNone ? 0 : chunk, features});
  for (int64_t start = 0; start < count; start += chunk) {
    const int64_t n = std::min(chunk, count - start);
    const Tensor s = rows(scores, 0, n), w = rows(weights, 0, n);
    product(s, unit_rows(scope, rows(query, start, n), unit, normalize), transposed(memory.keys));
    softmax(scope, memory, s, {}, w, writable<float>(lse) + start);
    product(rows(out, start, n), w, memory.values);
  }
  return {out, lse};
}

// The sum over chunks of a gradient of the memory, in float32 and in the order of the chunks.
class ChunkedSum {
 public:
  ChunkedSum(const Tensor& like, int64_t size, int64_t features)
      : sum_(torch::stable::new_zeros(like, {size, features}, ScalarType::Float)),
        part_(empty(like, {size, features}, ScalarType::Float)) {}

  void add_product(const DeviceScope& scope, const Tensor& a, const Tensor& b) {
    product(part_, a, b);
    launch<Accumulate>(scope, {writable<float>(sum_), data<float>(part_), sum_.numel()});
  }

  const Tensor& sum() const { return sum_; }

 private:
  Tensor sum_;   // [M, features]
  Tensor part_;  // [M, features]
};

// Gradient of x from that of norm(x), rows [N, d], in the dtype of x.
void normalize_backward(const DeviceScope& scope, const Tensor& x, const Tensor& dy, int64_t normalize,
                        const Tensor& dx) {
  with_type_of(x, [&](auto zero) {
    using T = decltype(zero);
    launch<NormalizeBackward<T>>(scope, {data<T>(x), x.stride(0), data<float>(dy), x.size(0), x.size(1),
                                         static_cast<int>(normalize), writable<T>(dx)});
  });
}

void softmax_backward(const DeviceScope& scope, const Memory& memory, const Tensor& scores, const Tensor& dweights,
                      const float* lse, const float* dlse, const Tensor& weights, const Tensor& dscores,
                      float* dbeta) {
  with_type_of(weights, [&](auto zero) {
    using T = decltype(zero);
    const SoftmaxBackwardArguments<T> a{
        data<float>(scores), data<float>(dweights), lse, dlse, scores.size(0), scores.size(1), memory.scale,
        memory.beta, writable<T>(weights), writable<T>(dscores), dbeta};
    if (a.columns <= kColumnsPerWarp) {
      launch<SoftmaxBackward<T, kWarp>>(scope, a);
    } else {
      launch<SoftmaxBackward<T, kBlock>>(scope, a);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> retrieve_backward(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& query, const Tensor& keys,
    const OptionalTensor& values, const OptionalTensor& beta, double scale, int64_t normalize,
    const Tensor& /* out */, const Tensor& lse) {
  check_query(query);
  check_element_type(query, "query");
  check_memory(query, query.size(1), keys, values, beta, ScalarType::Float, normalize);
  const int64_t count = query.size(0), size = keys.size(0), features = query.size(1);
  const int64_t width = values ? values->size(1) : features;
  check_operand(dout, "dout", query, query.scalar_type(), {count, width});
  check_operand(lse, "lse", query, ScalarType::Float, {count});
  check_operand(dlse, "dlse", query, ScalarType::Float, {count});
  const DeviceScope scope(query);
  const Memory memory = make_memory(scope, keys, values, beta, scale, normalize);
  const Tensor dquery = empty(query, {count, features});
  const Tensor dkeys = empty(keys, {size, features});
  const Tensor dvalues = memory.tied ? empty(keys, {0}) : empty(keys, {size, width});
  const Tensor dbeta_rows = empty(query, {beta ? count : 0}, ScalarType::Float);

  const int64_t item = static_cast<int64_t>(query.element_size());
  const int64_t chunk = chunk_rows(count, size * (8 + 2 * item) + features * (4 + item));
  const Tensor scores = empty(query, {chunk, size}, ScalarType::Float);
  const Tensor dweights = empty(query, {chunk, size}, ScalarType::Float);
  const Tensor weights = empty(query, {chunk, size});
  const Tensor dscores = empty(query, {chunk, size});
  const Tensor unit = empty(query, {normalize == kNone ? 0 : chunk, features});
  const Tensor dunit = empty(query, {chunk, features}, ScalarType::Float);
  ChunkedSum key_sum(query, size, features);
  std::optional<ChunkedSum> value_sum;
  if (!memory.tied) value_sum.emplace(query, size, width);
  ChunkedSum& value_or_key_sum = memory.tied ? key_sum : *value_sum;

  for (int64_t start = 0; start < count; start += chunk) {
    const int64_t n = std::min(chunk, count - start);
    const Tensor s = rows(scores, 0, n), dw = rows(dweights, 0, n), w = rows(weights, 0, n), ds = rows(dscores, 0, n);
    const Tensor dy = rows(dunit, 0, n), up = rows(dout, start, n), raw = rows(query, start, n);
    const Tensor q = unit_rows(scope, raw, unit, normalize);
    product(s, q, transposed(memory.keys));
    product(dw, up, transposed(memory.values));
    softmax_backward(scope, memory, s, dw, data<float>(lse) + start, dlse ? data<float>(*dlse) + start : nullptr, w, ds,
                     beta ? writable<float>(dbeta_rows) + start : nullptr);
    product(dy, ds, memory.keys);
    normalize_backward(scope, raw, dy, normalize, rows(dquery, start, n));
    key_sum.add_product(scope, transposed(ds), q);
    value_or_key_sum.add_product(scope, transposed(w), up);
  }
  normalize_backward(scope, keys, key_sum.sum(), normalize, dkeys);
  if (!memory.tied) normalize_backward(scope, *values, value_sum->sum(), kNone, dvalues);
  return {dquery, dkeys, dvalues, beta ? torch::stable::sum(dbeta_rows) : dbeta_rows};
}

}  // namespace
}  // namespace anomem::cuda

STABLE_TORCH_LIBRARY_IMPL(anomem, ANOMEM_KEY, m) {
  m.impl("native_retrieve_fwd", TORCH_BOX(&anomem::cuda::retrieve_forward));
  m.impl("native_retrieve_bwd", TORCH_BOX(&anomem::cuda::retrieve_backward));
}
