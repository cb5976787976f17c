// The variance hinge L = (1/d) Σ_j max(0, gamma − sqrt(Var_j + eps)): a stable pass over x, then one over its moments.
//
// A block covers eight packs of columns (128 bytes) by 32 interleaved slices of rows. Every thread runs Welford's
// update on its slice; slices, warps and splits are then merged in a fixed order. The group's first row is subtracted
// from all rows: a mean far from zero then costs no digits.
#pragma once

#include "moments.cuh"

namespace anomem::cuda {

constexpr int kPacksPerTile = 8;
constexpr int kSlices = kBlock / kPacksPerTile;
constexpr int64_t kRowsPerSplit = 512;

template <class T>
constexpr int kTileColumns = kPacksPerTile * kPack<T>;

template <class T>
struct VarianceMomentsArguments {
  const T* x;  // [G, B, d]
  int64_t groups;
  int64_t batch;
  int64_t features;
  float* pivot;   // [G, d], the first row of each group
  float* mean;    // [splits, G, d], less the pivot
  float* square;  // [splits, G, d], Σ(x − mean)² of a split's rows
};

template <class T>
struct VarianceMoments {
  using Arguments = VarianceMomentsArguments<T>;
  static constexpr int kThreads = kBlock;
  static constexpr int kWidth = kPack<T>;

  struct Shared {
    float count[kWarps];
    float mean[kWarps][kTileColumns<T>];
    float square[kWarps][kTileColumns<T>];
  };

  static int64_t splits(int64_t batch) { return ceil_div(batch, kRowsPerSplit); }
  static int64_t blocks(const Arguments& a) {
    return splits(a.batch) * a.groups * ceil_div(a.features, kTileColumns<T>);
  }

  __device__ static void run(const Arguments& a, Shared& shared) {
    const int pack = threadIdx.x % kPacksPerTile, slice = threadIdx.x / kPacksPerTile;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t tiles = ceil_div(a.features, kTileColumns<T>);
    const int64_t items = ceil_div(a.batch, kRowsPerSplit) * a.groups * tiles;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
      const int64_t tile = item % tiles * kTileColumns<T>, g = item / tiles % a.groups, split = item / tiles / a.groups;
      const int64_t column = tile + pack * kWidth;
      const int64_t begin = split * kRowsPerSplit;
      const int64_t end = begin + kRowsPerSplit < a.batch ? begin + kRowsPerSplit : a.batch;

      float count = 0, mean[kWidth] = {}, square[kWidth] = {};
      if (column < a.features) {
        const int64_t valid = a.features - column;
        float pivot[kWidth];
        load_some(pivot, a.x + g * a.batch * a.features + column, valid);
        if (split == 0 && slice == 0) store_some(a.pivot + g * a.features + column, pivot, valid);
        for (int64_t r = begin + slice; r < end; r += kSlices) {
          float v[kWidth];
          load_some(v, a.x + (g * a.batch + r) * a.features + column, valid);
          count += 1;
          const float share = 1.0f / count;
#pragma unroll
          for (int k = 0; k < kWidth; ++k) {
            const float shifted = v[k] - pivot[k];
            const float delta = shifted - mean[k];
            mean[k] += delta * share;
            square[k] += delta * (shifted - mean[k]);
          }
        }
      }
      // The warp's four slices, the later ones into the earlier ones.
#pragma unroll
      for (int offset = kWarp / 2; offset >= kPacksPerTile; offset /= 2) {
        const float other = __shfl_down_sync(kAllLanes, count, offset);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          Moments sum{count, mean[k], square[k]};
          const float its_mean = __shfl_down_sync(kAllLanes, mean[k], offset);
          const float its_square = __shfl_down_sync(kAllLanes, square[k], offset);
          sum.merge({other, its_mean, its_square});
          mean[k] = sum.mean;
          square[k] = sum.square;
        }
        count += other;
      }
      if (lane < kPacksPerTile) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          shared.mean[warp][pack * kWidth + k] = mean[k];
          shared.square[warp][pack * kWidth + k] = square[k];
        }
        if (lane == 0) shared.count[warp] = count;  // the same for every column inside of x
      }
      __syncthreads();
      if (threadIdx.x < kTileColumns<T> && tile + threadIdx.x < a.features) {
        Moments sum;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          sum.merge({shared.count[w], shared.mean[w][threadIdx.x], shared.square[w][threadIdx.x]});
        }
        const int64_t at = (split * a.groups + g) * a.features + tile + threadIdx.x;
        a.mean[at] = sum.mean;
        a.square[at] = sum.square;
      }
      __syncthreads();
    }
  }
};

