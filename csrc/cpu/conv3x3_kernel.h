// The 3×3 convolution and its gradients by Winograd's transforms (conv3x3_tile.h): per tile and pair of channels 16
// multiplications in place of 36.
//
// The map's tiles are cut into blocks. A block is transformed, multiplied at each of the 16 places and transformed
// back while it lies in the second-level cache.
#pragma once

#include "cpu/conv3x3.h"
#include "cpu/conv3x3_tile.h"
#include "cpu/parallel.h"
#include "cpu/product.h"
#include "cpu/rows.h"

namespace anomem::cpu::ANOMEM_ISA {

ANOMEM_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
ANOMEM_INLINE int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

// The tiles of a map, in rows.
struct MapTiles {
  const MapShape& shape;
  int64_t rows = (shape.height + 1) / 2, columns = (shape.width + 1) / 2;

  int64_t count() const { return shape.batch * rows * columns; }
};

// Elements of transformed tiles and taps.
template <class S>
using transformed_t = std::conditional_t<kInPairs<S>, Bfloat16, accumulator_t<S>>;

// Distance of the 16 places, `length` elements each: not a power of two, so that they fall into different sets of the
// cache.
template <class E>
inline int64_t place_stride(int64_t length) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(E));
  return round_up(length, 2 * line) + line;
}

// Column x of the rows y … y + 3 of an image, transformed; pixels outside are zero.
template <class S>
ANOMEM_INLINE void load_column(const S* image, const MapShape& shape, int64_t y, int64_t x, int64_t channel,
                               int64_t count, vec<accumulator_t<S>> (&to)[4]) {
  vec<accumulator_t<S>> d[4] = {};
  if (x >= 0 && x < shape.width)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      if (y + i >= 0 && y + i < shape.height)
        d[i] = load_some(image + ((y + i) * shape.width + x) * shape.channels + channel, count);
  transform_column(d, to);
}

// Calls f(place, tile of the row, vector) for the tiles [begin, end) of tile row `row` and one vector of channels.
template <class S, class F>
ANOMEM_INLINE void transform_tiles(const S* x, const MapTiles& tiles, int64_t row, int64_t begin, int64_t end,
                                   int64_t channel, int64_t count, const F& f) {
  using V = vec<accumulator_t<S>>;
  const MapShape& shape = tiles.shape;
  const S* image = x + row / tiles.rows * shape.height * shape.width * shape.channels;
  const int64_t y = row % tiles.rows * 2 - 1;
  V columns[4][4];
  load_column(image, shape, y, 2 * begin - 1, channel, count, columns[0]);
  load_column(image, shape, y, 2 * begin, channel, count, columns[1]);
  for (int64_t tile = begin; tile < end; ++tile) {
    load_column(image, shape, y, 2 * tile + 1, channel, count, columns[2]);
    load_column(image, shape, y, 2 * tile + 2, channel, count, columns[3]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      f(4 * i, tile, columns[0][i] - columns[2][i]);
      f(4 * i + 1, tile, columns[1][i] + columns[2][i]);
      f(4 * i + 2, tile, columns[2][i] - columns[1][i]);
      f(4 * i + 3, tile, columns[1][i] - columns[3][i]);
      columns[0][i] = columns[2][i];
      columns[1][i] = columns[3][i];
    }
  }
}

// The transformed taps as right factors [C, K] of the 16 products, in panels of K.
template <class S>
class TapPanels {
 public:
  using T = accumulator_t<S>;
  using E = transformed_t<S>;
  static constexpr int kWidth = Block<T>::kWidth;

  explicit TapPanels(const Conv3x3& a)
      : terms_(factors<S>(a.shape.channels)),
        panels_((a.channels_out + kWidth - 1) / kWidth),
        data_(panels_ * kPlaces * terms_ * kWidth) {
    const S* weight = static_cast<const S*>(a.weight);
    parallel_ranges(panels_, [&](int64_t begin, int64_t end) {
      if (a.transposed) return rows(weight, a.shape.channels, a.channels_out, begin, end);
      columns(weight, a.shape.channels, a.channels_out, begin, end);
    });
  }

  const factor_t<S>* panel(int64_t column, int place) const {
    return data_.data() + (column / kWidth * kPlaces + place) * terms_ * kWidth;
  }

