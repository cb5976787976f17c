// The backward pass of a contrast: a tile's similarities become its weights W, which multiply its rows and columns.
#pragma once

#include "cpu/contrast_tile.h"

namespace anomem::cpu::ANOMEM_ISA {

// 1 − P of a row's positive, from the loss −log P. Exact where P is close to 1.
template <class T>
inline T missing_weight(T loss) {
  return -std::expm1(-loss);
}

// Weights of rows (or columns) in the backward pass. With a fixed shift: the upstream gradient over the sum of
// exp(logit − shift). Without one: the upstream gradient times 1 − P of the positive, and the log-sum of the negatives.
template <class T>
struct RowWeights {
  const T* weight;  // [rows, padded with zeros]
  const T* lse;     // [rows, padded], without a fixed shift only
};

// The weights of one register block: W = P_ij w_i, plus P_ji w_j if kBoth; 0 where masked by `keep`.
template <class T, bool kFixedShift, bool kBoth, bool kMasked, class Keep>
ANOMEM_INLINE void write_weights(const vec<T> (&s)[Block<T>::kHeight][2], const Scale<T>& scale, const Keep& keep,
                                 int64_t row, int64_t column, const RowWeights<T>& rows, const RowWeights<T>& columns,
                                 T* to, int64_t stride) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const int64_t j = column + h * kLanes<T>;
    const vec<T> column_weight = kBoth ? load(columns.weight + j) : vec<T>{};
    const vec<T> column_lse = kBoth && !kFixedShift ? load(columns.lse + j) : vec<T>{};
#pragma GCC unroll 8
    for (int i = 0; i < Block<T>::kHeight; ++i) {
      const vec<T> row_weight = broadcast(rows.weight[row + i]);
      vec<T> weight;
      if (kFixedShift) {
        weight = scale.exponential(s[i][h]) * (kBoth ? row_weight + column_weight : row_weight);
      } else {
        const vec<T> logit = scale.logit(s[i][h]);
        weight = row_weight * exp_or_zero(logit - broadcast(rows.lse[row + i]));
        if (kBoth) weight += column_weight * exp_or_zero(logit - column_lse);
      }
      if (kMasked) weight = keep.template mask<T>(row + i, column_index<T>(j)) ? weight : vec<T>{};
      store(to + i * stride + h * kLanes<T>, weight);
    }
  }
}

// W of a tile, [rows, stride]. With `upper`, blocks below the diagonal are not written.
template <bool kFixedShift, bool kBoth, class S, class Keep, class T = accumulator_t<S>>
void tile_weights(const Tile<S>& tile, const Scale<T>& scale, const Keep& keep, const RowWeights<T>& rows,
                  const RowWeights<T>& columns, bool upper, T* weights, int64_t stride) {
  const auto write = [&](int64_t i, int64_t j) {
    const int64_t row = tile.row + i, column = tile.column + j;
    if (upper && j + Block<T>::kWidth <= i) return;
    vec<T> s[Block<T>::kHeight][2];
    similarities(tile, i, j, s);
    T* to = weights + i * stride + j;
    if (keep.template all<T>(row, column))
      write_weights<T, kFixedShift, kBoth, false>(s, scale, keep, row, column, rows, columns, to, stride);
    else write_weights<T, kFixedShift, kBoth, true>(s, scale, keep, row, column, rows, columns, to, stride);
  };
  if (tile.computed != nullptr) {  // along rows, as the processor fetches products kept in a farther cache
    for (int64_t i = 0; i < tile.rows; i += Block<T>::kHeight)
      for (int64_t j = 0; j < tile.columns; j += Block<T>::kWidth) write(i, j);
    return;
  }
  for (int64_t j = 0; j < tile.columns; j += Block<T>::kWidth)
    for (int64_t i = 0; i < tile.rows; i += Block<T>::kHeight) write(i, j);
}

// C [m, features] += A [m, k] B for packed rows B, panels `panel_stride` factors apart. The product is summed before it
// is added: rounding errors grow with the root of the longest chain of additions, and one chain over all tiles would be
// as long as the batch.
template <class F, class T = sum_t<F>>
void add_product(int64_t m, int64_t features, int64_t k, const F* a, int64_t row_stride, int64_t term_stride,
                 const F* b, int64_t panel_stride, T* c, int64_t c_stride) {
  constexpr int height = Block<T>::kHeight, width = Block<T>::kWidth;
  for (int64_t f = 0; f < features; f += width, b += panel_stride)
    for (int64_t i = 0; i < m; i += height) {
      vec<T> sums[height][2] = {};
      multiply<F, height>(k, a + i * row_stride, row_stride, term_stride, b, sums);
      for (int r = 0; r < height; ++r)
        for (int h = 0; h < 2; ++h) {
          T* to = c + (i + r) * c_stride + f + h * kLanes<T>;
          store(to, load(to) + sums[r][h]);
        }
    }
}

