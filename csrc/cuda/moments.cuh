// Mean and second moment, merged without cancellation, and the normalisation of rows by them.
#pragma once

#include "primitives.cuh"

namespace anomem::cuda {

// Count, mean and Σ(x − mean)² of numbers. Merged as in Chan, Golub and LeVeque 1979.
struct Moments {
  float count = 0;
  float mean = 0;
  float square = 0;

  __device__ void merge(const Moments& other) {
    if (other.count == 0) return;
    const float total = count + other.count;
    const float delta = other.mean - mean;
    const float share = __fdividef(other.count, total);
    mean += delta * share;
    square += other.square + delta * delta * count * share;
    count = total;
  }
};

// What rows whose squares overflow are multiplied by; those of the largest float32 numbers then do not.
constexpr float kShrink = 7.888609052210118e-31f;  // 2^-100

// norm(x) = (x − shift) · scale.
struct Affine {
  float shift;
  float scale;
};

// For kL2 the moments are about the origin (mean 0). A row shorter than kL2Eps becomes zero; NaN stays NaN. rsqrtf and
// __fdividef are within two units in the last place; the exact functions are calls, which cost registers.
__device__ inline Affine affine_of(const Moments& m, int normalize) {
  if (normalize == kLayer) return {m.mean, rsqrtf(__fdividef(m.square, m.count) + kLayerEps)};
  if (normalize == kNone) return {0.0f, 1.0f};
  return {0.0f, m.square <= kL2Eps * kL2Eps ? 0.0f : rsqrtf(m.square)};
}

// The normalisation of a row [d] whose squares overflow, by one warp, from the row times 2^-100. Beside its
// variance kLayerEps is nothing.
template <class T>
__device__ inline Affine long_row_affine(const T* x, int64_t features, int normalize, int lane) {
  float mean = 0;
  if (normalize == kLayer) {
    for (int64_t c = lane; c < features; c += kWarp) mean += widen(x[c]) * kShrink;
    mean = warp_sum(mean) / features;
  }
  float square = 0;
  for (int64_t c = lane; c < features; c += kWarp) {
    const float difference = widen(x[c]) * kShrink - mean;
    square += difference * difference;
  }
  square = warp_sum(square);
  return {mean / kShrink, rsqrtf(normalize == kLayer ? square / features : square) * kShrink};
}

// The normalisation of one row [d], by one warp. The second pass reads from the cache.
template <class T>
__device__ inline Affine row_affine(const T* x, int64_t features, int normalize, int lane) {
  if (normalize == kNone) return {0.0f, 1.0f};
  float mean = 0;
  if (normalize == kLayer) {
    float sum = 0;
    walk(x, features, lane, kWarp, [&](auto width, int64_t c) {
      float v[width];
      load(v, x + c);
#pragma unroll
      for (float value : v) sum += value;
    });
    mean = warp_sum(sum) / features;
  }
  float square = 0;
  walk(x, features, lane, kWarp, [&](auto width, int64_t c) {
    float v[width];
    load(v, x + c);
#pragma unroll
    for (float value : v) square += (value - mean) * (value - mean);
  });
  square = warp_sum(square);
  if (!(square <= FLT_MAX)) return long_row_affine(x, features, normalize, lane);
  return affine_of({static_cast<float>(features), mean, square}, normalize);
}

}  // namespace anomem::cuda
