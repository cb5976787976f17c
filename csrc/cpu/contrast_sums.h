// The forward pass of a contrast: a tile is exponentiated in registers and summed over rows and columns; the sums of a
// row's tiles give its loss.
#pragma once

#include "cpu/contrast_tile.h"

namespace anomem::cpu::ANOMEM_ISA {

// Sums of exp(logit − peak) over a tile's rows and columns, and the peaks. With a fixed shift every peak is the shift
// and is not stored.
template <class T>
struct TileSums {
  T row_sum[kLargestTile], row_peak[kLargestTile];
  T column_sum[kLargestTile], column_peak[kLargestTile];
};

// Replaces −inf: the difference of two peaks must not be NaN.
template <class T>
constexpr T kNoPeak = T{-1e30};

template <class T, bool kMasked, class Keep>
ANOMEM_INLINE void add_exponentials(const vec<T> (&s)[Block<T>::kHeight][2], const Scale<T>& scale, const Keep& keep,
                                    int64_t row, int64_t column, vec<T>* row_sum, vec<T> (&column_sum)[2]) {
#pragma GCC unroll 8
  for (int i = 0; i < Block<T>::kHeight; ++i) {
    vec<T> e[2];
    for (int h = 0; h < 2; ++h) {
      e[h] = scale.exponential(s[i][h]);
      if (kMasked) e[h] = keep.template mask<T>(row + i, column_index<T>(column + h * kLanes<T>)) ? e[h] : vec<T>{};
      column_sum[h] += e[h];
    }
    row_sum[i] += e[0] + e[1];
  }
}

// The sums of a tile with a fixed shift; of its columns too if kBoth.
template <bool kBoth, class S, class Keep, class T = accumulator_t<S>>
void sum_with_fixed_shift(const Tile<S>& tile, const Scale<T>& scale, const Keep& keep, TileSums<T>& sums) {
  alignas(64) vec<T> row_sum[kLargestTile] = {};
  for (int64_t j = 0; j < tile.columns; j += Block<T>::kWidth) {
    vec<T> column_sum[2] = {};
    for (int64_t i = 0; i < tile.rows; i += Block<T>::kHeight) {
      const int64_t row = tile.row + i, column = tile.column + j;
      if (keep.template none<T>(row, column)) continue;
      vec<T> s[Block<T>::kHeight][2];
      similarities(tile, i, j, s);
      if (keep.template all<T>(row, column))
        add_exponentials<T, false>(s, scale, keep, row, column, row_sum + i, column_sum);
      else add_exponentials<T, true>(s, scale, keep, row, column, row_sum + i, column_sum);
    }
    if (kBoth)
      for (int h = 0; h < 2; ++h) store(sums.column_sum + j + h * kLanes<T>, column_sum[h]);
  }
  for (int64_t i = 0; i < tile.rows; ++i) sums.row_sum[i] = sum_lanes<T>(row_sum[i]);
}

// The same with a running peak, one per lane until the end: for temperatures too low for a fixed shift.
template <bool kBoth, class S, class Keep, class T = accumulator_t<S>>
void sum_with_peaks(const Tile<S>& tile, const Scale<T>& scale, const Keep& keep, TileSums<T>& sums) {
  alignas(64) vec<T> row_sum[kLargestTile] = {}, row_peak[kLargestTile];
  for (auto& peak : row_peak) peak = broadcast(kNoPeak<T>);
  for (int64_t j = 0; j < tile.columns; j += Block<T>::kWidth) {
    vec<T> column_sum[2] = {}, column_peak[2] = {broadcast(kNoPeak<T>), broadcast(kNoPeak<T>)};
    for (int64_t i = 0; i < tile.rows; i += Block<T>::kHeight) {
      const int64_t row = tile.row + i, column = tile.column + j;
      if (keep.template none<T>(row, column)) continue;
      vec<T> s[Block<T>::kHeight][2];
      similarities(tile, i, j, s);
      vec<T> top[2] = {column_peak[0], column_peak[1]};
      for (int r = 0; r < Block<T>::kHeight; ++r) {
        for (int h = 0; h < 2; ++h) {
          const auto mask = keep.template mask<T>(row + r, column_index<T>(column + h * kLanes<T>));
          s[r][h] = mask ? scale.logit(s[r][h]) : broadcast(T{-INFINITY});
          top[h] = larger(top[h], s[r][h]);
        }
        const vec<T> peak = larger(larger(row_peak[i + r], s[r][0]), s[r][1]);
        row_sum[i + r] = row_sum[i + r] * exp_or_zero(row_peak[i + r] - peak) + exp_or_zero(s[r][0] - peak) +
                         exp_or_zero(s[r][1] - peak);
        row_peak[i + r] = peak;
      }
      if (!kBoth) continue;
      for (int h = 0; h < 2; ++h) {
        column_sum[h] *= exp_or_zero(column_peak[h] - top[h]);
        for (int r = 0; r < Block<T>::kHeight; ++r) column_sum[h] += exp_or_zero(s[r][h] - top[h]);
        column_peak[h] = top[h];
      }
    }
    for (int h = 0; h < 2; ++h) {
      store(sums.column_sum + j + h * kLanes<T>, column_sum[h]);
      store(sums.column_peak + j + h * kLanes<T>, column_peak[h]);
    }
  }
  for (int64_t i = 0; i < tile.rows; ++i) {
    sums.row_peak[i] = max_lanes<T>(row_peak[i]);
    sums.row_sum[i] = sum_lanes<T>(row_sum[i] * exp_or_zero(row_peak[i] - broadcast(sums.row_peak[i])));
  }
}

// Adds one tile's sum to a row's: with peaks, both are brought to the larger one.
template <class T>
ANOMEM_INLINE void merge_sum(bool fixed_shift, T* sum, T* peak, T other_sum, T other_peak) {
  if (fixed_shift) {
    *sum += other_sum;
    return;
  }
  const T top = *peak > other_peak ? *peak : other_peak;
  *sum = *sum * std::exp(*peak - top) + other_sum * std::exp(other_peak - top);
  *peak = top;
}

// Loss of one row from the sum of its negatives, and its total, from which the backward pass computes P: the sum over
// all visible columns with a fixed shift, without one the log-sum of the negatives, whose rounding is relative to
// smaller logits than the positive's. (A small sum is more exact than its logarithm.) The positive is added here, by
// log(1 + negatives / positive): where it dominates its row, the loss is the small quotient. With `hidden` the row does
// not see its positive.
template <class T>
inline void finish_row(const Scale<T>& scale, T negatives, T peak, double similarity, bool hidden, T* loss, T* total) {
  const double sum = negatives, term = scale.positive_term(similarity);
  if (scale.fixed_shift) {
    *loss = static_cast<T>(hidden ? std::log(sum / term) : std::log1p(sum / term));
    *total = static_cast<T>(hidden ? sum : sum + term);
    return;
  }
  const double ratio = static_cast<double>(peak) - term + std::log(sum);  // its logarithm
  const double all = ratio > 0 ? ratio + std::log1p(std::exp(-ratio)) : std::log1p(std::exp(ratio));
  *loss = static_cast<T>(hidden ? ratio : all);
  *total = static_cast<T>(term + ratio);
}

}  // namespace anomem::cpu::ANOMEM_ISA
