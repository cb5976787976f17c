// The transforms of Winograd's minimal filtering F(2×2, 3×3): Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks", 2016.
//
// A tile is 2×2 pixels of the result. It takes 4×4 pixels d of the map and 3×3 taps g:
//
//   y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A
//
// 16 multiplications where a direct convolution has 36. Summed over channels, the product ⊙ is 16 matrix products, one
// for each of the 16 places of a transformed tile. Gradients are the transposes: of the taps Gᵀ [(Bᵀ d B) ⊙ (A dy Aᵀ)]
// G.
#pragma once

#include "cpu/simd.h"

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

}  // namespace anomem::cpu::ANOMEM_ISA
