// The backward pass of the gather: gradients of the taken vectors return to their positions, all others become zero.
//
// Every element of the map has one writer. It adds the vectors taken at its position in the order they were taken, so
// repeated positions give the same bits every time. The order is a list per position: `first` is the earliest vector
// taken there (−1: none), `next` the one after it.
#pragma once

#include "primitives.cuh"

namespace anomem::cuda {

struct ListPositionsArguments {
  const int64_t* positions;  // [S, n], S = 1 or B; those outside the map are ignored
  int64_t sets;
  int64_t count;    // n
  int64_t size;     // H·W
  int32_t* first;   // [S, H·W]
  int32_t* latest;  // [S, H·W], scratch
  int32_t* next;    // [S, n]
};

// One block per set, through its positions in order, kBlock at a time.
struct ListPositions {
  using Arguments = ListPositionsArguments;
  static constexpr int kThreads = kBlock;

  struct Shared {
    int64_t chunk[kBlock];
  };

  static int64_t blocks(const Arguments& a) { return a.sets; }

  __device__ static void run(const Arguments& a, Shared& shared) {
    for (int64_t set = blockIdx.x; set < a.sets; set += gridDim.x) {
      int32_t* first = a.first + set * a.size;
      int32_t* latest = a.latest + set * a.size;
      int32_t* next = a.next + set * a.count;
      for (int64_t p = threadIdx.x; p < a.size; p += kBlock) first[p] = latest[p] = -1;
      for (int64_t start = 0; start < a.count; start += kBlock) {
        const int64_t i = start + threadIdx.x;
        const int64_t position = i < a.count ? a.positions[set * a.count + i] : -1;
        shared.chunk[threadIdx.x] = position;
        __syncthreads();
        const bool inside = position >= 0 && position < a.size;
        int64_t previous = -1;
        bool last = true;
        if (inside) {
          for (int j = 0; j < static_cast<int>(threadIdx.x); ++j) {
            if (shared.chunk[j] == position) previous = start + j;
          }
          for (int j = threadIdx.x + 1; j < kBlock; ++j) last = last && shared.chunk[j] != position;
          if (previous < 0) previous = latest[position];
          (previous < 0 ? first[position] : next[previous]) = static_cast<int32_t>(i);
        }
        __syncthreads();
        // Only the last vector of a chunk at its position writes `latest` and ends the list.
        if (inside && last) {
          latest[position] = static_cast<int32_t>(i);
          next[i] = -1;
        }
        __syncthreads();
      }
    }
  }
};

template <class T>
struct RowDotsArguments {
  const T* a;  // [N, d]
  const T* b;  // [N, d]
  int64_t rows;
  int64_t features;
  float* dots;  // [N]
};

// a_n · b_n, one warp per row: y · dy in the backward pass of the L2 normalisation.
template <class T>
struct RowDots : WarpPerRow<RowDots<T>, RowDotsArguments<T>> {
  using Arguments = RowDotsArguments<T>;

  __host__ __device__ static int64_t rows(const Arguments& a) { return a.rows; }

  __device__ static void row(const Arguments& a, int64_t r, int lane) {
    const T* x = a.a + r * a.features;
    const T* y = a.b + r * a.features;
    float dot = 0;
    walk(x, a.features, lane, kWarp, [&](auto width, int64_t c) {
      float u[width], v[width];
      load(u, x + c);
      load(v, y + c);
#pragma unroll
      for (int k = 0; k < width; ++k) dot += u[k] * v[k];
    });
    dot = warp_sum(dot);
    if (lane == 0) a.dots[r] = dot;
  }
};

template <class T>
struct ScatterArguments {
  const T* dout;          // [n, B, C]
  const T* out;           // [n, B, C], the normalised vectors, or null without normalisation
  const float* inv_norm;  // [n, B]
  const float* dots;      // [n, B]
  const int32_t* first;   // [S, H·W]
  const int32_t* next;    // [S, n]
  int64_t first_stride;   // between images, 0 where all share their positions
  int64_t next_stride;
  int64_t batch;
  int64_t channels;
  int64_t size;  // H·W
  T* dmap;       // [B, C, H·W] or [B, H·W, C]

