// native_contrast_block_fwd, native_contrast_block_bwd.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/contrast.h"
#include "cpu/isa.h"
#include "cpu/library_product.h"
#include "cpu/operands.h"

namespace anomem::cpu {
namespace {

Rows block_of(const Tensor& block, const char* argument) {
  check_shape(block, argument, {"R", Axis("d", 1)});
  check_unit_stride(block, argument);
  return {block.const_data_ptr(), 0, block.stride(0)};
}

// Two blocks [R, d] and [C, d], or one and itself.
struct Blocks {
  Rows rows[2];
  Type type;
  ScalarType elements, sums;
  int64_t count[2], features;
  bool same, library;

  Blocks(const Tensor& block, const OptionalTensor& other)
      : rows{block_of(block, "block"), other ? block_of(*other, "other") : block_of(block, "block")},
        type(type_of(block, "block")),
        elements(block.scalar_type()),
        sums(accumulator(type)),
        count{block.size(0), other ? other->size(0) : block.size(0)},
        features(block.size(1)),
        same(!other),
        library(takes_library_products(type, count[0], count[1], features)) {
    if (other) {
      check_device(*other, "other", block);
      check_type(*other, "other", elements);
      check_shape(*other, "other", {"C", features});
    } else if (count[0] % 2 != 0) {
      refuse("block", "an even number of rows, a pair for each image", std::to_string(count[0]));
    }
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& block, const OptionalTensor& other, double tau) {
  const Blocks blocks(block, other);
  Tensor lse = empty({blocks.count[0]}, ScalarType::Double);
  Tensor other_lse = empty({blocks.same ? 0 : blocks.count[1]}, ScalarType::Double);
  Workspace workspace(contrast_block_forward_workspace(blocks.count, blocks.features, blocks.library, blocks.same),
                      blocks.sums);
  run(ContrastBlockForward{blocks.type,
                           blocks.library,
                           blocks.same,
                           {blocks.count[0], blocks.count[1]},
                           blocks.features,
                           tau,
                           {blocks.rows[0], blocks.rows[1]},
                           {lse.mutable_data_ptr<double>(), other_lse.mutable_data_ptr<double>()},
                           workspace.data()});
  return {lse, other_lse};
}

Tensor backward(const Tensor& block, const OptionalTensor& other, const Tensor& lse, const OptionalTensor& other_lse,
                double tau) {
  const Blocks blocks(block, other);
  check_operand(lse, "lse", block, ScalarType::Double, {blocks.count[0]});
  if (other_lse.has_value() != other.has_value())
    refuse("other_lse", other ? "a log-sum for each row of `other`" : "None, as there is no `other`",
           other_lse ? "a tensor" : "None");
  if (other_lse) check_operand(*other_lse, "other_lse", block, ScalarType::Double, {blocks.count[1]});
  Tensor gradient = empty({blocks.count[0], blocks.features}, blocks.elements);
  Workspace workspace(contrast_block_backward_workspace(blocks.count, blocks.features, blocks.same), blocks.sums);
  const double* sums = lse.const_data_ptr<double>();
  run(ContrastBlockBackward{blocks.type,
                            blocks.library,
                            blocks.same,
                            {blocks.count[0], blocks.count[1]},
                            blocks.features,
                            tau,
                            {blocks.rows[0], blocks.rows[1]},
                            {sums, other_lse ? other_lse->const_data_ptr<double>() : sums},
                            gradient.mutable_data_ptr(),
                            workspace.data()});
  return gradient;
}

}  // namespace
}  // namespace anomem::cpu

STABLE_TORCH_LIBRARY_IMPL(anomem, CPU, m) {
  m.impl("native_contrast_block_fwd", TORCH_BOX(&anomem::cpu::forward));
  m.impl("native_contrast_block_bwd", TORCH_BOX(&anomem::cpu::backward));
}