 private:
  // The taps [K, 3, 3, C]: row k becomes column k.
  void columns(const S* weight, int64_t channels, int64_t channels_out, int64_t begin, int64_t end) {
    using Word = std::conditional_t<kInPairs<S>, float, T>;  // a pair moves as 32 bits
    const int64_t stride = terms_ * Factor<S>::kTerms;
    Buffer<E> rows(kPlaces * kWidth * stride);
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kWidth, count = at_most(kWidth, channels_out - first);
      for (int64_t k = 0; k < count; ++k)
        for_vectors<T>(channels, [&](int64_t c, int64_t some) {
          vec<T> g[9], u[kPlaces];
#pragma GCC unroll 9
          for (int tap = 0; tap < 9; ++tap) g[tap] = load_some(weight + ((first + k) * 9 + tap) * channels + c, some);
          transform_taps(g, u);
#pragma GCC unroll 16
          for (int p = 0; p < kPlaces; ++p) store_some(rows.data() + (p * kWidth + k) * stride + c, u[p], some);
        });
      if (stride > channels)
        for (int64_t row = 0; row < kPlaces * kWidth; ++row) rows[row * stride + channels] = E{};
      for (int p = 0; p < kPlaces; ++p)
        transpose(reinterpret_cast<const Word*>(rows.data() + p * kWidth * stride), terms_, count, terms_, kWidth,
                  reinterpret_cast<Word*>(at(panel, p)), kWidth);
    }
  }

  // The taps [C, 3, 3, K] in the opposite order: row c stays row c.
  void rows(const S* weight, int64_t channels, int64_t channels_out, int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t half = 0; half < kWidth; half += kLanes<T>) {
        const int64_t first = panel * kWidth + half, left = channels_out - first;
        const int64_t some = left < kLanes<T> ? left : kLanes<T>;
        for (int64_t c = 0; c < channels; c += Factor<S>::kTerms) {
          vec<T> u[2][kPlaces] = {};
          for (int term = 0; term < Factor<S>::kTerms; ++term) {
            if (some <= 0 || c + term >= channels) continue;
            vec<T> g[9];
#pragma GCC unroll 9
            for (int tap = 0; tap < 9; ++tap)
              g[tap] = load_some(weight + ((c + term) * 9 + 8 - tap) * channels_out + first, some);
            transform_taps(g, u[term]);
          }
          const int64_t offset = c / Factor<S>::kTerms * kWidth + half;
#pragma GCC unroll 16
          for (int p = 0; p < kPlaces; ++p) {
            if constexpr (kInPairs<S>) store(at(panel, p) + offset, u[0][p], u[1][p]);
            else store(at(panel, p) + offset, u[0][p]);
          }
        }
      }
  }

  factor_t<S>* at(int64_t panel, int place) { return data_.data() + (panel * kPlaces + place) * terms_ * kWidth; }

  int64_t terms_, panels_;
  Buffer<factor_t<S>> data_;
};

// MapTiles of a block: as many as leave it in the second-level cache, in blocks of about the same length, of even
// number.
template <class E>
inline int64_t block_tiles(int64_t tiles, int64_t channels) {
  constexpr int64_t bytes = int64_t{256} << 10;
  const int64_t fit = at_least(bytes / (kPlaces * channels * static_cast<int64_t>(sizeof(E))), 56);
  const int64_t blocks = round_up((tiles + fit - 1) / fit, 2);
  return (tiles + blocks - 1) / blocks;
}

