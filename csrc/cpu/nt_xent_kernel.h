// Grouped NT-Xent, l_i = lse_{j≠i}(u_i·u_j / tau) − u_i·u_{i±B} / tau, on the upper triangle of the similarities: each
// tile pair is exponentiated once a pass and serves the rows of both sides. With e_ij = exp(s_ij − shift),
// dU_i = (1/tau) Σ_j W_ij u_j, W_ij = e_ij (a_i + a_j) − [j = i±B](dl_i + dl_j), a_i = dl_i exp(shift − lse_i).
#pragma once

#include "cpu/buffer.h"
#include "cpu/contrast.h"
#include "cpu/contrast_tile.h"
#include "cpu/tournament.h"
#include "cpu/unit_rows.h"

namespace anomem::cpu::ANOMEM_ISA {

// Row i of the 2B rows of a group.
template <class S>
ANOMEM_INLINE const S* row_of(const Rows (&view)[2], int64_t batch, int64_t group, int64_t i) {
  const int side = i >= batch;
  return row_of<S>(view[side], group, i - side * batch);
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

template <class S>
struct NtXentForwardRun {
  using T = accumulator_t<S>;
  const NtXentForward& arguments;
  const Scale<T> scale;
  const int64_t batch, rows, padded, features, tile;

  explicit NtXentForwardRun(const NtXentForward& a)
      : arguments(a), scale(a.tau), batch(a.batch), rows(2 * a.batch), padded(round_up(rows, row_padding)),
        features(a.features), tile(tile_rows(rows, a.groups)) {}

  // Of a group's place in the wave: its rows, packed, and three times [padded].
  T* start(int64_t place) const {
    return static_cast<T*>(arguments.workspace) + place * nt_xent_forward_workspace(rows, features);
  }
  T* sum(int64_t place) const { return start(place) + padded * features; }
  T* peak(int64_t place) const { return sum(place) + padded; }
  PackedRows<S> unit(int64_t place) const {
    return {reinterpret_cast<factor_t<S>*>(start(place)), peak(place) + padded};
  }
  const S* x(int64_t group, int64_t i) const { return row_of<S>(arguments.view, batch, group, i); }
  T& inv_norm(int64_t group, int64_t i) const { return static_cast<T*>(arguments.inv_norm)[group * rows + i]; }

  // Normalises `row_padding` rows and packs them.
  void prepare(int64_t group, int64_t place, int64_t block) const {
    const Span span(block, row_padding, rows);
    UnitBlock<S> rows_here(features);
    for (int64_t i = 0; i < span.count; ++i) {
      const S* row = x(group, span.first + i);
      rows_here.set(i, row, inv_norm(group, span.first + i) = inverse_norm(row, features));
    }
    rows_here.pack(span.count, unit(place).from(span.first, features));
    for (int64_t i = span.first; i < span.first + row_padding; ++i) {
      sum(place)[i] = 0;
      peak(place)[i] = no_peak<T>;
    }
  }

  void add_tile(int64_t place, int64_t first, int64_t second) const {
    const Span mine(first, tile, rows), theirs(second, tile, rows);
    const Tile<S> t{unit(place), unit(place), features, mine.first, mine.count, theirs.first, theirs.count};
    TileSums<T> sums;
    if (scale.fixed_shift)
      sum_with_fixed_shift<true>(t, scale, UpperTriangle{rows}, sums);
    else
      sum_with_peaks<true>(t, scale, UpperTriangle{rows}, sums);
    for (int64_t i = 0; i < mine.count; ++i)
      merge_sum(scale.fixed_shift, sum(place) + mine.first + i, peak(place) + mine.first + i, sums.row_sum[i],
                sums.row_peak[i]);
    for (int64_t j = 0; j < theirs.count; ++j)
      merge_sum(scale.fixed_shift, sum(place) + theirs.first + j, peak(place) + theirs.first + j, sums.column_sum[j],
                sums.column_peak[j]);
  }

  void finish(int64_t group, int64_t place, int64_t block) const {
    const Span span(block, row_padding, rows);
    T* loss = static_cast<T*>(arguments.loss) + group * rows;
    T* total = static_cast<T*>(arguments.total) + group * rows;
    PackedPositives<S> positives(features);
    for (int64_t i = 0; i < span.count; ++i) {
      const int64_t row = span.first + i, positive = row < batch ? row + batch : row - batch;
      positives.set(i, x(group, positive), inv_norm(group, positive));
    }
    T terms[row_padding];
    positive_terms(scale, features, unit(place).from(span.first, features), positives.packed(span.count), terms);
    for (int64_t i = 0; i < span.count; ++i) {
      const int64_t row = span.first + i;
      finish_row(scale, sum(place)[row], peak(place)[row], terms[i], rows == 2, loss + row, total + row);
    }
  }

  void run() const {
    run_in_waves(
        arguments.groups, arguments.wave, padded / row_padding, Tournament{(rows + tile - 1) / tile},
        [&](int64_t group, int64_t place, int64_t block) { prepare(group, place, block); },
        [&](int64_t, int64_t place, int64_t first, int64_t second) { add_tile(place, first, second); },
        [&](int64_t group, int64_t place, int64_t block) { finish(group, place, block); });
  }
};

template <class S>
struct NtXentBackwardRun {
  using T = accumulator_t<S>;
  const NtXentBackward& arguments;
  const Scale<T> scale;
  const int64_t batch, rows, padded, features, wide, tile;

  explicit NtXentBackwardRun(const NtXentBackward& a)
      : arguments(a), scale(a.tau), batch(a.batch), rows(2 * a.batch), padded(round_up(rows, row_padding)),
        features(a.features), wide(round_up(features, feature_padding)), tile(tile_rows(rows, a.groups)) {}

  // Of a group's place in the wave: its rows, packed in two ways, their gradient [padded, wide], and three times [padded].
  T* start(int64_t place) const {
    return static_cast<T*>(arguments.workspace) + place * nt_xent_backward_workspace(rows, features);
  }
  T* weight(int64_t place) const { return start(place) + padded * (features + 2 * wide); }
  T* lse(int64_t place) const { return weight(place) + padded; }
  Side<S> side(int64_t place) const {
    T *const packed_rows = start(place) + padded * features, *const gradient = packed_rows + padded * wide;
    return {{reinterpret_cast<factor_t<S>*>(start(place)), lse(place) + padded},
            reinterpret_cast<factor_t<S>*>(packed_rows), gradient, padded, wide};
  }
  const S* x(int64_t group, int64_t i) const { return row_of<S>(arguments.view, batch, group, i); }
  T inv_norm(int64_t group, int64_t i) const { return static_cast<const T*>(arguments.inv_norm)[group * rows + i]; }
  const T* dloss(int64_t group) const { return static_cast<const T*>(arguments.dloss) + group * rows; }

  void prepare(int64_t group, int64_t place, int64_t block) const {
    const Span span(block, row_padding, rows);
    const T* total_in = static_cast<const T*>(arguments.total) + group * rows;
    const Side<S> both = side(place);
    UnitBlock<S> rows_here(features);
    for (int64_t i = 0; i < span.count; ++i)
      rows_here.set(i, x(group, span.first + i), inv_norm(group, span.first + i));
    both.prepare(rows_here, span, features);
    for (int64_t i = span.first; i < span.first + row_padding; ++i) {
      const bool real = i < rows;
      lse(place)[i] = real ? total_in[i] : T(0);
      weight(place)[i] = real ? row_weight(scale.fixed_shift, dloss(group)[i], total_in[i]) : T(0);
    }
  }

  void add_tile(int64_t group, int64_t place, int64_t first, int64_t second) const {
    const Span mine(first, tile, rows), theirs(second, tile, rows);
    const Side<S> both = side(place);
    const Tile<S> t{both.unit, both.unit, features, mine.first, mine.count, theirs.first, theirs.count};
    const RowWeights<T> weights{weight(place), lse(place)};
    alignas(64) T w[largest_tile * weights_row];
    const Visible keep{rows, rows, nullptr, false};
    const bool diagonal = first == second;
    if (scale.fixed_shift)
      tile_weights<true, true>(t, scale, keep, weights, weights, diagonal, w, weights_row);
    else
      tile_weights<false, true>(t, scale, keep, weights, weights, diagonal, w, weights_row);
    if (diagonal) mirror(w, mine.count);
    for (int64_t i = 0; i < mine.count; ++i) {
      const int64_t row = mine.first + i, positive = row < batch ? row + batch : row - batch;
      const int64_t j = positive - theirs.first;
      if (j >= 0 && j < theirs.count) w[i * weights_row + j] -= dloss(group)[row] + dloss(group)[positive];
    }
    add_gradients(t, w, both, both, !diagonal);
  }

  // Fills the register blocks that `tile_weights` left out.
  static void mirror(T* w, int64_t count) {
    for (int64_t i = 0; i < round_up(count, Block<T>::height); ++i) {
      const int64_t known = (i / Block<T>::height * Block<T>::height) / Block<T>::width * Block<T>::width;
      for (int64_t j = 0; j < known; ++j) w[i * weights_row + j] = w[j * weights_row + i];
    }
  }

  void finish(int64_t group, int64_t place, int64_t block) const {
    const Span span(block, row_padding, rows);
    T* along = static_cast<T*>(arguments.along) + group * rows;
    const T* gradient = side(place).gradient;
    // One pair: its loss is constant. A product with 0 keeps NaN.
    const T factor = rows == 2 ? T(0) : T(1 / arguments.tau);
    for (int64_t i = span.first; i < span.first + span.count; ++i) {
      const int side = i >= batch;
      S* dx = static_cast<S*>(arguments.dview[side]) + (group * batch + i - side * batch) * features;
      along[i] = unnormalize_gradient(gradient + i * wide, factor, x(group, i), inv_norm(group, i), features, dx);
    }
  }

  void run() const {
    run_in_waves(
        arguments.groups, arguments.wave, padded / row_padding, Tournament{(rows + tile - 1) / tile},
        [&](int64_t group, int64_t place, int64_t block) { prepare(group, place, block); },
        [&](int64_t group, int64_t place, int64_t first, int64_t second) { add_tile(group, place, first, second); },
        [&](int64_t group, int64_t place, int64_t block) { finish(group, place, block); });
  }
};

template <class S>
void run_nt_xent_forward(const NtXentForward& arguments) {
  NtXentForwardRun<S>(arguments).run();
}

template <class S>
void run_nt_xent_backward(const NtXentBackward& arguments) {
  NtXentBackwardRun<S>(arguments).run();
}

void nt_xent_forward(const NtXentForward& arguments) { ANOMEM_FOR_TYPE(arguments.type, run_nt_xent_forward, arguments) }

void nt_xent_backward(const NtXentBackward& arguments) {
  ANOMEM_FOR_TYPE(arguments.type, run_nt_xent_backward, arguments)
}

}  // namespace anomem::cpu::ANOMEM_ISA
