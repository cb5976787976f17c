// Rows taken from a feature map, at sampled positions or at all of them, and normalised.
#pragma once

#include "moments.cuh"

namespace anomem::cuda {

template <class T>
struct TakeArguments {
  const T* map;  // [B, C, H, W] with any strides
  int64_t batch;
  int64_t channels;
  int64_t width;
  int64_t size;  // H·W
  int64_t stride_batch, stride_channel, stride_height, stride_width;
  const int64_t* positions;  // [n], or [B, n], or null for first, first + 1, …
  int64_t positions_stride;  // between images: n, or 0 where all share them
  int64_t first;
  int64_t count;  // n
  T* out;         // [n, B, C] or [B, n, C]
  int64_t out_stride_position, out_stride_batch;
  float* inv_norm;  // [n, B], 1/|x| and 0 for a zero row, or null
  int normalize;

  // Start of the vector of image b at its i-th position. Null if the position lies outside the map.
  __device__ const T* vector(int64_t b, int64_t i) const {
    const int64_t position = positions == nullptr ? first + i : positions[b * positions_stride + i];
    if (position < 0 || position >= size) return nullptr;
    return map + b * stride_batch + position / width * stride_height + position % width * stride_width;
  }
};

// Maps whose channels are adjacent (channels-last; plain rows [N, d] as one image): one warp per vector.
template <class T>
struct TakeRows : WarpPerRow<TakeRows<T>, TakeArguments<T>> {
  using Arguments = TakeArguments<T>;

  __host__ __device__ static int64_t rows(const Arguments& a) { return a.count * a.batch; }

  __device__ static void row(const Arguments& a, int64_t r, int lane) {
    const int64_t i = r / a.batch, b = r % a.batch;
    const T* x = a.vector(b, i);  // [C]
    T* y = a.out + i * a.out_stride_position + b * a.out_stride_batch;
    Affine affine{0.0f, x == nullptr ? NAN : 1.0f};
    if (x != nullptr && a.normalize != kNone) affine = row_affine(x, a.channels, a.normalize, lane);
    if (a.inv_norm != nullptr && lane == 0) a.inv_norm[r] = affine.scale;
    walk(y, a.channels, lane, kWarp, [&](auto width, int64_t c) {
      float v[width];
      if (x != nullptr) {
        load(v, x + c);
      } else {
        for (float& value : v) value = NAN;
      }
#pragma unroll
      for (float& value : v) value = (value - affine.shift) * affine.scale;
      store(y + c, v);
    });
  }
};

// Maps of planes (NCHW): a block moves 32 positions of one image through shared memory, to read along the planes and
// write along the channels. Up to kChunk channels are read once; more channels are read twice when normalised.
template <class T>
struct TakePlanes {
  using Arguments = TakeArguments<T>;
  static constexpr int kThreads = kBlock;
  static constexpr int kPositions = kWarp;
  static constexpr int kChunk = 1024 / static_cast<int>(sizeof(T));
  static constexpr int kPad = 4 / static_cast<int>(sizeof(T));  // an odd pitch in words: no bank conflicts
  static constexpr int kPerWarp = kPositions / kWarps;

  struct Shared {
    T tile[kPositions][kChunk + kPad];
    Affine affine[kPositions];
  };

  static int64_t blocks(const Arguments& a) { return ceil_div(a.count, kPositions) * a.batch; }

  __device__ static void run(const Arguments& a, Shared& shared) {
    const int64_t tiles = ceil_div(a.count, kPositions);
    const bool read_twice = a.normalize != kNone && a.channels > kChunk;
    for (int64_t item = blockIdx.x; item < tiles * a.batch; item += gridDim.x) {
      const int64_t b = item / tiles, start = item % tiles * kPositions;
      Moments moments[kPerWarp];
      for (int pass = read_twice ? 0 : 1; pass < 2; ++pass) {
        for (int64_t c = 0; c < a.channels; c += kChunk) {
          const int64_t left = a.channels - c;
          const int width = static_cast<int>(left < kChunk ? left : kChunk);
          __syncthreads();  // the last content of the tile is no longer read
          fill(a, shared, b, start, c, width);
          __syncthreads();
          if (a.normalize != kNone && (pass == 0 || !read_twice)) measure(a, shared, width, moments);
          if (pass == 0) continue;
          if (c == 0) settle(a, shared, moments);
          write(a, shared, b, start, c, width);
        }
      }
    }
  }

 private:
  __device__ static void fill(const Arguments& a, Shared& shared, int64_t b, int64_t start, int64_t c, int width) {
    const int p = threadIdx.x % kPositions;
    const T* x = start + p < a.count ? a.vector(b, start + p) : nullptr;
    if (x != nullptr) x += c * a.stride_channel;
#pragma unroll 4
    for (int k = threadIdx.x / kPositions; k < width; k += kWarps) {
      shared.tile[p][k] = x != nullptr ? x[k * a.stride_channel] : narrowed<T>(NAN);
    }
  }

  __device__ static void measure(const Arguments& a, const Shared& shared, int width, Moments (&moments)[kPerWarp]) {
    const int lane = threadIdx.x % kWarp;
    const float share = 1.0f / width;
#pragma unroll
    for (int j = 0; j < kPerWarp; ++j) {
      const T* x = shared.tile[threadIdx.x / kWarp * kPerWarp + j];
      float sum = 0;
      if (a.normalize == kLayer) {
        for (int k = lane; k < width; k += kWarp) sum += widen(x[k]);
        sum = warp_sum(sum);
      }
      const float mean = sum * share;  // 0 for the L2 norm, whose second moment is about the origin
      float square = 0;
      for (int k = lane; k < width; k += kWarp) square += (widen(x[k]) - mean) * (widen(x[k]) - mean);
      moments[j].merge({static_cast<float>(width), mean, warp_sum(square)});
    }
  }

  // Writes the normalisation of the warp's positions to shared memory, for all of its lanes. A vector whose squares
  // exceed float32 becomes zero: another read of its channels, as a row's in moments.cuh, cost registers in all others.
  __device__ static void settle(const Arguments& a, Shared& shared, const Moments (&moments)[kPerWarp]) {
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int j = 0; j < kPerWarp; ++j) {
        shared.affine[threadIdx.x / kWarp * kPerWarp + j] = affine_of(moments[j], a.normalize);
      }
    }
    __syncwarp();
  }

  __device__ static void write(const Arguments& a, const Shared& shared, int64_t b, int64_t start, int64_t c,
                               int width) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll 1  // unrolled it spills
    for (int j = 0; j < kPerWarp; ++j) {
      const int p = threadIdx.x / kWarp * kPerWarp + j;
      const int64_t i = start + p;
      if (i >= a.count) return;
      const Affine affine = shared.affine[p];
      if (a.inv_norm != nullptr && lane == 0 && c == 0) a.inv_norm[i * a.batch + b] = affine.scale;
      T* y = a.out + i * a.out_stride_position + b * a.out_stride_batch + c;
      walk(y, width, lane, kWarp, [&](auto span, int64_t k) {
        float v[span];
#pragma unroll
        for (int n = 0; n < span; ++n) v[n] = (widen(shared.tile[p][k + n]) - affine.shift) * affine.scale;
        store(y + k, v);
      });
    }
  }
};

}  // namespace anomem::cuda
