// Rectangular InfoNCE, l_i = lse_{j ≠ exclude_i}(u_i·v_j / tau) − u_i·v_{positive_i} / tau. The forward gives every tile
// of rows to one item; the backward uses each tile of W_ij = P_ij dl_i − [j = positive_i] dl_i for rows and columns.
#pragma once

#include "cpu/nt_xent_kernel.h"

namespace anomem::cpu::ANOMEM_ISA {

template <class S>
struct InfoNceForwardRun {
  using T = accumulator_t<S>;
  const InfoNceForward& arguments;
  const Scale<T> scale;
  const int64_t rows, columns, features, tile;
  const int64_t padded[2];

  explicit InfoNceForwardRun(const InfoNceForward& a)
      : arguments(a), scale(a.tau), rows(a.count[0]), columns(a.count[1]), features(a.features),
        tile(tile_rows(rows, a.groups)), padded{round_up(rows, row_padding), round_up(columns, row_padding)} {}

  // Of a group's place in the wave: rows and columns, packed.
  PackedRows<S> unit(int64_t place, int side) const {
    T* start = static_cast<T*>(arguments.workspace) + place * info_nce_forward_workspace(rows, columns, features) +
               side * padded[0] * (features + 1);
    return {reinterpret_cast<factor_t<S>*>(start), start + padded[side] * features};
  }
  const S* x(int64_t group, int side, int64_t i) const { return row_of<S>(arguments.side[side], group, i); }
  T& inv_norm(int64_t group, int side, int64_t i) const {
    return static_cast<T*>(arguments.inv_norm[side])[group * arguments.count[side] + i];
  }

  void prepare(int64_t group, int64_t place, int64_t block) const {
    const int side = block >= padded[0] / row_padding;
    const Span span(block - side * padded[0] / row_padding, row_padding, arguments.count[side]);
    UnitBlock<S> rows_here(features);
    for (int64_t i = 0; i < span.count; ++i) {
      const S* row = x(group, side, span.first + i);
      rows_here.set(i, row, inv_norm(group, side, span.first + i) = inverse_norm(row, features));
    }
    rows_here.pack(span.count, unit(place, side).from(span.first, features));
  }

  // Loss and total of one tile of rows.
  void reduce(int64_t group, int64_t place, int64_t index) const {
    const Span mine(index, tile, rows);
    const Visible keep{rows, columns, arguments.exclude, arguments.exclude == nullptr};
    T sum[largest_tile] = {}, peak[largest_tile];
    for (auto& p : peak) p = no_peak<T>;
    for (int64_t j = 0; j < (columns + largest_tile - 1) / largest_tile; ++j) {
      const Span theirs(j, largest_tile, columns);
      const Tile<S> t{unit(place, 0), unit(place, 1), features, mine.first, mine.count, theirs.first, theirs.count};
      TileSums<T> sums;
      if (scale.fixed_shift)
        sum_with_fixed_shift<false>(t, scale, keep, sums);
      else
        sum_with_peaks<false>(t, scale, keep, sums);
      for (int64_t i = 0; i < mine.count; ++i)
        merge_sum(scale.fixed_shift, sum + i, peak + i, sums.row_sum[i], sums.row_peak[i]);
    }
    T* loss = static_cast<T*>(arguments.loss) + group * rows;
    T* total = static_cast<T*>(arguments.total) + group * rows;
    for (int64_t start = 0; start < mine.count; start += row_padding) {
      const int64_t count = mine.count - start < row_padding ? mine.count - start : row_padding;
      const int64_t first = mine.first + start;
      T terms[row_padding];
      find_positives(group, place, first, count, terms);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = first + i;
        const bool hidden = arguments.exclude != nullptr && arguments.exclude[row] == arguments.positive[row];
        if (hidden) terms[i] = scale.fixed_shift ? T(0) : -T(INFINITY);
        finish_row(scale, sum[start + i], peak[start + i], terms[i], visible() == 1 && !hidden, loss + row, total + row);
      }
    }
  }

  // `positive_terms` of the rows first … first + count.
  void find_positives(int64_t group, int64_t place, int64_t first, int64_t count, T* terms) const {
    PackedPositives<S> positives(features);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t positive = arguments.positive[first + i];
      positives.set(i, x(group, 1, positive), inv_norm(group, 1, positive));
    }
    positive_terms(scale, features, unit(place, 0).from(first, features), positives.packed(count), terms);
  }

  int64_t visible() const { return columns - (arguments.exclude != nullptr); }

  void run() const {
    const int64_t blocks = (padded[0] + padded[1]) / row_padding, tiles = (rows + tile - 1) / tile;
    for (int64_t start = 0; start < arguments.groups; start += arguments.wave) {
      const int64_t here = Span(start / arguments.wave, arguments.wave, arguments.groups).count;
      parallel(here * blocks, [&](int64_t i) { prepare(start + i / blocks, i / blocks, i % blocks); });
      parallel(here * tiles, [&](int64_t i) { reduce(start + i / tiles, i / tiles, i % tiles); });
    }
  }
};

template <class S>
struct InfoNceBackwardRun {
  using T = accumulator_t<S>;
  const InfoNceBackward& arguments;
  const Scale<T> scale;
  const int64_t rows, columns, features, wide, tile;
  const int64_t padded[2];

  explicit InfoNceBackwardRun(const InfoNceBackward& a)
      : arguments(a), scale(a.tau), rows(a.count[0]), columns(a.count[1]), features(a.features),
        wide(round_up(features, feature_padding)), tile(tile_rows(rows, a.groups)),
        padded{round_up(rows, row_padding), round_up(columns, row_padding)} {}

