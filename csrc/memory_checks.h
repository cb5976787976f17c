// What the operators that read a memory have in common: its checks.
#pragma once

#include "checks.h"
#include "cpu/memory.h"

namespace anomem {

inline void check_queries(const Tensor& query) {
  STD_TORCH_CHECK(query.dim() == 2, "query: expected [N, d]");
  STD_TORCH_CHECK(query.size(1) <= 1 || query.stride(1) == 1, "query: expected unit inner stride");
}

// The memory of a call, checked against the tensor of d features per vector that it is read by.
inline cpu::Memory memory_of(const Tensor& queries, int64_t features, const Tensor& keys,
                             const std::optional<Tensor>& values, const std::optional<Tensor>& beta, double scale,
                             int64_t normalize) {
  const cpu::Type type = type_of(queries, "query");
  STD_TORCH_CHECK(normalize >= 0 && normalize <= 2, "normalize: expected 0, 1 or 2");
  STD_TORCH_CHECK(keys.dim() == 2 && keys.size(0) > 0 && keys.size(1) > 0,
                  "keys: expected [M, d] with at least one row and one column");
  check_shape(keys, "keys", {keys.size(0), features});
  check_type(keys, "keys", queries.scalar_type());
  check_contiguous(keys, "keys");
  if (values) {
    STD_TORCH_CHECK(values->dim() == 2 && values->size(0) == keys.size(0), "values: expected [M, dv]");
    check_type(*values, "values", queries.scalar_type());
    check_contiguous(*values, "values");
  }
  return {type,
          keys.const_data_ptr(),
          values ? values->const_data_ptr() : nullptr,
          keys.size(0),
          features,
          values ? values->size(1) : features,
          cpu::Normalize(normalize),
          beta ? scale * scalar_value(*beta, "beta") : scale};
}

}  // namespace anomem
