// NT-Xent of a batch whose rows are made block by block (anomem/functional/contrast_blocks.py): the log-sums of a pair
// of blocks, for the rows of both, and the part of a block's gradient that another block gives. A row's log-sum over
// all blocks, its positive and its loss are the caller's. The gradient is of the rows of one block alone: that of both
// would have to be kept for all blocks.
#pragma once

#include "cpu/contrast_gradients.h"
#include "cpu/contrast_rows.h"
#include "cpu/contrast_schedule.h"
#include "cpu/contrast_sums.h"
#include "cpu/contrast_tile.h"
#include "cpu/parallel.h"

namespace anomem::cpu::ANOMEM_ISA {

template <class S>
struct ContrastBlockForwardRun {
  using T = accumulator_t<S>;
  static constexpr int64_t kTile = kLargestTile;
  const ContrastBlockForward& arguments;
  const Scale<T> scale;
  const int64_t features, padded[2], tiles[2];
  T *sum[2], *peak[2];  // [padded] each
  PackedRows<S> unit[2];

  explicit ContrastBlockForwardRun(const ContrastBlockForward& a)
      : arguments(a),
        scale(a.tau),
        features(a.features),
        padded{round_up(a.count[0], kRowPadding), round_up(a.count[1], kRowPadding)},
        tiles{(a.count[0] + kTile - 1) / kTile, (a.count[1] + kTile - 1) / kTile} {
    T* start = static_cast<T*>(a.workspace);
    for (int side = 0; side < (a.same ? 1 : 2); ++side) {
      const auto uses = a.same ? ProductSide::kBoth : side ? ProductSide::kRight : ProductSide::kLeft;
      sum[side] = start;
      peak[side] = sum[side] + padded[side];
      T* const rows = peak[side] + padded[side];
      unit[side] = forward_rows<S>(rows, padded[side], features, a.library, uses);
      start = rows + padded[side] * forward_row(features, a.library, uses);
    }
    if (a.same) {
      sum[1] = sum[0];
      peak[1] = peak[0];
      unit[1] = unit[0];
    }
  }

  void prepare(int64_t block) const {
    const int side = block >= padded[0] / kRowPadding;
    const Span span(block - side * padded[0] / kRowPadding, kRowPadding, arguments.count[side]);
    UnitBlock<S> rows(features);
    for (int64_t i = 0; i < span.count; ++i) {
      const S* row = row_of<S>(arguments.block[side], 0, span.first + i);
      rows.set(i, row, inverse_norm(row, features));
    }
    rows.pack(span.count, unit[side].from(span.first, features));
    for (int64_t i = span.first; i < span.first + kRowPadding; ++i) {
      sum[side][i] = 0;
      peak[side][i] = kNoPeak<T>;
    }
  }

  template <class Keep>
  void add_tile(int64_t first, int64_t second, const Keep& keep) const {
    const Span span[2] = {{first, kTile, arguments.count[0]}, {second, kTile, arguments.count[1]}};
    const bool diagonal = arguments.same && first == second;
    Tile<S> t{unit[0], unit[1], features, span[0], span[1]};
    const LibraryProducts library(arguments.library, kInPairs<S>);
    alignas(64) T products[kLargestTile * kTileStride];
    compute_by_library(t, diagonal, products);
    TileSums<T> sums;
    if (scale.fixed_shift) sum_with_fixed_shift<true>(t, scale, keep, sums);
    else sum_with_peaks<true>(t, scale, keep, sums);
    const auto merge = [&](int side, const T* sums_of_tile, const T* peaks_of_tile) {
      for (int64_t i = 0; i < span[side].count; ++i)
        merge_sum(scale.fixed_shift, sum[side] + span[side].first + i, peak[side] + span[side].first + i,
                  sums_of_tile[i], peaks_of_tile[i]);
    };
    merge(0, sums.row_sum, sums.row_peak);
    merge(1, sums.column_sum, sums.column_peak);
  }

  template <class Rounds, class Keep>
  void add(const Rounds& schedule, const Keep& keep) const {
    for (int64_t round = 0; round < schedule.rounds(); ++round)
      parallel(schedule.pairs(round), [&](int64_t i) {
        int64_t first, second;
        schedule.pair(round, i, &first, &second);
        add_tile(first, second, keep);
      });
  }

