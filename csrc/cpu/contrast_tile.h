// One tile of a contrast: the similarities of up to 128 rows and 128 columns, exponentiated while they are in registers.
// The forward keeps only their sums; the backward writes the weights W of the tile, which then multiply the rows.
#pragma once

#include "cpu/contrast.h"
#include "cpu/tournament.h"
#include "cpu/unit_rows.h"

namespace anomem::cpu::ANOMEM_ISA {

constexpr int64_t largest_tile = 128;

// Row length of a tile's weights: not a power of two, which would put a column of them into a few sets of the cache.
constexpr int64_t weights_row = largest_tile + 16;

// Logits are s · (factor + rest): the rounding of one factor alone would shift every logit by 2^-24 of 1/tau. With a
// fixed shift they are in base 2 (factor + rest = log2(e) / tau). Without one they are s / tau rounded to T, as in the
// lse that is made of them: a row that one logit dominates then has P = 1 for it, and its gradient cancels exactly.
template <class T>
struct Scale {
  T factor, rest;
  // Unit rows bound the logits by 1/tau, which therefore can stand for the row maximum wherever 2^(2 log2(e) / tau) is
  // far from the ends of the range (float: tau ≥ 0.029; the distance leaves room for upstream gradients up to 2^26).
  // Below that temperature the maximum is found on the way.
  bool fixed_shift;
  int shift;  // in base 2, a whole number; 0 without a fixed shift

  explicit Scale(double tau) {
    const double base2 = log2e<double> / tau;
    fixed_shift = tau > 0 && 2 * base2 + 1 <= double(-exp2_lowest<T>) - 26;
    factor = T(fixed_shift ? base2 : 1 / tau);
    rest = T((fixed_shift ? base2 : 1 / tau) - double(factor));
    shift = fixed_shift ? int(base2) + 1 : 0;
  }

