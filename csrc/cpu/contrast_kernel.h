// NT-Xent and InfoNCE. The gradients are derived in anomem/reference/contrast.py.
//
// Grouped NT-Xent, l_i = lse_{j≠i}(u_i·u_j / tau) − u_i·u_{i±B} / tau, on the upper triangle of the similarities: each
// tile is exponentiated once a pass and serves the rows of both sides. With e_ij = exp(s_ij − shift),
// dU_i = (1/tau) Σ_j W_ij u_j, W_ij = e_ij (a_i + a_j), a_i = dl_i exp(shift − lse_i), and at the positive j = i±B
// W_ij = −(1 − P_ij) dl_i − (1 − P_ji) dl_j.
//
// Rectangular InfoNCE, l_i = lse_{j ≠ exclude_i}(u_i·v_j / tau) − u_i·v_{positive_i} / tau. The work item of the
// forward pass is a tile of rows. In the backward pass each tile of W_ij = P_ij dl_i serves both sides; at the positive
// W_ij = −(1 − P_ij) dl_i.
//
// The forward pass sums the negatives alone, and 1 − P of a positive comes from its loss: where the positive dominates
// its row, P − 1 would be the difference of nearly equal numbers.
#pragma once

#include "cpu/contrast.h"
#include "cpu/contrast_gradients.h"
#include "cpu/contrast_rows.h"
#include "cpu/contrast_schedule.h"
#include "cpu/contrast_sums.h"
#include "cpu/contrast_tile.h"
#include "cpu/parallel.h"

namespace anomem::cpu::ANOMEM_ISA {

// The kept products of the tile `index` of all groups, [rows, kept_stride_of_tile(columns)]; null where there are none.
template <class T, class Data>
ANOMEM_INLINE T* kept_tile(const KeptProducts<Data>& kept, int64_t index, int64_t rows, int64_t columns) {
  return index < kept.count ? static_cast<T*>(kept.tiles) + index * kept_elements(rows, columns) : nullptr;
}

// The index of a pair of tiles first ≤ second among all of them.
inline int64_t pair_index(int64_t first, int64_t second) { return second * (second + 1) / 2 + first; }

template <class S>
struct NtXentForwardRun {
  using T = accumulator_t<S>;
  const NtXentForward& arguments;
  const Scale<T> scale;
  // `tiles` of a group; rows of a `strip`, or 0; `stride` between the workspaces of two places.
  const int64_t batch, rows, padded, features, tile, tiles, strip, stride;

  explicit NtXentForwardRun(const NtXentForward& a)
      : arguments(a),
        scale(a.tau),
        batch(a.batch),
        rows(2 * a.batch),
        padded(round_up(rows, kRowPadding)),
        features(a.features),
        tile(tile_rows(rows, a.groups)),
        tiles(nt_xent_tiles(rows, a.groups)),
        strip(strip_rows(rows, a.groups)),
        stride(nt_xent_forward_workspace(rows, a.groups, features, a.library)) {}

  // The workspace of one place: twice [padded], and without strips the rows (`forward_rows`).
  T* sum(int64_t place) const { return static_cast<T*>(arguments.workspace) + place * stride; }
  T* peak(int64_t place) const { return sum(place) + padded; }
  int64_t packed_row() const { return forward_row(features, arguments.library, ProductSide::kBoth); }
  // Rows of a group from `first` on, packed at `start`.
  PackedRows<S> packed(T* start, int64_t first, int64_t count) const {
    return forward_rows<S>(start, count, features, arguments.library, ProductSide::kBoth, first);
  }
  PackedRows<S> unit(int64_t place) const { return packed(peak(place) + padded, 0, padded); }
  const S* x(int64_t group, int64_t i) const { return row_of<S>(arguments.view, batch, group, i); }
  T& inv_norm(int64_t group, int64_t i) const { return static_cast<T*>(arguments.inv_norm)[group * rows + i]; }

  // Normalises kRowPadding rows and, without strips, packs them.
  void prepare(int64_t group, int64_t place, int64_t block) const {
    const Span span(block, kRowPadding, rows);
    for (int64_t i = span.first; i < span.first + span.count; ++i)
      inv_norm(group, i) = inverse_norm(x(group, i), features);
    if (strip == 0) pack(group, span, unit(place));
    for (int64_t i = span.first; i < span.first + kRowPadding; ++i) {
      sum(place)[i] = 0;
      peak(place)[i] = kNoPeak<T>;
    }
  }

