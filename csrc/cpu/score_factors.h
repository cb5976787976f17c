// A tile of scores' weights [rows, m], rows `stride` apart, as the left factor of products: it, or its transpose. In pairs
// it is rounded to bfloat16, where nothing will be exponentiated any more.
#pragma once

#include "cpu/pairs.h"

namespace anomem::cpu::ANOMEM_ISA {

// Factor p of row i lies at data[i * row + p * step].
template <class S>
struct LeftFactor {
  const factor_t<S>* data;
  int64_t row, step;
};

// A = tile, summed over its columns. Pairs go to `to`, [rows, stride / 2], or without it to where each row lies. An odd last
// weight shares its pair with a number that meets a row of zeros.
template <class S, class T = accumulator_t<S>>
inline LeftFactor<S> in_rows(T* tile, int64_t rows, int64_t m, int64_t stride, factor_t<S>* to = nullptr) {
  if constexpr (in_pairs<S>) {
    const int64_t row = to == nullptr ? stride : stride / 2;
    factor_t<S>* const start = to == nullptr ? reinterpret_cast<factor_t<S>*>(tile) : to;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < m; j += 2 * lanes<T>) {
        const T* at = tile + i * stride + j;
        const vec<T> first = load(at), rest = load(at + lanes<T>);
        store_neighbours(start + i * row + j / 2, first, rest);
      }
    return {start, row, 1};
  } else {
    return {tile, stride, 1};
  }
}

// A = tileᵀ, summed over its rows. Pairs lie where the first of their two rows lay.
template <class S, class T = accumulator_t<S>>
inline LeftFactor<S> in_columns(T* tile, int64_t rows, int64_t m, int64_t stride) {
  if constexpr (in_pairs<S>) {
    for (int64_t i = 0; i < rows; i += 2)
      for (int64_t j = 0; j < m; j += lanes<T>) {
        T* at = tile + i * stride + j;
        const vec<T> second = i + 1 < rows ? load(at + stride) : vec<T>{};
        store(reinterpret_cast<factor_t<S>*>(at), load(at), second);
      }
    return {reinterpret_cast<const factor_t<S>*>(tile), 1, 2 * stride};
  } else {
    return {tile, 1, stride};
  }
}

}  // namespace anomem::cpu::ANOMEM_ISA