  // exp(logit − shift), with a fixed shift only.
  ANOMEM_INLINE vec<T> exponential(vec<T> s) const {
    return exp2_of_product(s, broadcast(factor), broadcast(rest), shift);
  }
  ANOMEM_INLINE vec<T> logit(vec<T> s) const { return multiply_add(s, broadcast(factor), s * broadcast(rest)); }
};

// Which elements of the similarities take part. `none` and `all` answer for a register block at (row, column); `lanes`
// gives the mask of one row of it.
struct UpperTriangle {
  int64_t count;
  template <class T>
  bool none(int64_t row, int64_t column) const {
    return column + Block<T>::width <= row + 1;
  }
  template <class T>
  bool all(int64_t row, int64_t column) const {
    return row + Block<T>::height <= column && column + Block<T>::width <= count;
  }
  template <class T>
  ANOMEM_INLINE typename Simd<T>::bits lanes(int64_t row, typename Simd<T>::bits column) const {
    typedef std::remove_reference_t<decltype(column[0])> index;
    return (column > index(row)) & (column < index(row < count ? count : 0));
  }
};

struct Visible {
  int64_t rows, columns;
  const int64_t* exclude;  // [rows], or null for the row's own index, or `everything`
  bool everything;
  int64_t hidden(int64_t row) const { return exclude == nullptr ? row : exclude[row]; }
  template <class T>
  bool none(int64_t, int64_t) const {
    return false;
  }
  template <class T>
  bool all(int64_t row, int64_t column) const {
    if (row + Block<T>::height > rows || column + Block<T>::width > columns) return false;
    if (everything) return true;
    for (int i = 0; i < Block<T>::height; ++i) {
      const int64_t j = hidden(row + i);
      if (j >= column && j < column + Block<T>::width) return false;
    }
    return true;
  }
  template <class T>
  ANOMEM_INLINE typename Simd<T>::bits lanes(int64_t row, typename Simd<T>::bits column) const {
    typedef std::remove_reference_t<decltype(column[0])> index;
    const index last = index(row < rows ? columns : 0);
    if (everything || row >= rows) return column < last;
    return (column < last) & (column != index(hidden(row)));
  }
};

// Where a tile lies: `rows` × `columns` similarities from (row, column) on.
template <class S>
struct Tile {
  PackedRows<S> left, right;
  int64_t features;
  int64_t row, rows;
  int64_t column, columns;
};

template <class S, class T = accumulator_t<S>>
ANOMEM_INLINE void similarities(const Tile<S>& tile, int64_t i, int64_t j, vec<T> (&s)[Block<T>::height][2]) {
  constexpr int width = Block<T>::width;
  const int64_t row = tile.row + i, column = tile.column + j, terms = factors<S>(tile.features), panel = terms * width;
  for (auto& halves : s) halves[0] = halves[1] = vec<T>{};
  multiply<factor_t<S>, Block<T>::height>(terms, tile.left.columns + row / width * panel + row % width, 1, width,
                                          tile.right.columns + column / width * panel, s);
  if constexpr (in_pairs<S>) {
    const vec<T> rest[2] = {load(tile.right.rest + column), load(tile.right.rest + column + lanes<T>)};
#pragma GCC unroll 8
    for (int r = 0; r < Block<T>::height; ++r)
      for (int h = 0; h < 2; ++h) s[r][h] *= rest[h] * tile.left.rest[row + r];
  }
}

template <class T>
ANOMEM_INLINE typename Simd<T>::bits column_index(int64_t column) {
  return lane_index<T>() + std::remove_reference_t<decltype(typename Simd<T>::bits{}[0])>(column);
}

// Sums of exp(logit − peak) over a tile's rows and columns, beside their peaks. With a fixed shift every peak is that
// shift and is not stored.
template <class T>
struct TileSums {
  T row_sum[largest_tile], row_peak[largest_tile];
  T column_sum[largest_tile], column_peak[largest_tile];
};

// A finite stand-in for −inf, so that differences of two peaks are numbers.
template <class T>
constexpr T no_peak = T(-1e30);

template <class T, bool masked, class Keep>
ANOMEM_INLINE void add_exponentials(const vec<T> (&s)[Block<T>::height][2], const Scale<T>& scale, const Keep& keep,
                                    int64_t row, int64_t column, vec<T>* row_sum, vec<T> (&column_sum)[2]) {
#pragma GCC unroll 8
  for (int i = 0; i < Block<T>::height; ++i) {
    vec<T> e[2];
    for (int h = 0; h < 2; ++h) {
      e[h] = scale.exponential(s[i][h]);
      if (masked) e[h] = keep.template lanes<T>(row + i, column_index<T>(column + h * lanes<T>)) ? e[h] : vec<T>{};
      column_sum[h] += e[h];
    }
    row_sum[i] += e[0] + e[1];
  }
}

// The fixed-shift sums of a tile; columns too if `Both`.
template <bool both, class S, class Keep, class T = accumulator_t<S>>
void sum_with_fixed_shift(const Tile<S>& tile, const Scale<T>& scale, const Keep& keep, TileSums<T>& sums) {
  alignas(64) vec<T> row_sum[largest_tile] = {};
  for (int64_t j = 0; j < tile.columns; j += Block<T>::width) {
    vec<T> column_sum[2] = {};
    for (int64_t i = 0; i < tile.rows; i += Block<T>::height) {
      const int64_t row = tile.row + i, column = tile.column + j;
      if (keep.template none<T>(row, column)) continue;
      vec<T> s[Block<T>::height][2];
      similarities(tile, i, j, s);
      if (keep.template all<T>(row, column))
        add_exponentials<T, false>(s, scale, keep, row, column, row_sum + i, column_sum);
      else
        add_exponentials<T, true>(s, scale, keep, row, column, row_sum + i, column_sum);
    }
    if (both)
      for (int h = 0; h < 2; ++h) store(sums.column_sum + j + h * lanes<T>, column_sum[h]);
  }
  for (int64_t i = 0; i < tile.rows; ++i) sums.row_sum[i] = sum_lanes<T>(row_sum[i]);
}

// The same with a peak that follows the data, one per lane until the end: for temperatures too low for a fixed shift.
template <bool both, class S, class Keep, class T = accumulator_t<S>>
void sum_with_peaks(const Tile<S>& tile, const Scale<T>& scale, const Keep& keep, TileSums<T>& sums) {
  alignas(64) vec<T> row_sum[largest_tile] = {}, row_peak[largest_tile];
  for (auto& peak : row_peak) peak = broadcast(no_peak<T>);
  for (int64_t j = 0; j < tile.columns; j += Block<T>::width) {
    vec<T> column_sum[2] = {}, column_peak[2] = {broadcast(no_peak<T>), broadcast(no_peak<T>)};
    for (int64_t i = 0; i < tile.rows; i += Block<T>::height) {
      const int64_t row = tile.row + i, column = tile.column + j;
      if (keep.template none<T>(row, column)) continue;
      vec<T> s[Block<T>::height][2];
      similarities(tile, i, j, s);
      vec<T> top[2] = {column_peak[0], column_peak[1]};
      for (int r = 0; r < Block<T>::height; ++r) {
        for (int h = 0; h < 2; ++h) {
          const auto mask = keep.template lanes<T>(row + r, column_index<T>(column + h * lanes<T>));
          s[r][h] = mask ? scale.logit(s[r][h]) : broadcast(T(-INFINITY));
          top[h] = larger(top[h], s[r][h]);
        }
        const vec<T> peak = larger(larger(row_peak[i + r], s[r][0]), s[r][1]);
        row_sum[i + r] = row_sum[i + r] * exp_or_zero(row_peak[i + r] - peak) + exp_or_zero(s[r][0] - peak) +
                         exp_or_zero(s[r][1] - peak);
        row_peak[i + r] = peak;
      }
      if (!both) continue;
      for (int h = 0; h < 2; ++h) {
        column_sum[h] *= exp_or_zero(column_peak[h] - top[h]);
        for (int r = 0; r < Block<T>::height; ++r) column_sum[h] += exp_or_zero(s[r][h] - top[h]);
        column_peak[h] = top[h];
      }
    }
    for (int h = 0; h < 2; ++h) {
      store(sums.column_sum + j + h * lanes<T>, column_sum[h]);
      store(sums.column_peak + j + h * lanes<T>, column_peak[h]);
    }
  }
  for (int64_t i = 0; i < tile.rows; ++i) {
    sums.row_peak[i] = max_lanes<T>(row_peak[i]);
    sums.row_sum[i] = sum_lanes<T>(row_sum[i] * exp_or_zero(row_peak[i] - broadcast(sums.row_peak[i])));
  }
}

// What the sums of up to `row_padding` rows contain of their positives: exp(logit − shift) with a fixed shift, else the
// logit. Of packed rows and positives, in the order of additions of `multiply`: where the positive dominates its row the
// loss is a difference of equal numbers, and must be 0.
template <class S, class T = accumulator_t<S>>
void positive_terms(const Scale<T>& scale, int64_t features, const PackedRows<S>& rows, const PackedRows<S>& positives,
                    T* terms) {
  const int64_t count = factors<S>(features);
  for (int64_t panel = 0; panel < row_padding; panel += Block<T>::width)
    for (int64_t lane = panel; lane < panel + Block<T>::width; lane += lanes<T>) {
      const int64_t start = panel * count + lane - panel;
      vec<T> s{};
      for (int64_t p = 0; p < count; ++p) {
        const int64_t at = start + p * Block<T>::width;
        s = multiply_add(load(rows.columns + at), load(positives.columns + at), s);
      }
      if constexpr (in_pairs<S>) s *= load(rows.rest + lane) * load(positives.rest + lane);
      store(terms + lane, scale.fixed_shift ? scale.exponential(s) : scale.logit(s));
    }
}

// Loss of one row, and its total: what the backward makes P of, the sum itself with a fixed shift and lse without one.
// (The logarithm of a small sum would be rounded to more than the sum is.) With `only` the positive is all there is to
// sum, and the loss is exactly 0 (or NaN).
template <class T>
inline void finish_row(const Scale<T>& scale, T sum, T peak, T positive_term, bool only, T* loss, T* total) {
  const double top = scale.fixed_shift ? 0.0 : double(peak);
  const double positive = scale.fixed_shift ? std::log(double(positive_term)) : double(positive_term) - top;
  const double all = only ? positive : std::log(double(sum));
  *total = scale.fixed_shift ? sum : T(top + all);
  *loss = T(all - positive);
}

// What a row (or column) weighs in the backward: with a fixed shift its upstream gradient over its sum of
// exp(logit − shift); without one the upstream gradient itself, beside its lse.
template <class T>
struct RowWeights {
  const T* weight;  // [rows, padded with zeros]
  const T* lse;     // [rows, padded], read without a fixed shift only
};

// The weights of one register block: W = P_ij w_i, plus P_ji w_j if `both`, and 0 where `keep` says so.
template <class T, bool fixed_shift, bool both, bool masked, class Keep>
ANOMEM_INLINE void write_weights(const vec<T> (&s)[Block<T>::height][2], const Scale<T>& scale, const Keep& keep,
                                 int64_t row, int64_t column, const RowWeights<T>& rows, const RowWeights<T>& columns,
                                 T* to, int64_t stride) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const int64_t j = column + h * lanes<T>;
    const vec<T> theirs = both ? load(columns.weight + j) : vec<T>{};
    const vec<T> their_lse = both && !fixed_shift ? load(columns.lse + j) : vec<T>{};
#pragma GCC unroll 8
    for (int i = 0; i < Block<T>::height; ++i) {
      const vec<T> mine = broadcast(rows.weight[row + i]);
      vec<T> weight;
      if (fixed_shift) {
        weight = scale.exponential(s[i][h]) * (both ? mine + theirs : mine);
      } else {
        const vec<T> logit = scale.logit(s[i][h]);
        weight = mine * exp_or_zero(logit - broadcast(rows.lse[row + i]));
        if (both) weight += theirs * exp_or_zero(logit - their_lse);
      }
      if (masked) weight = keep.template lanes<T>(row + i, column_index<T>(j)) ? weight : vec<T>{};
      store(to + i * stride + h * lanes<T>, weight);
    }
  }
}