  void pack(int64_t group, const Span& span, const PackedRows<S>& to) const {
    UnitBlock<S> block_rows(features);
    for (int64_t i = 0; i < span.count; ++i)
      block_rows.set(i, x(group, span.first + i), inv_norm(group, span.first + i));
    block_rows.pack(span.count, to.from(span.first, features));
  }

  void add_strips(int64_t group, int64_t place, int64_t first, int64_t second) const {
    with_packed_strips<T>(
        Strips{strip / kRowPadding, padded / kRowPadding}, first, second, packed_row(),
        [&](T* start, int64_t row) { return packed(start, row, strip); },
        [&](int64_t block, const PackedRows<S>& to) { pack(group, Span(block, kRowPadding, rows), to); },
        [&](const PackedRows<S>& left, const PackedRows<S>& right) {
          for_tile_pairs(Strips{strip / tile, (rows + tile - 1) / tile}, first, second,
                         [&](int64_t a, int64_t b) { add_tile(group, place, left, right, a, b); });
        });
  }

  void add_tile(int64_t group, int64_t place, const PackedRows<S>& left, const PackedRows<S>& right, int64_t first,
                int64_t second) const {
    const Span row_span(first, tile, rows), column_span(second, tile, rows);
    Tile<S> t{left, right, features, row_span, column_span};
    const LibraryProducts library(arguments.library, kInPairs<S>);
    alignas(64) T products[kLargestTile * kTileStride];
    T* const kept = kept_tile<T>(arguments.kept, group * tiles + pair_index(first, second), tile, tile);
    if (kept != nullptr) keep_products(t, first == second, kept, kept_stride_of_tile(tile));
    else compute_by_library(t, first == second, products);
    TileSums<T> sums;
    if (scale.fixed_shift) sum_with_fixed_shift<true>(t, scale, UpperTriangle{rows}, sums);
    else sum_with_peaks<true>(t, scale, UpperTriangle{rows}, sums);
    for (int64_t i = 0; i < row_span.count; ++i)
      merge_sum(scale.fixed_shift, sum(place) + row_span.first + i, peak(place) + row_span.first + i, sums.row_sum[i],
                sums.row_peak[i]);
    for (int64_t j = 0; j < column_span.count; ++j)
      merge_sum(scale.fixed_shift, sum(place) + column_span.first + j, peak(place) + column_span.first + j,
                sums.column_sum[j], sums.column_peak[j]);
  }

  void finish(int64_t group, int64_t place, int64_t block) const {
    const Span span(block, kRowPadding / 2, batch);  // pairs
    T* loss = static_cast<T*>(arguments.loss) + group * rows;
    T* total = static_cast<T*>(arguments.total) + group * rows;
    for (int64_t i = span.first; i < span.first + span.count; ++i) {
      const double s = positive_similarity(x(group, i), inv_norm(group, i), x(group, i + batch),
                                           inv_norm(group, i + batch), features);
      for (int64_t row = i; row < rows; row += batch)
        finish_row(scale, sum(place)[row], peak(place)[row], s, false, loss + row, total + row);
    }
  }

  void run() const {
    const int64_t item = strip > 0 ? strip : tile;
    run_in_waves(
        arguments.groups, arguments.wave, padded / kRowPadding, Tournament{(rows + item - 1) / item},
        [&](int64_t group, int64_t place, int64_t block) { prepare(group, place, block); },
        [&](int64_t group, int64_t place, int64_t first, int64_t second) {
          if (strip > 0) add_strips(group, place, first, second);
          else add_tile(group, place, unit(place), unit(place), first, second);
        },
        [&](int64_t group, int64_t place, int64_t block) { finish(group, place, block); });
  }
};

template <class S>
struct NtXentBackwardRun {
  using T = accumulator_t<S>;
  const NtXentBackward& arguments;
  const Scale<T> scale;
  const int64_t batch, rows, padded, features, padded_features, tile, tiles, strip;  // as in the forward pass
  const bool all_kept;
  const int64_t stride;

  explicit NtXentBackwardRun(const NtXentBackward& a)
      : arguments(a),
        scale(a.tau),
        batch(a.batch),
        rows(2 * a.batch),
        padded(round_up(rows, kRowPadding)),
        features(a.features),
        padded_features(round_up(features, kFeaturePadding)),
        tile(tile_rows(rows, a.groups)),
        tiles(nt_xent_tiles(rows, a.groups)),
        strip(strip_rows(rows, a.groups)),
        all_kept(a.kept.whole(a.groups - 1, tiles)),
        stride(nt_xent_backward_workspace(rows, a.groups, features, all_kept)) {}

