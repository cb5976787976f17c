// The 3×3 convolution by Winograd's transforms (conv3x3_tile.h): per tile and pair of channels 16 multiplications in
// place of 36. The gradient of the map is one too, of the upstream gradient; conv3x3_weight.h has that of the weight.
// Bfloat16 on processors with AMX goes another way (conv3x3_direct.h).
//
// The map's tiles are cut into blocks. A block is transformed, multiplied by the taps (conv3x3_taps.h) at each of the
// 16 places and transformed back while it lies in the second-level cache.
#pragma once

#include "cpu/conv3x3_direct_weight.h"
#include "cpu/conv3x3_taps.h"
#include "cpu/conv3x3_weight.h"
#include "cpu/product.h"

namespace anomem::cpu::ANOMEM_ISA {

// Tiles of a block: as many as leave it in the second-level cache, in blocks of about the same length, of even number.
template <class E>
inline int64_t block_tiles(int64_t tiles, int64_t channels) {
  constexpr int64_t bytes = int64_t{256} << 10;
  const int64_t fit = at_least(bytes / (kPlaces * channels * static_cast<int64_t>(sizeof(E))), 56);
  const int64_t blocks = round_up((tiles + fit - 1) / fit, 2);
  return (tiles + blocks - 1) / blocks;
}

// One block of tiles on its way through the convolution, on one thread.
template <class S>
class TileBlock {
 public:
  using T = accumulator_t<S>;
  using E = transformed_t<S>;

  TileBlock(const Conv3x3& a, const TapPanels<S>& taps, int64_t length)
      : a_(a),
        tiles_{a.shape},
        taps_(taps),
        stride_(round_up(a.shape.channels, 2 * kLanes<T>)),
        map_place_(place_stride<E>(length * stride_)),
        sums_place_(place_stride<T>(kSlice * kWidth)),
        map_(kPlaces * map_place_),
        sums_(kPlaces * sums_place_) {
    if (stride_ > a.shape.channels) std::memset(map_.data(), 0, kPlaces * map_place_ * sizeof(E));
  }

  // The tiles [first, last) of the map.
  void run(int64_t first, int64_t last) {
    for (int64_t at = first; at < last;) {
      const int64_t begin = at % tiles_.columns, end = at_most(begin + last - at, tiles_.columns);
      transform(at / tiles_.columns, begin, end, at - first);
      at += end - begin;
    }
    for (int64_t column = 0; column < a_.channels_out; column += kWidth)
      for (int64_t slice = first; slice < last; slice += kSlice) {
        const int64_t count = at_most(kSlice, last - slice);
        multiply(slice - first, count, column);
        for (int64_t i = 0; i < count; ++i) finish(slice + i, i, column);
      }
  }

 private:
  static constexpr int64_t kWidth = Block<T>::kWidth, kSlice = 4 * kTall;

  // The tiles [begin, end) of a tile row, to place `to` of the block.
  void transform(int64_t row, int64_t begin, int64_t end, int64_t to) {
    for_vectors<T>(a_.shape.channels, [&](int64_t c, int64_t some) {
      E* const start = map_.data() + (to - begin) * stride_ + c;
      transform_tiles(static_cast<const S*>(a_.x), tiles_, row, begin, end, c, some,
                      [&](int p, int64_t tile, vec<T> v)
                          ANOMEM_ALWAYS { store(start + p * map_place_ + tile * stride_, v); });
    });
  }

  // `count` tiles of the block from `first` on, by one panel of taps.
  void multiply(int64_t first, int64_t count, int64_t column) {
    for (int p = 0; p < kPlaces; ++p)
      product(count, kWidth, factors<S>(a_.shape.channels),
              reinterpret_cast<const factor_t<S>*>(map_.data() + p * map_place_ + first * stride_),
              stride_ / Factor<S>::kTerms, 1, taps_.panel(column, p), sums_.data() + p * sums_place_, kWidth, false);
  }

  // Row `row` of the sums becomes the pixels of a tile.
  void finish(int64_t tile, int64_t row, int64_t column) {
    const MapShape& shape = a_.shape;
    const int64_t tile_row = tile / tiles_.columns, left = tile % tiles_.columns * 2;
    const int64_t top = tile_row % tiles_.rows * 2;
    S* const to = static_cast<S*>(a_.y) + column +
                  ((tile_row / tiles_.rows * shape.height + top) * shape.width + left) * a_.channels_out;
    for_vectors<T>(at_most(kWidth, a_.channels_out - column), [&](int64_t k, int64_t some) {
      vec<T> m[kPlaces], pixels[4];
#pragma GCC unroll 16
      for (int p = 0; p < kPlaces; ++p) m[p] = load(sums_.data() + p * sums_place_ + row * kWidth + k);
      finish_tile(m, pixels);
#pragma GCC unroll 2
      for (int64_t i = 0; i < 2; ++i)
#pragma GCC unroll 2
        for (int64_t j = 0; j < 2; ++j)
          if (top + i < shape.height && left + j < shape.width)
            store_some(to + (i * shape.width + j) * a_.channels_out + k, pixels[2 * i + j], some);
    });
  }

  const Conv3x3& a_;
  const MapTiles tiles_;
  const TapPanels<S>& taps_;
  int64_t stride_, map_place_, sums_place_;
  Buffer<E> map_;   // 16 × [tiles, C]
  Buffer<T> sums_;  // 16 × [tiles of a slice, channels of a panel]
};

template <class S>
void compute(const Conv3x3& a) {
#if ANOMEM_BFLOAT16_PAIRS
  if (a.direct) return compute_directly(a);
#endif
  const int64_t count = MapTiles{a.shape}.count();
  const int64_t length = block_tiles<transformed_t<S>>(count, round_up(a.shape.channels, 2 * kLanes<accumulator_t<S>>));
  const TapPanels<S> taps(a);
  parallel_ranges((count + length - 1) / length, [&](int64_t begin, int64_t end) {
    TileBlock<S> block(a, taps, length);
    for (int64_t i = begin; i < end; ++i) block.run(i * length, at_most((i + 1) * length, count));
  });
}

}  // namespace anomem::cpu::ANOMEM_ISA
