// Column statistics of [G, B, d] in two passes, the second over what the first left in the cache, corrected by what the
// rounding of the mean left: stable whatever the mean. No sum is shared between work items.
#pragma once

#include "cpu/rows.h"
#include "cpu/variance.h"

namespace anomem::cpu::ANOMEM_ISA {

constexpr int64_t widest_strip = 256;

// Columns per work item: with few groups, their columns are shared out.
inline int64_t strip_columns(int64_t groups) { return groups >= 8 ? widest_strip : 32; }

// f(j, some, k0, k1) for every vector of columns and every run of rows. Within a run sums stay in registers; runs are
// short, so that rounding grows with the number of runs rather than of rows.
template <class T, class F>
ANOMEM_INLINE void for_runs(int64_t batch, int64_t columns, F f) {
  constexpr int64_t run = 16;
  for (int64_t k = 0; k < batch; k += run)
    for_vectors<T>(columns, [&](int64_t j, int64_t some) { f(j, some, k, k + run < batch ? k + run : batch); });
}

// sums[j] += Σ_k x[k, j] over rows `row` apart.
template <class S>
inline void add_columns(const S* x, int64_t batch, int64_t row, int64_t columns, accumulator_t<S>* sums) {
  using T = accumulator_t<S>;
  for_runs<T>(batch, columns, [&](int64_t j, int64_t some, int64_t begin, int64_t end) {
    vec<T> sum{};
    for (int64_t k = begin; k < end; ++k) sum += load_some(x + k * row + j, some);
    store_some(sums + j, load_some(sums + j, some) + sum, some);
  });
}

// rest[j] += Σ_k (x[k, j] − mean[j]), what the rounding of the mean left, and squares[j] += Σ_k (x[k, j] − mean[j])².
template <class S>
inline void add_centred(const S* x, int64_t batch, int64_t row, int64_t columns, const accumulator_t<S>* mean,
                        accumulator_t<S>* rest, accumulator_t<S>* squares) {
  using T = accumulator_t<S>;
  for_runs<T>(batch, columns, [&](int64_t j, int64_t some, int64_t begin, int64_t end) {
    const vec<T> centre = load_some(mean + j, some);
    vec<T> sum{}, square{};
    for (int64_t k = begin; k < end; ++k) {
      const vec<T> centred = load_some(x + k * row + j, some) - centre;
      sum += centred;
      square = multiply_add(centred, centred, square);
    }
    store_some(rest + j, load_some(rest + j, some) + sum, some);
    store_some(squares + j, load_some(squares + j, some) + square, some);
  });
}

template <class S>
void variance_columns_forward(const VarianceForward& a) {
  using T = accumulator_t<S>;
  const int64_t d = a.features, strip = strip_columns(a.groups), strips = (d + strip - 1) / strip;
  parallel(a.groups * strips, [&](int64_t item) {
    const int64_t group = item / strips, first = item % strips * strip;
    const int64_t columns = d - first < strip ? d - first : strip;
    const S* x = static_cast<const S*>(a.x) + group * a.batch * d + first;
    T* mean = static_cast<T*>(a.mean) + group * d + first;
    T* std = static_cast<T*>(a.std) + group * d + first;
    T rest[widest_strip] = {};
    std::memset(mean, 0, columns * sizeof(T));
    std::memset(std, 0, columns * sizeof(T));
    add_columns(x, a.batch, d, columns, mean);
    scale_row(mean, columns, T(1) / T(a.batch));
    add_centred(x, a.batch, d, columns, mean, rest, std);
    for (int64_t j = 0; j < columns; ++j) {
      const T shift = rest[j] / T(a.batch), spread = std[j] - rest[j] * shift;
      mean[j] += shift;
      std[j] = std::sqrt((spread < 0 ? T(0) : spread) / T(a.batch - 1) + T(a.eps));
    }
  });
  for (int64_t group = 0; group < a.groups; ++group) {
    double sum = 0;
    for (int64_t j = 0; j < d; ++j) {
      const T missing = T(a.gamma) - static_cast<const T*>(a.std)[group * d + j];
      sum += missing <= 0 ? 0.0 : double(missing);
    }
    static_cast<T*>(a.loss)[group] = T(sum / double(d));
  }
}

template <class S>
void variance_columns_backward(const VarianceBackward& a) {
  using T = accumulator_t<S>;
  const int64_t d = a.features, strip = strip_columns(a.groups), strips = (d + strip - 1) / strip;
  parallel(a.groups * strips, [&](int64_t item) {
    const int64_t group = item / strips, first = item % strips * strip;
    const int64_t columns = d - first < strip ? d - first : strip, start = group * a.batch * d + first;
    const T* mean = static_cast<const T*>(a.mean) + group * d + first;
    const T* std = static_cast<const T*>(a.std) + group * d + first;
    // d loss / d x_kj = slope_j · (x_kj − mean_j).
    T slope[widest_strip];
    const T outer = static_cast<const T*>(a.dloss)[group] / (T(d) * T(a.batch - 1));
    for (int64_t j = 0; j < columns; ++j) slope[j] = T(a.gamma) - std[j] <= 0 ? T(0) : -outer / std[j];
    for (int64_t k = 0; k < a.batch; ++k) {
      const S* x = static_cast<const S*>(a.x) + start + k * d;
      S* dx = static_cast<S*>(a.dx) + start + k * d;
      for_vectors<T>(columns, [&](int64_t j, int64_t some) {
        const vec<T> centred = load_some(x + j, some) - load_some(mean + j, some);
        store_some(dx + j, centred * load_some(slope + j, some), some);
      });
    }
  });
}

void variance_forward(const VarianceForward& arguments) {
  ANOMEM_FOR_TYPE(arguments.type, variance_columns_forward, arguments)
}

void variance_backward(const VarianceBackward& arguments) {
  ANOMEM_FOR_TYPE(arguments.type, variance_columns_backward, arguments)
}

}  // namespace anomem::cpu::ANOMEM_ISA
