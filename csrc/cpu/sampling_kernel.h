// Gather and scatter of sampled positions, and the variance hinge.
//
// The gather reads an NCHW map, and the scatter writes one, a block of planes at a time and in the map's own order, so
// that each cache line of the map travels once. The vectors of one image are kept in a contiguous scratch: in the
// result they lie B · C apart, often a power of two, and would evict each other from the cache.
#pragma once

#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "cpu/sampling.h"

namespace anomem::cpu::ANOMEM_ISA {

constexpr int64_t kPlaneBlock = 16;

// Gathers the vectors at `count` positions of one image, [count, C].
template <class S>
inline void gather_planes(const FeatureMap& map, int64_t image, const int64_t* positions, int64_t count, S* to) {
  const S* data = static_cast<const S*>(map.data);
  for (int64_t c0 = 0; c0 < map.channels; c0 += kPlaneBlock) {
    const int64_t c1 = c0 + kPlaneBlock < map.channels ? c0 + kPlaneBlock : map.channels;
    for (int64_t i = 0; i < count; ++i) {
      const S* from = data + map.offset(image, positions[i]);
      for (int64_t c = c0; c < c1; ++c) to[i * map.channels + c] = from[c * map.channel_stride];
    }
  }
}

// y = x / |x|, rounded to the element type. Returns 1/|x|.
template <class S>
inline accumulator_t<S> unit_row(const S* x, int64_t n, S* y) {
  using T = accumulator_t<S>;
  const T inverse = inverse_length(x, n);
  for_vectors<T>(n, [&](int64_t c, int64_t some) { store_some(y + c, load_some(x + c, some) * inverse, some); });
  return inverse;
}

template <class S>
void compute(const Gather& a) {
  using T = accumulator_t<S>;
  constexpr int64_t block = 64;  // positions per work item
  const int64_t blocks = (a.positions.count + block - 1) / block, batch = a.map.batch, channels = a.map.channels;
  const bool adjacent = a.map.channel_stride == 1;
  parallel(batch * blocks, [&](int64_t item) {
    const int64_t image = item / blocks, first = item % blocks * block;
    const int64_t count = a.positions.count - first < block ? a.positions.count - first : block;
    const int64_t* positions = a.positions.of(image) + first;
    Buffer<S> planes(adjacent ? 0 : count * channels);
    if (!adjacent) gather_planes(a.map, image, positions, count, planes.data());
    for (int64_t i = 0; i < count; ++i) {
      const S* x = adjacent ? static_cast<const S*>(a.map.data) + a.map.offset(image, positions[i])
                            : planes.data() + i * channels;
      const int64_t row = (first + i) * batch + image;
      S* out = static_cast<S*>(a.out) + row * channels;
      if (a.normalize) static_cast<T*>(a.inv_norm)[row] = unit_row(x, channels, out);
      else if (channels > 0) std::memcpy(out, x, channels * sizeof(S));  // undefined for null pointers, even of 0 bytes
    }
  });
}

// Channels begin … end of one vector's gradient: dy, or with normalisation (dy − y (y · dy)) / |x|.
template <class S>
inline void vector_gradient(const Scatter& a, int64_t row, int64_t begin, int64_t end, accumulator_t<S>* gradient) {
  using T = accumulator_t<S>;
  const S* dout = static_cast<const S*>(a.dout) + row * a.channels;
  const S* out = static_cast<const S*>(a.out) + row * a.channels;
  T inverse = 1;
  vec<T> products{};
  if (a.normalize) {
    inverse = static_cast<const T*>(a.inv_norm)[row];
    for_vectors<T>(a.channels, [&](int64_t c, int64_t some) {
      products = multiply_add(load_some(dout + c, some), load_some(out + c, some), products);
    });
  }
  const T projection = sum_lanes<T>(products);
  for_vectors<T>(end - begin, [&](int64_t c, int64_t some) {
    vec<T> g = load_some(dout + begin + c, some);
    if (a.normalize) g = (g - load_some(out + begin + c, some) * projection) * inverse;
    store_some(gradient + c, g, some);
  });
}

// The gradients [n, width] of repeated positions, added in their order to that of the first. The sums stay in T: in
// bfloat16 a sum of ones would stop at 256. `first` [H·W] receives the index of each position's first vector.
template <class T>
inline void add_repeated(const int64_t* positions, int64_t count, int64_t width, T* gradients, Buffer<int64_t>& first,
                         int64_t area) {
  for (int64_t p = 0; p < area; ++p) first[p] = -1;
  for (int64_t i = 0; i < count; ++i) {
    int64_t& at = first[positions[i]];
    if (at < 0) at = i;
    else add_scaled(gradients + i * width, width, T{1}, gradients + at * width);
  }
}

// Channels begin … end of an NCHW map's gradient, from the vectors' gradients [n, end − begin]; `first` as in
// add_repeated.
template <class S>
inline void scatter_planes(const Scatter& a, int64_t image, int64_t begin, int64_t end,
                           const accumulator_t<S>* gradients, const Buffer<int64_t>& first) {
  const int64_t* positions = a.positions.of(image);
  for (int64_t c0 = begin; c0 < end; c0 += kPlaneBlock) {
    const int64_t planes = c0 + kPlaneBlock < end ? kPlaneBlock : end - c0;
    S* to = static_cast<S*>(a.dmap) + (image * a.channels + c0) * a.area;
    std::memset(to, 0, planes * a.area * sizeof(S));
    for (int64_t i = 0; i < a.positions.count; ++i) {
      if (first[positions[i]] != i) continue;
      const auto* gradient = gradients + i * (end - begin) + c0 - begin;
      for (int64_t c = 0; c < planes; ++c) to[c * a.area + positions[i]] = narrow<S>(gradient[c]);
    }
  }
}

// The same for a channels-last map.
template <class S>
inline void scatter_rows(const Scatter& a, int64_t image, int64_t begin, int64_t end, const accumulator_t<S>* gradients,
                         const Buffer<int64_t>& first) {
  using T = accumulator_t<S>;
  const int64_t width = end - begin;
  S* to = static_cast<S*>(a.dmap) + image * a.channels * a.area + begin;
  if (width == a.channels) {
    std::memset(to, 0, a.area * width * sizeof(S));
  } else {
    for (int64_t p = 0; p < a.area; ++p) std::memset(to + p * a.channels, 0, width * sizeof(S));
  }
  for (int64_t i = 0; i < a.positions.count; ++i) {
    const int64_t position = a.positions.of(image)[i];
    if (first[position] == i) scaled_copy(gradients + i * width, width, T{1}, to + position * a.channels);
  }
}

template <class S>
void compute(const Scatter& a) {
  // Few images: their channels are shared out too.
  const int64_t share = a.batch >= 16 ? a.channels : 64, shares = (a.channels + share - 1) / share;
  parallel(a.batch * shares, [&](int64_t item) {
    const int64_t image = item / shares, begin = item % shares * share;
    const int64_t end = begin + share < a.channels ? begin + share : a.channels;
    Buffer<accumulator_t<S>> gradients(a.positions.count * (end - begin));
    for (int64_t i = 0; i < a.positions.count; ++i)
      vector_gradient<S>(a, i * a.batch + image, begin, end, gradients.data() + i * (end - begin));
    Buffer<int64_t> first(a.area);
    add_repeated(a.positions.of(image), a.positions.count, end - begin, gradients.data(), first, a.area);
    if (a.channels_last) scatter_rows<S>(a, image, begin, end, gradients.data(), first);
    else scatter_planes<S>(a, image, begin, end, gradients.data(), first);
  });
}

// The variance hinge takes the statistics of columns of [G, B, d] in two passes; the second reads from the cache. A
// correction for the rounding of the mean keeps them stable at any mean. Work items share no sums.

constexpr int64_t kWidestStrip = 256;

// Columns per work item: with few groups, their columns are shared out.
inline int64_t strip_columns(int64_t groups) { return groups >= 8 ? kWidestStrip : 32; }

// Calls f(j, some, begin, end) for every vector of columns and every run of rows. Sums stay in registers within a run.
// Runs are short: rounding grows with their number, not with the number of rows.
template <class T, class F>
ANOMEM_INLINE void for_runs(int64_t batch, int64_t columns, F f) {
  constexpr int64_t run = 16;
  for (int64_t k = 0; k < batch; k += run)
    for_vectors<T>(columns, [&](int64_t j, int64_t some) { f(j, some, k, k + run < batch ? k + run : batch); });
}

// sums[j] += Σ_k x[k, j] over rows `stride` apart.
template <class S>
inline void add_columns(const S* x, int64_t batch, int64_t stride, int64_t columns, accumulator_t<S>* sums) {
  using T = accumulator_t<S>;
  for_runs<T>(batch, columns, [&](int64_t j, int64_t some, int64_t begin, int64_t end) {
    vec<T> sum{};
    for (int64_t k = begin; k < end; ++k) sum += load_some(x + k * stride + j, some);
    store_some(sums + j, load_some(sums + j, some) + sum, some);
  });
}

// rest[j] += Σ_k (x[k, j] − mean[j]), nonzero by the rounding of the mean, and squares[j] += Σ_k (x[k, j] − mean[j])².
template <class S>
inline void add_centred(const S* x, int64_t batch, int64_t stride, int64_t columns, const accumulator_t<S>* mean,
                        accumulator_t<S>* rest, accumulator_t<S>* squares) {
  using T = accumulator_t<S>;
  for_runs<T>(batch, columns, [&](int64_t j, int64_t some, int64_t begin, int64_t end) {
    const vec<T> centre = load_some(mean + j, some);
    vec<T> sum{}, square{};
    for (int64_t k = begin; k < end; ++k) {
      const vec<T> centred = load_some(x + k * stride + j, some) - centre;
      sum += centred;
      square = multiply_add(centred, centred, square);
    }
    store_some(rest + j, load_some(rest + j, some) + sum, some);
    store_some(squares + j, load_some(squares + j, some) + square, some);
  });
}

template <class S>
void compute(const VarianceForward& a) {
  using T = accumulator_t<S>;
  const int64_t d = a.features, strip = strip_columns(a.groups), strips = (d + strip - 1) / strip;
  parallel(a.groups * strips, [&](int64_t item) {
    const int64_t group = item / strips, first = item % strips * strip;
    const int64_t columns = d - first < strip ? d - first : strip;
    const S* x = static_cast<const S*>(a.x) + group * a.batch * d + first;
    T* mean = static_cast<T*>(a.mean) + group * d + first;
    T* std = static_cast<T*>(a.std) + group * d + first;
    T rest[kWidestStrip] = {};
    std::memset(mean, 0, columns * sizeof(T));
    std::memset(std, 0, columns * sizeof(T));
    add_columns(x, a.batch, d, columns, mean);
    scale_row(mean, columns, T{1} / static_cast<T>(a.batch));
    add_centred(x, a.batch, d, columns, mean, rest, std);
    for (int64_t j = 0; j < columns; ++j) {
      const T shift = rest[j] / static_cast<T>(a.batch), spread = std[j] - rest[j] * shift;
      mean[j] += shift;
      std[j] = std::sqrt((spread < 0 ? T{0} : spread) / static_cast<T>(a.batch - 1) + static_cast<T>(a.eps));
    }
  });
  for (int64_t group = 0; group < a.groups; ++group) {
    double sum = 0;
    for (int64_t j = 0; j < d; ++j) {
      const T missing = static_cast<T>(a.gamma) - static_cast<const T*>(a.std)[group * d + j];
      sum += missing <= 0 ? 0.0 : static_cast<double>(missing);
    }
    static_cast<T*>(a.loss)[group] = static_cast<T>(sum / static_cast<double>(d));
  }
}

template <class S>
void compute(const VarianceBackward& a) {
  using T = accumulator_t<S>;
  const int64_t d = a.features, strip = strip_columns(a.groups), strips = (d + strip - 1) / strip;
  parallel(a.groups * strips, [&](int64_t item) {
    const int64_t group = item / strips, first = item % strips * strip;
    const int64_t columns = d - first < strip ? d - first : strip, start = group * a.batch * d + first;
    const T* mean = static_cast<const T*>(a.mean) + group * d + first;
    const T* std = static_cast<const T*>(a.std) + group * d + first;
    // d loss / d x_kj = slope_j · (x_kj − mean_j).
    T slope[kWidestStrip];
    const T outer = static_cast<const T*>(a.dloss)[group] / (static_cast<T>(d) * static_cast<T>(a.batch - 1));
    for (int64_t j = 0; j < columns; ++j) slope[j] = static_cast<T>(a.gamma) - std[j] <= 0 ? T{0} : -outer / std[j];
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

}  // namespace anomem::cpu::ANOMEM_ISA