  // Of a group's place in the wave, for rows and columns: the rows, packed in two ways, their gradient [padded, wide] and
  // [padded]; then for the rows twice [padded].
  T* start(int64_t place) const {
    return static_cast<T*>(arguments.workspace) + place * info_nce_backward_workspace(rows, columns, features);
  }
  Side<S> side(int64_t place, int index) const {
    T* const unit = start(place) + index * padded[0] * (features + 2 * wide + 1);
    T *const packed_rows = unit + padded[index] * features, *const gradient = packed_rows + padded[index] * wide;
    return {{reinterpret_cast<factor_t<S>*>(unit), gradient + padded[index] * wide},
            reinterpret_cast<factor_t<S>*>(packed_rows), gradient, padded[index], wide};
  }
  T* weight(int64_t place) const { return start(place) + (padded[0] + padded[1]) * (features + 2 * wide + 1); }
  T* lse(int64_t place) const { return weight(place) + padded[0]; }
  const S* x(int64_t group, int side, int64_t i) const { return row_of<S>(arguments.side[side], group, i); }
  T inv_norm(int64_t group, int side, int64_t i) const {
    return static_cast<const T*>(arguments.inv_norm[side])[group * arguments.count[side] + i];
  }
  const T* dloss(int64_t group) const { return static_cast<const T*>(arguments.dloss) + group * rows; }

  void prepare(int64_t group, int64_t place, int64_t block) const {
    const int index = block >= padded[0] / row_padding;
    const Span span(block - index * padded[0] / row_padding, row_padding, arguments.count[index]);
    UnitBlock<S> rows_here(features);
    for (int64_t i = 0; i < span.count; ++i)
      rows_here.set(i, x(group, index, span.first + i), inv_norm(group, index, span.first + i));
    side(place, index).prepare(rows_here, span, features);
    if (index == 1) return;
    const T* total_in = static_cast<const T*>(arguments.total) + group * rows;
    for (int64_t i = span.first; i < span.first + row_padding; ++i) {
      const bool real = i < rows;
      lse(place)[i] = real ? total_in[i] : T(0);
      weight(place)[i] = real ? row_weight(scale.fixed_shift, dloss(group)[i], total_in[i]) : T(0);
    }
  }

  void add_tile(int64_t group, int64_t place, int64_t first, int64_t second) const {
    const Span mine(first, tile, rows), theirs(second, largest_tile, columns);
    const Side<S> left = side(place, 0), right = side(place, 1);
    const Tile<S> t{left.unit, right.unit, features, mine.first, mine.count, theirs.first, theirs.count};
    const RowWeights<T> weights{weight(place), lse(place)}, none{nullptr, nullptr};
    const Visible keep{rows, columns, arguments.exclude, arguments.exclude == nullptr};
    alignas(64) T w[largest_tile * weights_row];
    if (scale.fixed_shift)
      tile_weights<true, false>(t, scale, keep, weights, none, false, w, weights_row);
    else
      tile_weights<false, false>(t, scale, keep, weights, none, false, w, weights_row);
    for (int64_t i = 0; i < mine.count; ++i) {
      const int64_t row = mine.first + i, j = arguments.positive[row] - theirs.first;
      const bool hidden = arguments.exclude != nullptr && arguments.exclude[row] == arguments.positive[row];
      if (j >= 0 && j < theirs.count && !hidden) w[i * weights_row + j] -= dloss(group)[row];
      // One visible column, the positive: the loss is constant. A product with 0 keeps NaN.
      if (columns - (arguments.exclude != nullptr) == 1 && !hidden)
        for (int64_t c = 0; c < theirs.count; ++c) w[i * weights_row + c] *= 0;
    }
    add_gradients(t, w, left, right, true);
  }

  void finish(int64_t group, int64_t place, int64_t block) const {
    const int index = block >= padded[0] / row_padding;
    const Span span(block - index * padded[0] / row_padding, row_padding, arguments.count[index]);
    S* dx = static_cast<S*>(arguments.dside[index]) + group * arguments.count[index] * features;
    T* along = static_cast<T*>(arguments.along) + group * rows;
    for (int64_t i = span.first; i < span.first + span.count; ++i) {
      const T inner = unnormalize_gradient(side(place, index).gradient + i * wide, T(1 / arguments.tau),
                                           x(group, index, i), inv_norm(group, index, i), features, dx + i * features);
      if (index == 0) along[i] = inner;
    }
  }

  void run() const {
    run_in_waves(
        arguments.groups, arguments.wave, (padded[0] + padded[1]) / row_padding,
        Crossing{(rows + tile - 1) / tile, (columns + largest_tile - 1) / largest_tile},
        [&](int64_t group, int64_t place, int64_t block) { prepare(group, place, block); },
        [&](int64_t group, int64_t place, int64_t first, int64_t second) { add_tile(group, place, first, second); },
        [&](int64_t group, int64_t place, int64_t block) { finish(group, place, block); });
  }
};

template <class S>
void run_info_nce_forward(const InfoNceForward& arguments) {
  InfoNceForwardRun<S>(arguments).run();
}

template <class S>
void run_info_nce_backward(const InfoNceBackward& arguments) {
  InfoNceBackwardRun<S>(arguments).run();
}

void info_nce_forward(const InfoNceForward& arguments) {
  ANOMEM_FOR_TYPE(arguments.type, run_info_nce_forward, arguments)
}

void info_nce_backward(const InfoNceBackward& arguments) {
  ANOMEM_FOR_TYPE(arguments.type, run_info_nce_backward, arguments)
}

}  // namespace anomem::cpu::ANOMEM_ISA
