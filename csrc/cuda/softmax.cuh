// The row passes of chunked retrieval. A GEMM leaves the scores of a chunk of queries in a scratch that stays in L2.
// They become weights (forward), or weights and the gradient of the scores (backward).
//
// logits = scale · beta · scores + log_prior, with the scores q·k in float32 whatever the inputs' dtype.
#pragma once

#include "primitives.cuh"

namespace anomem::cuda {

// Rows longer than this are shared by a block, shorter ones by a warp.
constexpr int64_t kColumnsPerWarp = 1024;

template <class T>
struct SoftmaxArguments {
  const float* scores;  // [R, M]
  int64_t rows;
  int64_t columns;
  float scale;
  const float* beta;   // one number, or null for 1
  const float* prior;  // [positions, M], or null; row r has position (first + r) mod positions
  int64_t positions;
  int64_t first;
  T* weights;  // [R, M]
  float* lse;  // [R]
};

template <class T, int kSize>
struct Softmax {
  using Arguments = SoftmaxArguments<T>;
  using Shared = TeamShared<kSize>;
  static constexpr int kThreads = kBlock;
  static constexpr int kRows = Team<kSize>::kPerBlock;

  static int64_t blocks(const Arguments& a) { return ceil_div(a.rows, kRows); }

  __device__ static void run(const Arguments& a, Shared& shared) {
    const Team<kSize> team(shared.scratch);
    const float scale = a.beta == nullptr ? a.scale : a.scale * *a.beta;
    for (int64_t r = static_cast<int64_t>(blockIdx.x) * kRows + team.index; r < a.rows;
         r += static_cast<int64_t>(gridDim.x) * kRows) {
      const float* s = a.scores + r * a.columns;
      const float* prior = a.prior == nullptr ? nullptr : a.prior + (a.first + r) % a.positions * a.columns;
      // The maximum starts finite, so that a logit of −inf (a prior of zero) has weight 0 and not NaN.
      float top = -FLT_MAX, sum = 0;
      walk(s, a.columns, team.lane, kSize, [&](auto width, int64_t m) {
        float v[width];
        logits(v, s, prior, m, scale);
        float local = v[0];
#pragma unroll
        for (int k = 1; k < width; ++k) local = fmaxf(local, v[k]);
        if (local > top) {
          sum *= expf(top - local);
          top = local;
        }
#pragma unroll
        for (float value : v) sum += expf(value - top);
      });
      const float most = team.max(top);
      sum = team.sum(sum * expf(top - most));
      if (team.lane == 0) a.lse[r] = most + logf(sum);
      const float share = 1.0f / sum;
      T* w = a.weights + r * a.columns;
      walk(w, a.columns, team.lane, kSize, [&](auto width, int64_t m) {
        float v[width];
        logits(v, s, prior, m, scale);
#pragma unroll
        for (float& value : v) value = expf(value - most) * share;
        store(w + m, v);
      });
    }
  }

 private:
  template <int N>
  __device__ static void logits(float (&v)[N], const float* s, const float* prior, int64_t m, float scale) {
    load(v, s + m);
#pragma unroll
    for (float& value : v) value *= scale;
    if (prior == nullptr) return;
    float p[N];
    load(p, prior + m);
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] += p[k];
  }
};

template <class T>
struct SoftmaxBackwardArguments {
  const float* scores;    // [R, M]
  const float* dweights;  // [R, M], dP = dO Vᵀ
  const float* lse;       // [R]
  const float* dlse;      // [R], or null
  int64_t rows;
  int64_t columns;
  float scale;
  const float* beta;
  T* weights;    // [R, M], P
  T* dscores;    // [R, M], gradient of q·k
  float* dbeta;  // [R], each row's part of the gradient of beta, or null
};

// dlogits = P ∘ (dP − Σ P dP + dlse). Two sums over a row are computed here in float32: Σ P dP, because the output is
// rounded, and Σ exp(logits − lse), which divides the rounding of lse out of P.
template <class T, int kSize>
struct SoftmaxBackward {
  using Arguments = SoftmaxBackwardArguments<T>;
  using Shared = TeamShared<kSize>;
  static constexpr int kThreads = kBlock;
  static constexpr int kRows = Team<kSize>::kPerBlock;

  static int64_t blocks(const Arguments& a) { return ceil_div(a.rows, kRows); }

  __device__ static void run(const Arguments& a, Shared& shared) {
    const Team<kSize> team(shared.scratch);
    const float scale = a.beta == nullptr ? a.scale : a.scale * *a.beta;
    for (int64_t r = static_cast<int64_t>(blockIdx.x) * kRows + team.index; r < a.rows;
         r += static_cast<int64_t>(gridDim.x) * kRows) {
      const float* s = a.scores + r * a.columns;
      const float* dp = a.dweights + r * a.columns;
      const float lse = a.lse[r];
      float delta = 0, sum = 0;
      walk(s, a.columns, team.lane, kSize, [&](auto width, int64_t m) {
        float v[width], dv[width];
        load(v, s + m);
        load(dv, dp + m);
#pragma unroll
        for (int k = 0; k < width; ++k) {
          const float p = expf(v[k] * scale - lse);
          sum += p;
          delta += p * dv[k];
        }
      });
      const float share = 1.0f / team.sum(sum);
      const float offset = (a.dlse == nullptr ? 0.0f : a.dlse[r]) - team.sum(delta) * share;
      float dbeta = 0;
      T* w = a.weights + r * a.columns;
      walk(w, a.columns, team.lane, kSize, [&](auto width, int64_t m) {
        float v[width], dv[width], p[width];
        load(v, s + m);
        load(dv, dp + m);
#pragma unroll
        for (int k = 0; k < width; ++k) {
          p[k] = expf(v[k] * scale - lse) * share;
          dv[k] = p[k] * (dv[k] + offset);
          dbeta += dv[k] * v[k];
          dv[k] *= scale;
        }
        store(w + m, p);
        store(a.dscores + r * a.columns + m, dv);
      });
      if (a.dbeta == nullptr) continue;
      dbeta = team.sum(dbeta);
      if (team.lane == 0) a.dbeta[r] = dbeta * a.scale;
    }
  }
};

}  // namespace anomem::cuda