  // The workspace of one place: twice [padded], the gradient, and without strips the rows (`backward_side`).
  T* weight(int64_t place) const { return static_cast<T*>(arguments.workspace) + place * stride; }
  T* lse(int64_t place) const { return weight(place) + padded; }
  T* gradient(int64_t place) const { return lse(place) + padded; }
  // Rows of a group from `first` on, packed at `start`.
  Side<S> packed(int64_t place, T* start, int64_t first, int64_t count) const {
    return backward_side<S>(gradient(place), start, count, features, arguments.library, first);
  }
  Side<S> side(int64_t place) const { return packed(place, gradient(place) + padded * padded_features, 0, padded); }
  const S* x(int64_t group, int64_t i) const { return row_of<S>(arguments.view, batch, group, i); }
  T inv_norm(int64_t group, int64_t i) const { return static_cast<const T*>(arguments.inv_norm)[group * rows + i]; }
  const T* dloss(int64_t group) const { return static_cast<const T*>(arguments.dloss) + group * rows; }
  // 1 − P_ij for the positive j.
  T missing(int64_t group, int64_t i) const {
    return missing_weight(static_cast<const T*>(arguments.loss)[group * rows + i]);
  }
  T pull(int64_t group, int64_t i) const { return dloss(group)[i] * missing(group, i); }

  void prepare(int64_t group, int64_t place, int64_t block) const {
    const Span span(block, kRowPadding, rows);
    const T* total_in = static_cast<const T*>(arguments.total) + group * rows;
    if (strip == 0) pack(group, span, side(place));
    side(place).clear_gradient(span);
    for (int64_t i = span.first; i < span.first + kRowPadding; ++i) {
      const bool real = i < rows;
      lse(place)[i] = real ? total_in[i] : T{0};
      weight(place)[i] = real ? row_weight(scale.fixed_shift, dloss(group)[i], total_in[i], missing(group, i)) : T{0};
    }
  }

  void pack(int64_t group, const Span& span, const Side<S>& to) const {
    UnitBlock<S> block_rows(features);
    for (int64_t i = 0; i < span.count; ++i)
      block_rows.set(i, x(group, span.first + i), inv_norm(group, span.first + i));
    to.pack(block_rows, span, features, arguments.kept.whole(group, tiles));
  }

  void add_strips(int64_t group, int64_t place, int64_t first, int64_t second) const {
    with_packed_strips<T>(
        Strips{strip / kRowPadding, padded / kRowPadding}, first, second, backward_row(features, all_kept),
        [&](T* start, int64_t row) { return packed(place, start, row, strip); },
        [&](int64_t block, const Side<S>& to) { pack(group, Span(block, kRowPadding, rows), to); },
        [&](const Side<S>& left, const Side<S>& right) {
          for_tile_pairs(Strips{strip / tile, (rows + tile - 1) / tile}, first, second,
                         [&](int64_t a, int64_t b) { add_tile(group, place, left, right, a, b); });
        });
  }

  void add_tile(int64_t group, int64_t place, const Side<S>& left, const Side<S>& right, int64_t first,
                int64_t second) const {
    const Span row_span(first, tile, rows), column_span(second, tile, rows);
    Tile<S> t{left.unit, right.unit, features, row_span, column_span};
    const LibraryProducts library(arguments.library, kInPairs<S>);
    const RowWeights<T> weights{weight(place), lse(place)};
    alignas(64) T w[kLargestTile * kTileStride];
    const Visible keep{rows, rows, nullptr, false};
    const bool diagonal = first == second;
    const T* const kept = kept_tile<const T>(arguments.kept, group * tiles + pair_index(first, second), tile, tile);
    if (kept != nullptr) t.use(kept, kept_stride_of_tile(tile));
    else compute_by_library(t, diagonal, w);  // each block of products becomes weights in place
    if (scale.fixed_shift) tile_weights<true, true>(t, scale, keep, weights, weights, diagonal, w, kTileStride);
    else tile_weights<false, true>(t, scale, keep, weights, weights, diagonal, w, kTileStride);
    if (diagonal) mirror(w, row_span.count);
    for (int64_t i = 0; i < row_span.count; ++i) {
      const int64_t row = row_span.first + i, positive = row < batch ? row + batch : row - batch;
      const int64_t j = positive - column_span.first;
      if (j >= 0 && j < column_span.count) w[i * kTileStride + j] = -pull(group, row) - pull(group, positive);
    }
    add_gradients(t, w, left, right, !diagonal);
  }