// A tile's complete weights, rounded to bfloat16, in pairs of neighbours in a row and in pairs of neighbours in a
// column. Each includes the `rest` (see PackedRows) of the row that it multiplies.
template <class S>
struct WeightPairs;
#if ANOMEM_BFLOAT16_PAIRS
template <>
struct WeightPairs<Bfloat16> {
  alignas(64) Pair in_row[kLargestTile * kTileStride / 2];
  alignas(64) Pair in_column[kLargestTile / 2 * kTileStride];

  WeightPairs(const Tile<Bfloat16>& tile, const float* w, int64_t rows) {
    for (int64_t i = 0; i < rows; i += 2)
      for (int64_t j = 0; j < tile.columns; j += 2 * kLanes<float>) {
        const float *at = w + i * kTileStride + j, *rest = tile.right.rest + tile.right_row() + j;
        const float* row_rest = tile.left.rest + tile.left_row() + i;
        const vec<float> column_rest[2] = {load(rest), load(rest + kLanes<float>)};
        const vec<float> first[2] = {load(at), load(at + kLanes<float>)};
        const vec<float> second[2] = {load(at + kTileStride), load(at + kTileStride + kLanes<float>)};
        store_neighbours(in_row + (i * kTileStride + j) / 2, first[0] * column_rest[0], first[1] * column_rest[1]);
        store_neighbours(in_row + ((i + 1) * kTileStride + j) / 2, second[0] * column_rest[0],
                         second[1] * column_rest[1]);
        Pair* to = in_column + i / 2 * kTileStride + j;
        for (int h = 0; h < 2; ++h) store(to + h * kLanes<float>, first[h] * row_rest[0], second[h] * row_rest[1]);
      }
  }
};
#endif

// C [m, n] += A [m, k] B by the library, k terms; A and C with strides, B [k, n] in one panel.
template <class S, class T = accumulator_t<S>>
inline void add_library_product(int64_t m, int64_t n, int64_t k, const factor_t<S>* a, int64_t a_stride,
                                const factor_t<S>* b, T* c) {
  library_product_of_tile<S>(m, n, k, a, Factor<S>::kTerms * a_stride, b, n, c, n, true);
}

// `add_gradients` by the library.
template <class S, class T = accumulator_t<S>>
void add_gradients_by_library(const Tile<S>& tile, T* w, const Side<S>& left, const Side<S>& right, bool both) {
  constexpr int64_t step = 32;  // few sizes of products; `tile_weights` wrote columns up to it
  using Word = std::conditional_t<kInPairs<S>, float, T>;
  const int64_t rows = round_up(tile.rows, step), columns = round_up(tile.columns, step);
  const int64_t written = round_up(tile.rows, Block<T>::kHeight), n = left.padded_features, terms = factors<S>(rows);
  std::memset(w + written * kTileStride, 0, (rows - written) * kTileStride * sizeof(T));
  T* const row_gradient = left.gradient + tile.row * n;
  T* const column_gradient = right.gradient + tile.column * n;
  alignas(64) Word down[kLargestTile * kLargestTile];  // Wᵀ
  const auto add = [&](const factor_t<S>* in_row, int64_t stride, const factor_t<S>* in_column) {
    add_library_product<S>(rows, n, columns, in_row, stride, right.rows_from(tile.column), row_gradient);
    if (!both) return;
    transpose(reinterpret_cast<const Word*>(in_column), kTileStride, terms, columns, terms, down, terms);
    add_library_product<S>(columns, n, rows, reinterpret_cast<const factor_t<S>*>(down), terms,
                           left.rows_from(tile.row), column_gradient);
  };
  if constexpr (kInPairs<S>) {
    const WeightPairs<S> pairs(tile, w, rows);
    add(pairs.in_row, kTileStride / 2, pairs.in_column);
  } else {
    add(w, kTileStride, w);
  }
}

// Adds W V to the gradient of a tile's rows and, if `both`, Wᵀ U to that of its columns.
template <class S, class T = accumulator_t<S>>
void add_gradients(const Tile<S>& tile, T* w, const Side<S>& left, const Side<S>& right, bool both) {
  if constexpr (kInLibrary<factor_t<S>>)
    if (left.library()) return add_gradients_by_library(tile, w, left, right, both);
  const int64_t rows = factors<S>(tile.rows), columns = factors<S>(tile.columns), stride = left.padded_features;
  T* const row_gradient = left.gradient + tile.row * stride;
  T* const column_gradient = right.gradient + tile.column * stride;
  const factor_t<S>*u = left.rows_from(tile.row), *v = right.rows_from(tile.column);
  const auto add = [&](const factor_t<S>* in_row, int64_t row_stride, const factor_t<S>* in_column) {
    add_product(tile.rows, tile.features, columns, in_row, row_stride, 1, v, right.panel_stride(), row_gradient,
                stride);
    if (both)
      add_product(tile.columns, tile.features, rows, in_column, 1, kTileStride, u, left.panel_stride(), column_gradient,
                  stride);
  };
  if constexpr (kInPairs<S>) {
    const WeightPairs<S> pairs(tile, w, tile.rows);
    add(pairs.in_row, kTileStride / 2, pairs.in_column);
  } else {
    add(w, kTileStride, w);
  }
}

}  // namespace anomem::cpu::ANOMEM_ISA
