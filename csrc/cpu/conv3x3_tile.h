// The transforms of Winograd's minimal filtering F(2×2, 3×3): Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks", 2016.
//
// A tile is 2×2 pixels of the result. It takes 4×4 pixels d of the map and 3×3 taps g:
//
//   y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A
//
// 16 multiplications where a direct convolution has 36. Summed over channels, the product ⊙ is 16 matrix products, one
// for each of the 16 places of a transformed tile. The gradient of the taps is Gᵀ [(Bᵀ d B) ⊙ (A dy Aᵀ)] G.
#pragma once

#include "cpu/conv3x3.h"
#include "cpu/factors.h"
#include "cpu/rows.h"

namespace anomem::cpu::ANOMEM_ISA {

constexpr int kPlaces = 16;

// One column of Bᵀ d.
template <class V>
ANOMEM_INLINE void transform_column(const V (&d)[4], V (&to)[4]) {
  to[0] = d[0] - d[2];
  to[1] = d[1] + d[2];
  to[2] = d[2] - d[1];
  to[3] = d[1] - d[3];
}

// G g Gᵀ.
template <class V>
ANOMEM_INLINE void transform_taps(const V (&g)[9], V (&u)[kPlaces]) {
  V rows[4][3];
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
    const V outer = g[j] + g[6 + j];
    rows[0][j] = g[j];
    rows[1][j] = (outer + g[3 + j]) * 0.5f;
    rows[2][j] = (outer - g[3 + j]) * 0.5f;
    rows[3][j] = g[6 + j];
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const V outer = rows[i][0] + rows[i][2];
    u[4 * i] = rows[i][0];
    u[4 * i + 1] = (outer + rows[i][1]) * 0.5f;
    u[4 * i + 2] = (outer - rows[i][1]) * 0.5f;
    u[4 * i + 3] = rows[i][2];
  }
}

// Gᵀ u G.
template <class V>
ANOMEM_INLINE void gradient_of_taps(const V (&u)[kPlaces], V (&g)[9]) {
  V rows[3][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const V sum = (u[4 + j] + u[8 + j]) * 0.5f;
    rows[0][j] = u[j] + sum;
    rows[1][j] = (u[4 + j] - u[8 + j]) * 0.5f;
    rows[2][j] = sum + u[12 + j];
  }
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    const V sum = (rows[i][1] + rows[i][2]) * 0.5f;
    g[3 * i] = rows[i][0] + sum;
    g[3 * i + 1] = (rows[i][1] - rows[i][2]) * 0.5f;
    g[3 * i + 2] = sum + rows[i][3];
  }
}

// Aᵀ m A.
template <class V>
ANOMEM_INLINE void finish_tile(const V (&m)[kPlaces], V (&y)[4]) {
  V rows[2][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    rows[0][j] = m[j] + m[4 + j] + m[8 + j];
    rows[1][j] = m[4 + j] - m[8 + j] - m[12 + j];
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    y[2 * i] = rows[i][0] + rows[i][1] + rows[i][2];
    y[2 * i + 1] = rows[i][1] - rows[i][2] - rows[i][3];
  }
}

// A dy Aᵀ.
template <class V>
ANOMEM_INLINE void spread_tile(const V (&dy)[4], V (&n)[kPlaces]) {
  V rows[4][2];
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    rows[0][j] = dy[j];
    rows[1][j] = dy[j] + dy[2 + j];
    rows[2][j] = dy[j] - dy[2 + j];
    rows[3][j] = -dy[2 + j];
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    n[4 * i] = rows[i][0];
    n[4 * i + 1] = rows[i][0] + rows[i][1];
    n[4 * i + 2] = rows[i][0] - rows[i][1];
    n[4 * i + 3] = -rows[i][1];
  }
}

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

}  // namespace anomem::cpu::ANOMEM_ISA