  // Adds the gradient of vector `row` at `channel` and the N − 1 channels after it.
  template <int N>
  __device__ void add(float (&sum)[N], int64_t row, int64_t channel) const {
    float dy[N];
    load(dy, dout + row * channels + channel);
    if (out == nullptr) {
#pragma unroll
      for (int k = 0; k < N; ++k) sum[k] += dy[k];
      return;
    }
    float y[N];
    load(y, out + row * channels + channel);
    const float dot = dots[row], scale = inv_norm[row];
#pragma unroll
    for (int k = 0; k < N; ++k) sum[k] += (dy[k] - y[k] * dot) * scale;
  }
};

// Channels-last: one warp per position.
template <class T>
struct ScatterRows : WarpPerRow<ScatterRows<T>, ScatterArguments<T>> {
  using Arguments = ScatterArguments<T>;

  __host__ __device__ static int64_t rows(const Arguments& a) { return a.batch * a.size; }

  __device__ static void row(const Arguments& a, int64_t r, int lane) {
    const int64_t b = r / a.size;
    const int32_t first = a.first[b * a.first_stride + r % a.size];
    const int32_t* next = a.next + b * a.next_stride;
    T* dx = a.dmap + r * a.channels;
    walk(dx, a.channels, lane, kWarp, [&](auto width, int64_t c) {
      float sum[width] = {};
      for (int32_t i = first; i >= 0; i = next[i]) a.add(sum, i * a.batch + b, c);
      store(dx + c, sum);
    });
  }
};

// NCHW: a block makes a tile of 32 planes by 512 bytes of positions in shared memory, reading along the channels and
// writing along the planes.
template <class T>
struct ScatterPlanes {
  using Arguments = ScatterArguments<T>;
  static constexpr int kThreads = kBlock;
  static constexpr int kChannels = kWarp;
  static constexpr int kPositions = 512 / static_cast<int>(sizeof(T));
  static constexpr int kPad = 4 / static_cast<int>(sizeof(T));  // an odd pitch in words: no bank conflicts

  struct Shared {
    T tile[kChannels][kPositions + kPad];
  };

  static int64_t blocks(const Arguments& a) {
    return a.batch * ceil_div(a.channels, kChannels) * ceil_div(a.size, kPositions);
  }

  __device__ static void run(const Arguments& a, Shared& shared) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t columns = ceil_div(a.size, kPositions);
    const int64_t bands = ceil_div(a.channels, kChannels);
    for (int64_t item = blockIdx.x; item < a.batch * bands * columns; item += gridDim.x) {
      const int64_t p = item % columns * kPositions, c = item / columns % bands * kChannels, b = item / columns / bands;
      const int64_t right = a.size - p, below = a.channels - c;
      const int width = static_cast<int>(right < kPositions ? right : kPositions);
      const int height = static_cast<int>(below < kChannels ? below : kChannels);
      const int32_t* first = a.first + b * a.first_stride + p;
      const int32_t* next = a.next + b * a.next_stride;
      for (int k = warp; k < width; k += kWarps) {
        float sum[1] = {0.0f};
        if (lane < height) {
          for (int32_t i = first[k]; i >= 0; i = next[i]) a.add(sum, i * a.batch + b, c + lane);
        }
        shared.tile[lane][k] = narrowed<T>(sum[0]);
      }
      __syncthreads();
      for (int j = warp; j < height; j += kWarps) {
        T* dx = a.dmap + (b * a.channels + c + j) * a.size + p;
        walk(dx, width, lane, kWarp, [&](auto span, int64_t k) {
          float v[span];
#pragma unroll
          for (int n = 0; n < span; ++n) v[n] = widen(shared.tile[j][k + n]);
          store(dx + k, v);
        });
      }
      __syncthreads();
    }
  }
};

}  // namespace anomem::cuda