  // Fills the register blocks that `tile_weights` did not write.
  static void mirror(T* w, int64_t count) {
    for (int64_t i = 0; i < round_up(count, Block<T>::kHeight); ++i) {
      const int64_t known = (i / Block<T>::kHeight * Block<T>::kHeight) / Block<T>::kWidth * Block<T>::kWidth;
      for (int64_t j = 0; j < known; ++j) w[i * kTileStride + j] = w[j * kTileStride + i];
    }
  }

  void finish(int64_t group, int64_t place, int64_t block) const {
    const Span span(block, kRowPadding, rows);
    T* tau_terms = static_cast<T*>(arguments.tau_terms) + group * rows;
    for (int64_t i = span.first; i < span.first + span.count; ++i) {
      const int side = i >= batch;
      S* dx = static_cast<S*>(arguments.dview[side]) + (group * batch + i - side * batch) * features;
      tau_terms[i] = unnormalize_gradient(gradient(place) + i * padded_features, static_cast<T>(1 / arguments.tau),
                                          x(group, i), inv_norm(group, i), features, dx);
    }
  }

  void run() const {
    const int64_t item = strip > 0 ? strip : tile;
    run_in_waves(
        arguments.groups, arguments.wave, padded / kRowPadding, Tournament{(rows + item - 1) / item},
        [&](int64_t group, int64_t place, int64_t block) { prepare(group, place, block); },
        [&](int64_t group, int64_t place, int64_t first, int64_t second) {
          if (strip > 0) add_strips(group, place, first, second);
          else add_tile(group, place, side(place), side(place), first, second);
        },
        [&](int64_t group, int64_t place, int64_t block) { finish(group, place, block); });
  }
};

template <class S>
void compute(const NtXentForward& arguments) {
  NtXentForwardRun<S>(arguments).run();
}

template <class S>
void compute(const NtXentBackward& arguments) {
  NtXentBackwardRun<S>(arguments).run();
}

template <class S>
struct InfoNceForwardRun {
  using T = accumulator_t<S>;
  const InfoNceForward& arguments;
  const Scale<T> scale;
  const int64_t rows, columns, features, tile, row_tiles, column_tiles;
  const int64_t padded[2];

  explicit InfoNceForwardRun(const InfoNceForward& a)
      : arguments(a),
        scale(a.tau),
        rows(a.count[0]),
        columns(a.count[1]),
        features(a.features),
        tile(tile_rows(rows, a.groups)),
        row_tiles((rows + tile - 1) / tile),
        column_tiles((columns + kLargestTile - 1) / kLargestTile),
        padded{round_up(rows, kRowPadding), round_up(columns, kRowPadding)} {}

  // The workspace of one place: rows and columns, packed.
  PackedRows<S> unit(int64_t place, int side) const {
    const bool library = arguments.library;
    T* start = static_cast<T*>(arguments.workspace) +
               place * info_nce_forward_workspace(rows, columns, features, library) +
               side * padded[0] * forward_row(features, library, ProductSide::kLeft);
    return forward_rows<S>(start, padded[side], features, library, side ? ProductSide::kRight : ProductSide::kLeft);
  }
  const S* x(int64_t group, int side, int64_t i) const { return row_of<S>(arguments.side[side], group, i); }
  T& inv_norm(int64_t group, int side, int64_t i) const {
    return static_cast<T*>(arguments.inv_norm[side])[group * arguments.count[side] + i];
  }

  void prepare(int64_t group, int64_t place, int64_t block) const {
    const int side = block >= padded[0] / kRowPadding;
    const Span span(block - side * padded[0] / kRowPadding, kRowPadding, arguments.count[side]);
    UnitBlock<S> block_rows(features);
    for (int64_t i = 0; i < span.count; ++i) {
      const S* row = x(group, side, span.first + i);
      block_rows.set(i, row, inv_norm(group, side, span.first + i) = inverse_norm(row, features));
    }
    block_rows.pack(span.count, unit(place, side).from(span.first, features));
  }

