// The gradient of a 3×3 convolution's weight by the transforms of conv3x3_tile.h: at each of the 16 places a product of
// the upstream gradient's tiles and the map's, summed over the tiles.
#pragma once

#include "cpu/conv3x3_direct_weight.h"
#include "cpu/conv3x3_tile.h"
#include "cpu/parallel.h"
#include "cpu/product.h"

namespace anomem::cpu::ANOMEM_ISA {

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

  // Tile row `row` of both maps, as the `slot`-th of `rows` in this block.
  void set(const Conv3x3Weight& a, int64_t row, int64_t slot, int64_t rows) {
    set_map(a, row, slot * row_terms_, rows * row_terms_);
    set_grad(a, row, slot * row_terms_);
  }

 private:
  void set_map(const Conv3x3Weight& a, int64_t row, int64_t first, int64_t terms) {
    for (int64_t c = 0; c < round_up(a.shape.channels, kWidth); c += kLanes<T>) {
      const int64_t some = at_most(kLanes<T>, a.shape.channels - c);
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
  }

  void set_grad(const Conv3x3Weight& a, int64_t row, int64_t first) {
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

  // A pair of tiles, or the first alone.
  static ANOMEM_INLINE void put(F* to, vec<T> first, vec<T> second) {
    if constexpr (kTerms == 2) store(to, first, second);
    else store(to, first);
  }

  // One tile of the upstream gradient; pixels outside are zero.
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

// Tile rows of a block: as many as leave their factors in the second-level cache, and enough for long sums.
template <class S>
inline int64_t block_rows(const MapTiles& tiles, int64_t channels_out) {
  constexpr int64_t bytes = int64_t{512} << 10, least = 256;
  const int64_t channels = tiles.shape.channels + channels_out;
  const int64_t row = kPlaces * round_up(tiles.columns, 2) * channels * static_cast<int64_t>(sizeof(transformed_t<S>));
  const int64_t fit = at_least(bytes / row, (least + tiles.columns - 1) / tiles.columns);
  return at_least(at_most(fit, tiles.shape.batch * tiles.rows), 1);
}

template <class S>
void compute(const Conv3x3Weight& a) {
#if ANOMEM_BFLOAT16_PAIRS
  if (a.direct) return compute_directly(a);
#endif
  using T = accumulator_t<S>;
  constexpr int64_t slice = 4 * kTall;
  const MapTiles tiles{a.shape};
  const int64_t channels = a.shape.channels, outputs = a.channels_out, rows = a.shape.batch * tiles.rows;
  const int64_t columns = round_up(channels, Block<T>::kWidth), stride = padded_stride<T>(channels);
  const int64_t place = place_stride<T>(outputs * stride), length = block_rows<S>(tiles, outputs);
  const int64_t slices = (outputs + slice - 1) / slice;
  TilePairs<S> pairs(tiles, length, outputs);
  Buffer<T> sums(kPlaces * place);  // 16 × [K, C]
  if (rows == 0) std::memset(sums.data(), 0, kPlaces * place * sizeof(T));
  for (int64_t first = 0; first < rows; first += length) {
    const int64_t count = at_most(length, rows - first);
    parallel(count, [&](int64_t slot) { pairs.set(a, first + slot, slot, count); });
    parallel(kPlaces * slices, [&](int64_t item) {
      const int p = static_cast<int>(item / slices);
      const int64_t k = item % slices * slice;
      product(at_most(slice, outputs - k), columns, count * pairs.row_terms(), pairs.grad(p) + k, 1,
              pairs.grad_stride(), pairs.map(p), sums.data() + p * place + k * stride, stride, first > 0);
    });
  }
  S* dweight = static_cast<S*>(a.dweight);
  parallel(outputs, [&](int64_t k) {
    for_vectors<T>(channels, [&](int64_t c, int64_t some) {
      vec<T> u[kPlaces], g[9];
#pragma GCC unroll 16
      for (int p = 0; p < kPlaces; ++p) u[p] = load(sums.data() + p * place + k * stride + c);
      gradient_of_taps(u, g);
#pragma GCC unroll 9
      for (int tap = 0; tap < 9; ++tap) store_some(dweight + (k * 9 + tap) * channels + c, g[tap], some);
    });
  });
}

}  // namespace anomem::cpu::ANOMEM_ISA