// W of a tile, [rows, stride]. With `upper`, blocks wholly below the diagonal are left out.
template <bool fixed_shift, bool both, class S, class Keep, class T = accumulator_t<S>>
void tile_weights(const Tile<S>& tile, const Scale<T>& scale, const Keep& keep, const RowWeights<T>& rows,
                  const RowWeights<T>& columns, bool upper, T* weights, int64_t stride) {
  for (int64_t j = 0; j < tile.columns; j += Block<T>::width)
    for (int64_t i = 0; i < tile.rows; i += Block<T>::height) {
      const int64_t row = tile.row + i, column = tile.column + j;
      if (upper && j + Block<T>::width <= i) continue;
      vec<T> s[Block<T>::height][2];
      similarities(tile, i, j, s);
      T* to = weights + i * stride + j;
      if (keep.template all<T>(row, column))
        write_weights<T, fixed_shift, both, false>(s, scale, keep, row, column, rows, columns, to, stride);
      else
        write_weights<T, fixed_shift, both, true>(s, scale, keep, row, column, rows, columns, to, stride);
    }
}

// C [m, features] += A [m, k] B, for a B packed by `pack` in panels `panel` elements apart. The product is summed on its
// own before it is added: rounding errors grow with the root of the longest chain of additions, and one chain over all
// tiles would be as long as the batch.
template <class F, class T = sum_t<F>>
void add_product(int64_t m, int64_t features, int64_t k, const F* a, int64_t row, int64_t step, const F* b,
                 int64_t panel, T* c, int64_t c_row) {
  constexpr int height = Block<T>::height, width = Block<T>::width;
  for (int64_t f = 0; f < features; f += width, b += panel)
    for (int64_t i = 0; i < m; i += height) {
      vec<T> sums[height][2] = {};
      multiply<F, height>(k, a + i * row, row, step, b, sums);
      for (int r = 0; r < height; ++r)
        for (int h = 0; h < 2; ++h) {
          T* to = c + (i + r) * c_row + f + h * lanes<T>;
          store(to, load(to) + sums[r][h]);
        }
    }
}