  // Loss and total of one tile of rows.
  void reduce(int64_t group, int64_t place, int64_t index) const {
    const Span row_span(index, tile, rows);
    const Negatives keep{{rows, columns, arguments.exclude.data, !arguments.exclude.given}, arguments.positive};
    T sum[kLargestTile] = {}, peak[kLargestTile];
    for (auto& p : peak) p = kNoPeak<T>;
    const LibraryProducts library(arguments.library, kInPairs<S>);
    alignas(64) T products[kLargestTile * kTileStride];
    for (int64_t j = 0; j < column_tiles; ++j) {
      const Span column_span(j, kLargestTile, columns);
      Tile<S> t{unit(place, 0), unit(place, 1), features, row_span, column_span};
      T* const kept = kept_tile<T>(arguments.kept, (group * row_tiles + index) * column_tiles + j, tile, kLargestTile);
      if (kept != nullptr) keep_products(t, false, kept, kept_stride_of_tile(kLargestTile));
      else compute_by_library(t, false, products);
      TileSums<T> sums;
      if (scale.fixed_shift) sum_with_fixed_shift<false>(t, scale, keep, sums);
      else sum_with_peaks<false>(t, scale, keep, sums);
      for (int64_t i = 0; i < row_span.count; ++i)
        merge_sum(scale.fixed_shift, sum + i, peak + i, sums.row_sum[i], sums.row_peak[i]);
    }
    T* loss = static_cast<T*>(arguments.loss) + group * rows;
    T* total = static_cast<T*>(arguments.total) + group * rows;
    for (int64_t i = 0; i < row_span.count; ++i) {
      const int64_t row = row_span.first + i, positive = arguments.positive[row];
      const bool hidden = arguments.exclude.given && arguments.exclude.data[row] == positive;
      const double s = positive_similarity(x(group, 0, row), inv_norm(group, 0, row), x(group, 1, positive),
                                           inv_norm(group, 1, positive), features);
      finish_row(scale, sum[i], peak[i], s, hidden, loss + row, total + row);
    }
  }

  void run() const {
    const int64_t blocks = (padded[0] + padded[1]) / kRowPadding;
    for (int64_t start = 0; start < arguments.groups; start += arguments.wave) {
      const int64_t count = Span(start / arguments.wave, arguments.wave, arguments.groups).count;
      parallel(count * blocks, [&](int64_t i) { prepare(start + i / blocks, i / blocks, i % blocks); });
      parallel(count * row_tiles, [&](int64_t i) { reduce(start + i / row_tiles, i / row_tiles, i % row_tiles); });
    }
  }
};

template <class S>
struct InfoNceBackwardRun {
  using T = accumulator_t<S>;
  const InfoNceBackward& arguments;
  const Scale<T> scale;
  const int64_t rows, columns, features, padded_features, tile, row_tiles, column_tiles;
  const int64_t padded[2];

  explicit InfoNceBackwardRun(const InfoNceBackward& a)
      : arguments(a),
        scale(a.tau),
        rows(a.count[0]),
        columns(a.count[1]),
        features(a.features),
        padded_features(round_up(features, kFeaturePadding)),
        tile(tile_rows(rows, a.groups)),
        row_tiles((rows + tile - 1) / tile),
        column_tiles((columns + kLargestTile - 1) / kLargestTile),
        padded{round_up(rows, kRowPadding), round_up(columns, kRowPadding)} {}

  bool all_kept() const { return arguments.kept.whole(arguments.groups - 1, row_tiles * column_tiles); }

  // The workspace of one place: for the rows twice [padded]; the rows, and the columns (`backward_side`).
  T* start(int64_t place) const {
    return static_cast<T*>(arguments.workspace) +
           place * info_nce_backward_workspace(rows, columns, features, all_kept());
  }
  Side<S> side(int64_t place, int index) const {
    const int64_t row = padded_features + backward_row(features, all_kept());
    T* const gradient = lse(place) + padded[0] + index * padded[0] * row;
    return backward_side<S>(gradient, gradient + padded[index] * padded_features, padded[index], features,
                            arguments.library);
  }
  T* weight(int64_t place) const { return start(place); }
  T* lse(int64_t place) const { return weight(place) + padded[0]; }
  const S* x(int64_t group, int side, int64_t i) const { return row_of<S>(arguments.side[side], group, i); }
  T inv_norm(int64_t group, int side, int64_t i) const {
    return static_cast<const T*>(arguments.inv_norm[side])[group * arguments.count[side] + i];
  }
  const T* dloss(int64_t group) const { return static_cast<const T*>(arguments.dloss) + group * rows; }
  // 1 − P of the row's positive; 1 where it is hidden.
  T missing(int64_t group, int64_t row) const {
    const bool hidden = arguments.exclude.given && arguments.exclude.data[row] == arguments.positive[row];
    return hidden ? T{1} : missing_weight(static_cast<const T*>(arguments.loss)[group * rows + row]);
  }

