// The gather reads an NCHW map and the scatter writes one a block of planes at a time, in the map's own order, so that
// each cache line of the map travels once. The vectors of an image wait in a contiguous scratch: in the result they lie
// B · C apart, often a power of two, where they would push each other out of the cache.
#pragma once

#include "cpu/buffer.h"
#include "cpu/gather.h"
#include "cpu/rows.h"

namespace anomem::cpu::ANOMEM_ISA {

constexpr int64_t plane_block = 16;

// The vectors at `count` positions of one image, one after the other.
template <class S>
inline void gather_planes(const FeatureMap& map, int64_t image, const int64_t* positions, int64_t count, S* to) {
  const S* data = static_cast<const S*>(map.data);
  for (int64_t c0 = 0; c0 < map.channels; c0 += plane_block) {
    const int64_t c1 = c0 + plane_block < map.channels ? c0 + plane_block : map.channels;
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
  vec<T> squares{};
  for_vectors<T>(n, [&](int64_t c, int64_t some) {
    const vec<T> v = load_some(x + c, some);
    squares = multiply_add(v, v, squares);
  });
  const T inverse = inverse_length(sum_lanes<T>(squares));
  for_vectors<T>(n, [&](int64_t c, int64_t some) { store_some(y + c, load_some(x + c, some) * inverse, some); });
  return inverse;
}

template <class S>
void gather_vectors(const Gather& a) {
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
      else std::memcpy(out, x, channels * sizeof(S));
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
  const T along = sum_lanes<T>(products);
  for_vectors<T>(end - begin, [&](int64_t c, int64_t some) {
    vec<T> g = load_some(dout + begin + c, some);
    if (a.normalize) g = (g - load_some(out + begin + c, some) * along) * inverse;
    store_some(gradient + c, g, some);
  });
}

// Channels begin … end of the map's gradient from the vectors' gradients [n, end − begin], NCHW. Repeated positions add
// up in the order of the positions.
template <class S>
inline void scatter_planes(const Scatter& a, int64_t image, int64_t begin, int64_t end,
                           const accumulator_t<S>* gradients) {
  const int64_t* positions = a.positions.of(image);
  for (int64_t c0 = begin; c0 < end; c0 += plane_block) {
    const int64_t planes = c0 + plane_block < end ? plane_block : end - c0;
    S* to = static_cast<S*>(a.dmap) + (image * a.channels + c0) * a.area;
    std::memset(to, 0, planes * a.area * sizeof(S));
    for (int64_t i = 0; i < a.positions.count; ++i) {
      const auto* gradient = gradients + i * (end - begin) + c0 - begin;
      for (int64_t c = 0; c < planes; ++c) {
        S& sum = to[c * a.area + positions[i]];
        sum = narrow<S>(widen(sum) + gradient[c]);
      }
    }
  }
}

// The same for a channels-last map.
template <class S>
inline void scatter_rows(const Scatter& a, int64_t image, int64_t begin, int64_t end,
                         const accumulator_t<S>* gradients) {
  using T = accumulator_t<S>;
  const int64_t width = end - begin;
  S* to = static_cast<S*>(a.dmap) + image * a.channels * a.area + begin;
  for (int64_t p = 0; p < a.area; ++p) std::memset(to + p * a.channels, 0, width * sizeof(S));
  for (int64_t i = 0; i < a.positions.count; ++i) {
    S* sums = to + a.positions.of(image)[i] * a.channels;
    const T* gradient = gradients + i * width;
    for_vectors<T>(width, [&](int64_t c, int64_t some) {
      store_some(sums + c, load_some(sums + c, some) + load_some(gradient + c, some), some);
    });
  }
}

template <class S>
void scatter_vectors(const Scatter& a) {
  // With few images, their channels are shared out too.
  const int64_t share = a.batch >= 16 ? a.channels : 64, shares = (a.channels + share - 1) / share;
  parallel(a.batch * shares, [&](int64_t item) {
    const int64_t image = item / shares, begin = item % shares * share;
    const int64_t end = begin + share < a.channels ? begin + share : a.channels;
    Buffer<accumulator_t<S>> gradients(a.positions.count * (end - begin));
    for (int64_t i = 0; i < a.positions.count; ++i)
      vector_gradient<S>(a, i * a.batch + image, begin, end, gradients.data() + i * (end - begin));
    if (a.channels_last) scatter_rows<S>(a, image, begin, end, gradients.data());
    else scatter_planes<S>(a, image, begin, end, gradients.data());
  });
}

void gather(const Gather& arguments) { ANOMEM_FOR_TYPE(arguments.type, gather_vectors, arguments) }

void scatter(const Scatter& arguments) { ANOMEM_FOR_TYPE(arguments.type, scatter_vectors, arguments) }

}  // namespace anomem::cpu::ANOMEM_ISA