// One side of a contrast in the backward pass, of one group.
template <class S>
struct Side {
  using T = accumulator_t<S>;
  PackedRows<S> unit;
  factor_t<S>* rows;  // the same rows as they lie, [wide / width, factors in `padded` terms, width]
  T* gradient;        // [padded, wide]: dL/du without its factor
  int64_t padded, wide;

  int64_t panel() const { return factors<S>(padded) * Block<T>::width; }
  factor_t<S>* rows_from(int64_t row) const { return rows + factors<S>(row) * Block<T>::width; }

  // Packs a block of rows in both ways and sets its gradient to zero.
  void prepare(const UnitBlock<S>& block, const Span& span, int64_t features) const {
    block.pack(span.count, unit.from(span.first, features));
    block.pack_rows(span.count, rows_from(span.first), panel());
    std::memset(gradient + span.first * wide, 0, row_padding * wide * sizeof(T));
  }
};

// A tile's weights in pairs of neighbours in a row and in pairs of neighbours in a column, rounded to bfloat16 when they
// are complete, each with what is left of the norm of the row that it multiplies.
template <class S>
struct WeightPairs;
#if ANOMEM_BFLOAT16_PAIRS
template <>
struct WeightPairs<Bfloat16> {
  alignas(64) Pair in_row[largest_tile * weights_row / 2];
  alignas(64) Pair in_column[largest_tile / 2 * weights_row];