struct VarianceLossArguments {
  const float* pivot;         // [G, d]
  const float* split_mean;    // [splits, G, d]
  const float* split_square;  // [splits, G, d]
  int64_t groups;
  int64_t batch;
  int64_t features;
  float gamma;
  float eps;
  float* loss;  // [G]
  float* mean;  // [G, d]
  float* std;   // [G, d], sqrt(Var + eps) with the unbiased variance
};

// One block per group.
struct VarianceLoss {
  using Arguments = VarianceLossArguments;
  using Shared = TeamShared<kBlock>;
  static constexpr int kThreads = kBlock;

  static int64_t blocks(const Arguments& a) { return a.groups; }

  __device__ static void run(const Arguments& a, Shared& shared) {
    const Team<kBlock> team(shared.scratch);
    for (int64_t g = blockIdx.x; g < a.groups; g += gridDim.x) {
      float loss = 0;
      for (int64_t j = threadIdx.x; j < a.features; j += kBlock) {
        Moments sum;
#pragma unroll 1  // unrolled it spills, and there is rarely a second split
        for (int64_t begin = 0, split = 0; begin < a.batch; begin += kRowsPerSplit, ++split) {
          const int64_t at = (split * a.groups + g) * a.features + j;
          const int64_t rows = a.batch - begin < kRowsPerSplit ? a.batch - begin : kRowsPerSplit;
          sum.merge({static_cast<float>(rows), a.split_mean[at], a.split_square[at]});
        }
        const float std = sqrtf(sum.square / static_cast<float>(a.batch - 1) + a.eps);
        a.mean[g * a.features + j] = a.pivot[g * a.features + j] + sum.mean;
        a.std[g * a.features + j] = std;
        const float gap = a.gamma - std;
        loss += gap <= 0 ? 0.0f : gap;  // a NaN stays
      }
      loss = team.sum(loss);
      if (threadIdx.x == 0) a.loss[g] = loss / static_cast<float>(a.features);
    }
  }
};

template <class T>
struct VarianceBackwardArguments {
  const float* dloss;  // [G]
  const T* x;          // [G, B, d]
  const float* mean;   // [G, d]
  const float* std;    // [G, d]
  int64_t groups;
  int64_t batch;
  int64_t features;
  float gamma;
  T* dx;  // [G, B, d]
};

// dx = −dloss (x − mean) / (d (B − 1) std) where std < gamma, else 0.
template <class T>
struct VarianceBackward {
  using Arguments = VarianceBackwardArguments<T>;
  using Shared = Nothing;
  static constexpr int kThreads = kBlock;
  static constexpr int kWidth = kPack<T>;

  static int64_t blocks(const Arguments& a) {
    return ceil_div(a.batch, kRowsPerSplit) * a.groups * ceil_div(a.features, kTileColumns<T>);
  }

  __device__ static void run(const Arguments& a, Shared&) {
    const int pack = threadIdx.x % kPacksPerTile, slice = threadIdx.x / kPacksPerTile;
    const int64_t tiles = ceil_div(a.features, kTileColumns<T>);
    const int64_t items = ceil_div(a.batch, kRowsPerSplit) * a.groups * tiles;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
      const int64_t column = item % tiles * kTileColumns<T> + pack * kWidth;
      const int64_t g = item / tiles % a.groups, begin = item / tiles / a.groups * kRowsPerSplit;
      const int64_t end = begin + kRowsPerSplit < a.batch ? begin + kRowsPerSplit : a.batch;
      if (column >= a.features) continue;
      const int64_t valid = a.features - column;
      float mean[kWidth], slope[kWidth];
      load_some(mean, a.mean + g * a.features + column, valid);
      load_some(slope, a.std + g * a.features + column, valid);
      const float upstream = -a.dloss[g] / (static_cast<float>(a.features) * static_cast<float>(a.batch - 1));
#pragma unroll
      for (int k = 0; k < kWidth; ++k) slope[k] = slope[k] >= a.gamma ? 0.0f : __fdividef(upstream, slope[k]);
      for (int64_t r = begin + slice; r < end; r += kSlices) {
        const int64_t at = (g * a.batch + r) * a.features + column;
        float v[kWidth];
        load_some(v, a.x + at, valid);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) v[k] = (v[k] - mean[k]) * slope[k];
        store_some(a.dx + at, v, valid);
      }
    }
  }
};

}  // namespace anomem::cuda