  void prepare(int64_t group, int64_t place, int64_t block) const {
    const int index = block >= padded[0] / kRowPadding;
    const Span span(block - index * padded[0] / kRowPadding, kRowPadding, arguments.count[index]);
    UnitBlock<S> block_rows(features);
    for (int64_t i = 0; i < span.count; ++i)
      block_rows.set(i, x(group, index, span.first + i), inv_norm(group, index, span.first + i));
    side(place, index).pack(block_rows, span, features, arguments.kept.whole(group, row_tiles * column_tiles));
    side(place, index).clear_gradient(span);
    if (index == 1) return;
    const T* total_in = static_cast<const T*>(arguments.total) + group * rows;
    for (int64_t i = span.first; i < span.first + kRowPadding; ++i) {
      const bool real = i < rows;
      lse(place)[i] = real ? total_in[i] : T{0};
      weight(place)[i] = real ? row_weight(scale.fixed_shift, dloss(group)[i], total_in[i], missing(group, i)) : T{0};
    }
  }

  void add_tile(int64_t group, int64_t place, int64_t first, int64_t second) const {
    const Span row_span(first, tile, rows), column_span(second, kLargestTile, columns);
    const Side<S> left = side(place, 0), right = side(place, 1);
    Tile<S> t{left.unit, right.unit, features, row_span, column_span};
    const LibraryProducts library(arguments.library, kInPairs<S>);
    const RowWeights<T> weights{weight(place), lse(place)}, none{nullptr, nullptr};
    const Visible keep{rows, columns, arguments.exclude.data, !arguments.exclude.given};
    alignas(64) T w[kLargestTile * kTileStride];
    const T* const kept =
        kept_tile<const T>(arguments.kept, (group * row_tiles + first) * column_tiles + second, tile, kLargestTile);
    if (kept != nullptr) t.use(kept, kept_stride_of_tile(kLargestTile));
    else compute_by_library(t, false, w);
    if (scale.fixed_shift) tile_weights<true, false>(t, scale, keep, weights, none, false, w, kTileStride);
    else tile_weights<false, false>(t, scale, keep, weights, none, false, w, kTileStride);
    for (int64_t i = 0; i < row_span.count; ++i) {
      const int64_t row = row_span.first + i, j = arguments.positive[row] - column_span.first;
      if (j >= 0 && j < column_span.count) w[i * kTileStride + j] = -dloss(group)[row] * missing(group, row);
    }
    add_gradients(t, w, left, right, true);
  }

  void finish(int64_t group, int64_t place, int64_t block) const {
    const int index = block >= padded[0] / kRowPadding;
    const Span span(block - index * padded[0] / kRowPadding, kRowPadding, arguments.count[index]);
    S* dx = static_cast<S*>(arguments.dside[index]) + group * arguments.count[index] * features;
    T* tau_terms = static_cast<T*>(arguments.tau_terms) + group * rows;
    for (int64_t i = span.first; i < span.first + span.count; ++i) {
      const T projection =
          unnormalize_gradient(side(place, index).gradient + i * padded_features, static_cast<T>(1 / arguments.tau),
                               x(group, index, i), inv_norm(group, index, i), features, dx + i * features);
      if (index == 0) tau_terms[i] = projection;
    }
  }

  void run() const {
    run_in_waves(
        arguments.groups, arguments.wave, (padded[0] + padded[1]) / kRowPadding, Crossing{row_tiles, column_tiles},
        [&](int64_t group, int64_t place, int64_t block) { prepare(group, place, block); },
        [&](int64_t group, int64_t place, int64_t first, int64_t second) { add_tile(group, place, first, second); },
        [&](int64_t group, int64_t place, int64_t block) { finish(group, place, block); });
  }
};

template <class S>
void compute(const InfoNceForward& arguments) {
  InfoNceForwardRun<S>(arguments).run();
}

template <class S>
void compute(const InfoNceBackward& arguments) {
  InfoNceBackwardRun<S>(arguments).run();
}

}  // namespace anomem::cpu::ANOMEM_ISA