  WeightPairs(const Tile<Bfloat16>& tile, const float* w) {
    for (int64_t i = 0; i < tile.rows; i += 2)
      for (int64_t j = 0; j < tile.columns; j += 2 * lanes<float>) {
        const float *at = w + i * weights_row + j, *rest = tile.right.rest + tile.column + j;
        const float *mine = tile.left.rest + tile.row + i;
        const vec<float> theirs[2] = {load(rest), load(rest + lanes<float>)};
        const vec<float> first[2] = {load(at), load(at + lanes<float>)};
        const vec<float> second[2] = {load(at + weights_row), load(at + weights_row + lanes<float>)};
        store_neighbours(in_row + (i * weights_row + j) / 2, first[0] * theirs[0], first[1] * theirs[1]);
        store_neighbours(in_row + ((i + 1) * weights_row + j) / 2, second[0] * theirs[0], second[1] * theirs[1]);
        Pair* to = in_column + i / 2 * weights_row + j;
        for (int h = 0; h < 2; ++h) store(to + h * lanes<float>, first[h] * mine[0], second[h] * mine[1]);
      }
  }
};
#endif

// Adds W V to the gradient of a tile's rows and, if `both`, Wᵀ U to that of its columns.
template <class S, class T = accumulator_t<S>>
void add_gradients(const Tile<S>& tile, const T* w, const Side<S>& left, const Side<S>& right, bool both) {
  const int64_t rows = factors<S>(tile.rows), columns = factors<S>(tile.columns), wide = left.wide;
  T *const mine = left.gradient + tile.row * wide, *const theirs = right.gradient + tile.column * wide;
  const factor_t<S>*u = left.rows_from(tile.row), *v = right.rows_from(tile.column);
  const auto add = [&](const factor_t<S>* in_row, int64_t row, const factor_t<S>* in_column) {
    add_product(tile.rows, tile.features, columns, in_row, row, 1, v, right.panel(), mine, wide);
    if (both) add_product(tile.columns, tile.features, rows, in_column, 1, weights_row, u, left.panel(), theirs, wide);
  };
  if constexpr (in_pairs<S>) {
    const WeightPairs<S> pairs(tile, w);
    add(pairs.in_row, weights_row / 2, pairs.in_column);
  } else {
    add(w, weights_row, w);
  }
}

}  // namespace anomem::cpu::ANOMEM_ISA
