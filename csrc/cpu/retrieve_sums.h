// What a chunk of queries adds to the gradient of a memory, by the library's products: dvalues [dv, M] += dOᵀ P and
// dkeys [d, M] += Qᵀ dS.
#pragma once

#include "cpu/factors.h"
#include "cpu/product.h"

namespace anomem::cpu::ANOMEM_ISA {

// The left factors: upstream gradients [dv, rows] and scaled queries [d, rows], columns of a chunk. Those of a tied
// memory lie beside each other, [d, 2 · rows].
template <class S>
struct ChunkColumns {
  using Element = typename FactorRows<S>::Element;

  Element *dout, *query;
  int64_t stride;

  // `to`: rows · (dv + d) elements.
  ChunkColumns(void* to, const Memory& memory, int64_t rows)
      : dout(static_cast<Element*>(to)),
        query(dout + (memory.tied() ? rows : memory.value_features * rows)),
        stride(memory.tied() ? 2 * rows : rows) {}
};

// Their parts, where products are in tiles: of both sides, for a tied memory of the whole in `query`.
struct ColumnParts {
  const Bfloat16 *dout = nullptr, *query = nullptr;
};

// `weights` and `gradient` are what `in_columns` leaves of P and dS, from their first column on. `fresh`: the sums
// begin. A tied memory's two products have one sum. Where their tiles lie beside each other they are one product of
// twice as many terms, which reads and writes the sum once.
template <class S>
inline void add_to_memory(const Memory& memory, int64_t rows, int64_t width, const ChunkColumns<S>& columns,
                          const LeftFactor<S>& weights, const LeftFactor<S>& gradient, bool fresh,
                          accumulator_t<S>* dkeys, accumulator_t<S>* dvalues, const ColumnParts& parts = {}) {
  using F = factor_t<S>;
  const F* const dout = reinterpret_cast<const F*>(columns.dout);
  const F* const query = reinterpret_cast<const F*>(columns.query);
  const int64_t sum_stride = padded_stride<accumulator_t<S>>(memory.prototypes);
  if (memory.tied() && gradient.data == weights.data + factors<S>(rows) * weights.term_stride)
    return library_product_of_tile<S>(memory.features, width, 2 * rows, dout, columns.stride, weights.data,
                                      weights.term_stride, dkeys, sum_stride, !fresh, parts.query);
  library_product_of_tile<S>(memory.value_features, width, rows, dout, columns.stride, weights.data,
                             weights.term_stride, dvalues, sum_stride, !fresh, parts.dout);
  library_product_of_tile<S>(memory.features, width, rows, query, columns.stride, gradient.data, gradient.term_stride,
                             dkeys, sum_stride, !fresh || memory.tied(), memory.tied() ? nullptr : parts.query);
}

}  // namespace anomem::cpu::ANOMEM_ISA
