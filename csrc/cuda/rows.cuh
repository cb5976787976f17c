// Row passes around the products of retrieval: the backward pass of the normalisation, the distance of a deviation map,
// and the sum of the chunks' gradients.
#pragma once

#include "moments.cuh"

namespace anomem::cuda {

template <class T>
struct NormalizeBackwardArguments {
  const T* x;  // [N, d], rows `stride` apart
  int64_t stride;
  const float* dy;  // [N, d]
  int64_t rows;
  int64_t features;
  int normalize;
  T* dx;  // [N, d]
};

// One warp per row; mean and length are computed again from x.
//   layer: dx = (dy − mean(dy) − y mean(y dy)) / sigma        l2: dx = (dy − y (y·dy)) / |x|, 0 for a zero row
template <class T>
struct NormalizeBackward : WarpPerRow<NormalizeBackward<T>, NormalizeBackwardArguments<T>> {
  using Arguments = NormalizeBackwardArguments<T>;

  __host__ __device__ static int64_t rows(const Arguments& a) { return a.rows; }

  __device__ static void row(const Arguments& a, int64_t r, int lane) {
    const T* x = a.x + r * a.stride;
    const float* dy = a.dy + r * a.features;
    const Affine affine = row_affine(x, a.features, a.normalize, lane);
    float shift = 0, projection = 0;
    if (a.normalize != kNone) {
      walk(x, a.features, lane, kWarp, [&](auto width, int64_t c) {
        float v[width], dv[width];
        load(v, x + c);
        load(dv, dy + c);
#pragma unroll
        for (int k = 0; k < width; ++k) {
          shift += dv[k];
          projection += dv[k] * (v[k] - affine.shift) * affine.scale;
        }
      });
      projection = warp_sum(projection);
      shift = warp_sum(shift);
      if (a.normalize == kLayer) {
        projection /= a.features;
        shift /= a.features;
      } else {
        shift = 0;
      }
    }
    T* dx = a.dx + r * a.features;
    walk(dx, a.features, lane, kWarp, [&](auto width, int64_t c) {
      float v[width], dv[width];
      load(v, x + c);
      load(dv, dy + c);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const float y = (v[k] - affine.shift) * affine.scale;
        dv[k] = a.normalize == kNone ? dv[k] : (dv[k] - shift - y * projection) * affine.scale;
      }
      store(dx + c, dv);
    });
  }
};

template <class T>
struct RowDistanceArguments {
  const T* query;          // [R, d], normalised
  const float* retrieved;  // [R, d]
  int64_t rows;
  int64_t features;
  int distance;
  float* out;  // [R]
};

// 1 − cos or |q − r|, one warp per row.
template <class T>
struct RowDistance : WarpPerRow<RowDistance<T>, RowDistanceArguments<T>> {
  using Arguments = RowDistanceArguments<T>;

  __host__ __device__ static int64_t rows(const Arguments& a) { return a.rows; }

  __device__ static void row(const Arguments& a, int64_t r, int lane) {
    const T* q = a.query + r * a.features;
    const float* y = a.retrieved + r * a.features;
    float dot = 0, left = 0, right = 0, square = 0;
    walk(q, a.features, lane, kWarp, [&](auto width, int64_t c) {
      float u[width], v[width];
      load(u, q + c);
      load(v, y + c);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        dot += u[k] * v[k];
        left += u[k] * u[k];
        right += v[k] * v[k];
        square += (u[k] - v[k]) * (u[k] - v[k]);
      }
    });
    float result;
    if (a.distance == kEuclidean) {
      result = sqrtf(warp_sum(square));
    } else {
      const float lengths = length(warp_sum(left)) * length(warp_sum(right));
      result = 1.0f - warp_sum(dot) / lengths;
    }
    if (lane == 0) a.out[r] = result;
  }

 private:
  // As torch.cosine_similarity with eps 1e-12, and a NaN stays.
  __device__ static float length(float square) {
    const float root = sqrtf(square);
    return root < kL2Eps ? kL2Eps : root;
  }
};

struct AccumulateArguments {
  float* sum;         // [n]
  const float* part;  // [n]
  int64_t count;
};

struct Accumulate {
  using Arguments = AccumulateArguments;
  using Shared = Nothing;
  static constexpr int kThreads = kBlock;

  static int64_t blocks(const Arguments& a) { return ceil_div(a.count, kBlock * kPack<float>); }

  __device__ static void run(const Arguments& a, Shared&) {
    const int64_t lanes = static_cast<int64_t>(gridDim.x) * kBlock;
    for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) * kPack<float>; i < a.count;
         i += lanes * kPack<float>) {
      float v[kPack<float>], dv[kPack<float>];
      load_some(v, a.sum + i, a.count - i);
      load_some(dv, a.part + i, a.count - i);
#pragma unroll
      for (int k = 0; k < kPack<float>; ++k) v[k] += dv[k];
      store_some(a.sum + i, v, a.count - i);
    }
  }
};

}  // namespace anomem::cuda