template <class S>
void compute(const Conv3x3& a) {
  using T = accumulator_t<S>;
  using E = transformed_t<S>;
  constexpr int64_t width = Block<T>::kWidth, slice = 4 * kTall;
  const MapTiles tiles{a.shape};
  const MapShape& shape = a.shape;
  const int64_t channels = shape.channels, terms = factors<S>(channels), stride = round_up(channels, 2 * kLanes<T>);
  const int64_t count = tiles.count(), length = block_tiles<E>(count, stride);
  const int64_t place_of_map = place_stride<E>(length * stride), place_of_sums = place_stride<T>(slice * width);
  const TapPanels<S> panels(a);
  const S* x = static_cast<const S*>(a.x);
  S* y = static_cast<S*>(a.y);
  parallel_ranges((count + length - 1) / length, [&](int64_t first_block, int64_t last_block) {
    Buffer<E> map(kPlaces * place_of_map);
    Buffer<T> sums(kPlaces * place_of_sums);
    if (stride > channels) std::memset(map.data(), 0, kPlaces * place_of_map * sizeof(E));
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t first = block * length, last = at_most(first + length, count);
      for (int64_t at = first; at < last;) {
        const int64_t row = at / tiles.columns, begin = at % tiles.columns;
        const int64_t end = at_most(begin + last - at, tiles.columns);
        for_vectors<T>(channels, [&](int64_t c, int64_t some) {
          E* const to = map.data() + (at - begin - first) * stride + c;
          transform_tiles(x, tiles, row, begin, end, c, some, [&](int p, int64_t tile, vec<T> v) ANOMEM_ALWAYS {
            store(to + p * place_of_map + tile * stride, v);
          });
        });
        at += end - begin;
      }
      for (int64_t column = 0; column < a.channels_out; column += width) {
        const int64_t wide = at_most(width, a.channels_out - column);
        for (int64_t part = first; part < last; part += slice) {
          const int64_t part_end = at_most(part + slice, last);
          const E* const rows = map.data() + (part - first) * stride;
          for (int p = 0; p < kPlaces; ++p)
            product(part_end - part, width, terms, reinterpret_cast<const factor_t<S>*>(rows + p * place_of_map),
                    stride / Factor<S>::kTerms, 1, panels.panel(column, p), sums.data() + p * place_of_sums, width,
                    false);
          for (int64_t at = part; at < part_end; ++at) {
            const int64_t row = at / tiles.columns, top = row % tiles.rows * 2, left = at % tiles.columns * 2;
            const int64_t high = at_most(2, shape.height - top), broad = at_most(2, shape.width - left);
            S* const to = y + ((row / tiles.rows * shape.height + top) * shape.width + left) * a.channels_out + column;
            for_vectors<T>(wide, [&](int64_t k, int64_t some) {
              vec<T> m[kPlaces], result[4];
#pragma GCC unroll 16
              for (int p = 0; p < kPlaces; ++p) m[p] = load(sums.data() + p * place_of_sums + (at - part) * width + k);
              finish_tile(m, result);
#pragma GCC unroll 2
              for (int64_t i = 0; i < 2; ++i)
#pragma GCC unroll 2
                for (int64_t j = 0; j < 2; ++j)
                  if (i < high && j < broad)
                    store_some(to + (i * shape.width + j) * a.channels_out + k, result[2 * i + j], some);
            });
          }
        }
      }
    }
  });
}

// The two factors of the taps' gradient for a block of tile rows. A tile row of an odd number of tiles gets one more,
// of zeros: factors may be pairs of tiles.
template <class S>
class TilePairs {
 public:
  using T = accumulator_t<S>;
  using F = factor_t<S>;
  static constexpr int kWidth = Block<T>::kWidth;
  static constexpr int kTerms = Factor<S>::kTerms;

  TilePairs(const MapTiles& tiles, int64_t rows, int64_t channels_out)
      : tiles_(tiles),
        row_terms_(factors<S>(tiles.columns)),
        terms_(rows * row_terms_),
        grad_stride_(padded_stride<T>(channels_out)),
        map_place_(place_stride<F>(terms_ * round_up(tiles.shape.channels, kWidth))),
        grad_place_(place_stride<F>(terms_ * grad_stride_)),
        map_(kPlaces * map_place_),
        grad_(kPlaces * grad_place_) {}

  // Right factor [terms, C] in panels, left factor [K, terms] through its strides.
  const F* map(int place) const { return map_.data() + place * map_place_; }
  const F* grad(int place) const { return grad_.data() + place * grad_place_; }
  int64_t grad_stride() const { return grad_stride_; }
  int64_t row_terms() const { return row_terms_; }

  // Tile row `row` of the map, as the `slot`-th of `rows` in this block.
  void set(const Conv3x3Weight& a, int64_t row, int64_t slot, int64_t rows) {
    const int64_t terms = rows * row_terms_, first = slot * row_terms_;
    for (int64_t c = 0; c < round_up(a.shape.channels, kWidth); c += kLanes<T>) {
      const int64_t left = a.shape.channels - c, some = left < kLanes<T> ? left : kLanes<T>;
      F* const to = map_.data() + c / kWidth * kWidth * terms + first * kWidth + c % kWidth;
      if (some <= 0) {
        for (int64_t p = 0; p < kPlaces; ++p)
          for (int64_t term = 0; term < row_terms_; ++term)
            put(to + p * map_place_ + term * kWidth, vec<T>{}, vec<T>{});
        continue;
      }
      vec<T> even[kPlaces] = {};
      transform_tiles(static_cast<const S*>(a.x), tiles_, row, 0, tiles_.columns, c, some,
                      [&](int p, int64_t tile, vec<T> v) ANOMEM_ALWAYS {
                        F* const at = to + p * map_place_ + tile / kTerms * kWidth;
                        if (kTerms == 1) return put(at, v, vec<T>{});
                        if (tile % 2 == 1) return put(at, even[p], v);
                        even[p] = v;
                        if (tile + 1 == tiles_.columns) put(at, v, vec<T>{});
                      });
    }
    for (int64_t k = 0; k < a.channels_out; k += kLanes<T>) {
      const int64_t some = at_most(kLanes<T>, a.channels_out - k);
      F* const to = grad_.data() + first * grad_stride_ + k;
      for (int64_t term = 0; term < row_terms_; ++term) {
        vec<T> n[2][kPlaces] = {};
        for (int i = 0; i < kTerms; ++i)
          if (kTerms * term + i < tiles_.columns) spread(a, row, kTerms * term + i, k, some, n[i]);
#pragma GCC unroll 16
        for (int p = 0; p < kPlaces; ++p) put(to + p * grad_place_ + term * grad_stride_, n[0][p], n[1][p]);
      }
    }
  }