  void run() const {
    const int sides = arguments.same ? 1 : 2;
    parallel((padded[0] + (sides - 1) * padded[1]) / kRowPadding, [&](int64_t block) { prepare(block); });
    if (arguments.same) add(Tournament{tiles[0]}, UpperTriangle{arguments.count[0]});
    else add(Crossing{tiles[0], tiles[1]}, Visible{arguments.count[0], arguments.count[1], nullptr, true});
    for (int side = 0; side < sides; ++side)
      for (int64_t i = 0; i < arguments.count[side]; ++i) {
        const double top = scale.fixed_shift ? scale.shift / kLog2e<double> : static_cast<double>(peak[side][i]);
        arguments.lse[side][i] = top + std::log(static_cast<double>(sum[side][i]));
      }
  }
};

template <class S>
struct ContrastBlockBackwardRun {
  using T = accumulator_t<S>;
  static constexpr int64_t kTile = kLargestTile;
  const ContrastBlockBackward& arguments;
  const Scale<T> scale;
  const int64_t features, padded_features, padded[2];
  T *weight[2], *lse[2], *inv_norm[2];  // [padded] each
  Side<S> side[2];

  explicit ContrastBlockBackwardRun(const ContrastBlockBackward& a)
      : arguments(a),
        scale(a.tau),
        features(a.features),
        padded_features(round_up(features, kFeaturePadding)),
        padded{round_up(a.count[0], kRowPadding), round_up(a.count[1], kRowPadding)} {
    T* const gradient = static_cast<T*>(a.workspace);
    T* start = gradient + padded[0] * padded_features;
    for (int i = 0; i < (a.same ? 1 : 2); ++i) {
      weight[i] = start;
      lse[i] = weight[i] + padded[i];
      inv_norm[i] = lse[i] + padded[i];
      T* const rows = inv_norm[i] + padded[i];
      side[i] = backward_side<S>(gradient, rows, padded[i], features, a.library);
      start = rows + padded[i] * backward_row(features, false);
    }
    if (a.same) {
      weight[1] = weight[0];
      lse[1] = lse[0];
      side[1] = side[0];
    }
  }

  void prepare(int64_t block) const {
    const int at = block >= padded[0] / kRowPadding;
    const Span span(block - at * padded[0] / kRowPadding, kRowPadding, arguments.count[at]);
    UnitBlock<S> rows(features);
    for (int64_t i = 0; i < span.count; ++i) {
      const S* row = row_of<S>(arguments.block[at], 0, span.first + i);
      rows.set(i, row, inv_norm[at][span.first + i] = inverse_norm(row, features));
    }
    side[at].pack(rows, span, features, false);
    if (at == 0) side[0].clear_gradient(span);
    for (int64_t i = span.first; i < span.first + kRowPadding; ++i) {
      const bool real = i < arguments.count[at];
      const double exact = real ? arguments.lse[at][i] : 0;
      lse[at][i] = static_cast<T>(exact);
      // exp(logit − lse), of which a tile makes the part that depends on the logit; the rest has the digits that T
      // takes from the log-sum.
      const double made = scale.fixed_shift ? scale.shift / kLog2e<double> : static_cast<double>(lse[at][i]);
      weight[at][i] = real ? static_cast<T>(std::exp(made - exact)) : T{0};
    }
  }

  template <class Keep>
  void add_row_of_tiles(int64_t index, const Keep& keep) const {
    const Span row_span(index, kTile, arguments.count[0]);
    const LibraryProducts library(arguments.library, kInPairs<S>);
    const RowWeights<T> rows{weight[0], lse[0]}, columns{weight[1], lse[1]};
    alignas(64) T w[kLargestTile * kTileStride];
    for (int64_t j = 0; j * kTile < arguments.count[1]; ++j) {
      Tile<S> t{side[0].unit, side[1].unit, features, row_span, Span(j, kTile, arguments.count[1])};
      compute_by_library(t, false, w);
      if (scale.fixed_shift) tile_weights<true, true>(t, scale, keep, rows, columns, false, w, kTileStride);
      else tile_weights<false, true>(t, scale, keep, rows, columns, false, w, kTileStride);
      add_gradients(t, w, side[0], side[1], false);
    }
    S* const gradient = static_cast<S*>(arguments.gradient);
    for (int64_t i = row_span.first; i < row_span.first + row_span.count; ++i)
      unnormalize_gradient(side[0].gradient + i * padded_features, static_cast<T>(1 / arguments.tau),
                           row_of<S>(arguments.block[0], 0, i), inv_norm[0][i], features, gradient + i * features);
  }

  void run() const {
    const int64_t blocks = (padded[0] + (arguments.same ? 0 : padded[1])) / kRowPadding;
    parallel(blocks, [&](int64_t block) { prepare(block); });
    parallel((arguments.count[0] + kTile - 1) / kTile, [&](int64_t index) {
      if (arguments.same) add_row_of_tiles(index, NegativesOfBlock{arguments.count[0]});
      else add_row_of_tiles(index, Visible{arguments.count[0], arguments.count[1], nullptr, true});
    });
  }
};

template <class S>
void compute(const ContrastBlockForward& arguments) {
  ContrastBlockForwardRun<S>(arguments).run();
}

template <class S>
void compute(const ContrastBlockBackward& arguments) {
  ContrastBlockBackwardRun<S>(arguments).run();
}

}  // namespace anomem::cpu::ANOMEM_ISA