 private:
  // A pair of tiles, or the first alone.
  static ANOMEM_INLINE void put(F* to, vec<T> first, vec<T> second) {
    if constexpr (kTerms == 2) store(to, first, second);
    else store(to, first);
  }

  ANOMEM_INLINE void spread(const Conv3x3Weight& a, int64_t row, int64_t tile, int64_t k, int64_t some,
                            vec<T> (&n)[kPlaces]) const {
    const MapShape& shape = a.shape;
    const int64_t top = row % tiles_.rows * 2, left = tile * 2;
    const S* const from = static_cast<const S*>(a.grad) +
                          ((row / tiles_.rows * shape.height + top) * shape.width + left) * a.channels_out + k;
    vec<T> dy[4] = {};
#pragma GCC unroll 2
    for (int64_t i = 0; i < 2; ++i)
#pragma GCC unroll 2
      for (int64_t j = 0; j < 2; ++j)
        if (top + i < shape.height && left + j < shape.width)
          dy[2 * i + j] = load_some(from + (i * shape.width + j) * a.channels_out, some);
    spread_tile(dy, n);
  }

  const MapTiles& tiles_;
  int64_t row_terms_, terms_, grad_stride_, map_place_, grad_place_;
  Buffer<F> map_, grad_;
};

template <class S>
void compute(const Conv3x3Weight& a) {
  using T = accumulator_t<S>;
  constexpr int64_t width = Block<T>::kWidth, slice = 4 * kTall;
  const MapTiles tiles{a.shape};
  const int64_t channels = a.shape.channels, columns = round_up(channels, width), stride = padded_stride<T>(channels);
  const int64_t rows = a.shape.batch * tiles.rows;
  constexpr int64_t bytes = int64_t{512} << 10;
  const int64_t row_bytes = kPlaces * round_up(tiles.columns, 2) * (channels + a.channels_out) *
                            static_cast<int64_t>(sizeof(transformed_t<S>));
  const int64_t enough = (256 + tiles.columns - 1) / tiles.columns;
  const int64_t fit = at_least(at_most(rows, at_least(bytes / row_bytes, enough)), 1);
  TilePairs<S> pairs(tiles, fit, a.channels_out);
  const int64_t place_of_sums = place_stride<T>(a.channels_out * stride);
  Buffer<T> sums(kPlaces * place_of_sums);
  if (rows == 0) std::memset(sums.data(), 0, kPlaces * place_of_sums * sizeof(T));
  const int64_t slices = (a.channels_out + slice - 1) / slice;
  for (int64_t first = 0; first < rows; first += fit) {
    const int64_t count = at_most(fit, rows - first);
    parallel(count, [&](int64_t slot) { pairs.set(a, first + slot, slot, count); });
    parallel(kPlaces * slices, [&](int64_t item) {
      const int64_t p = item / slices, k = item % slices * slice;
      product(at_most(slice, a.channels_out - k), columns, count * pairs.row_terms(),
              pairs.grad(static_cast<int>(p)) + k, 1, pairs.grad_stride(), pairs.map(static_cast<int>(p)),
              sums.data() + p * place_of_sums + k * stride, stride, first > 0);
    });
  }
  S* dweight = static_cast<S*>(a.dweight);
  parallel(a.channels_out, [&](int64_t k) {
    for_vectors<T>(channels, [&](int64_t c, int64_t some) {
      vec<T> u[kPlaces], g[9];
#pragma GCC unroll 16
      for (int p = 0; p < kPlaces; ++p) u[p] = load(sums.data() + p * place_of_sums + k * stride + c);
      gradient_of_taps(u, g);
#pragma GCC unroll 9
      for (int tap = 0; tap < 9; ++tap) store_some(dweight + (k * 9 + tap) * channels + c, g[tap], some);
    });
  });
}

}  // namespace anomem::cpu::ANOMEM_ISA
