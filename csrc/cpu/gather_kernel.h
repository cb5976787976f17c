// The gather reads a map and the scatter writes one in their own order, a block of channels at a time, so that each
// cache line of the map travels once; the vectors, a few lines each, are what is visited out of order.
#pragma once

#include "cpu/gather.h"
#include "cpu/rows.h"

namespace anomem::cpu::ANOMEM_ISA {

constexpr int64_t channel_block = 16;

// Raw copies of the vectors at `count` positions of one image; vector i goes to to + i * to_row.
template <class S>
inline void gather_image(const FeatureMap& map, int64_t image, const int64_t* positions, int64_t count, S* to,
                         int64_t to_row) {
  const S* data = static_cast<const S*>(map.data);
  if (map.channel_stride == 1) {
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(to + i * to_row, data + map.offset(image, positions[i]), map.channels * sizeof(S));
    return;
  }
  const int64_t plane = map.height * map.width * int64_t(sizeof(S));
  // Where nearly every line of a plane is needed, it is asked for in order, one block ahead.
  const bool ahead = map.column_stride == 1 && map.row_stride == map.width && count * 64 >= plane;
  for (int64_t c0 = 0; c0 < map.channels; c0 += channel_block) {
    const int64_t c1 = c0 + channel_block < map.channels ? c0 + channel_block : map.channels;
    if (ahead)
      for (int64_t c = c1; c < c1 + channel_block && c < map.channels; ++c)
        for (int64_t byte = 0; byte < plane; byte += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(data + map.offset(image, 0) + c * map.channel_stride) + byte);
    for (int64_t i = 0; i < count; ++i) {
      const S* from = data + map.offset(image, positions[i]);
      for (int64_t c = c0; c < c1; ++c) to[i * to_row + c] = from[c * map.channel_stride];
    }
  }
}

template <class S>
void gather_vectors(const Gather& a) {
  using T = accumulator_t<S>;
  constexpr int64_t block = 64;  // positions per work item
  const int64_t blocks = (a.positions.count + block - 1) / block, channels = a.map.channels;
  parallel(a.map.batch * blocks, [&](int64_t item) {
    const int64_t image = item / blocks, first = item % blocks * block;
    const int64_t count = a.positions.count - first < block ? a.positions.count - first : block;
    const int64_t row = a.map.batch * channels;
    S* out = static_cast<S*>(a.out) + first * row + image * channels;
    gather_image(a.map, image, a.positions.of(image) + first, count, out, row);
    if (!a.normalize) return;
    for (int64_t i = 0; i < count; ++i) {
      S* x = out + i * row;
      vec<T> squares{};
      for_vectors<T>(channels, [&](int64_t c, int64_t some) {
        const vec<T> v = load_some(x + c, some);
        squares = multiply_add(v, v, squares);
      });
      const T inverse = inverse_length(sum_lanes<T>(squares));
      for_vectors<T>(channels, [&](int64_t c, int64_t some) { store_some(x + c, load_some(x + c, some) * inverse, some); });
      static_cast<T*>(a.inv_norm)[(first + i) * a.map.batch + image] = inverse;
    }
  });
}

// The gradient of one image's map for the channels c0 … c1. `along` [n] holds y · dy, `inverse` [n] 1/|x|.
template <class S>
inline void scatter_image(const Scatter& a, int64_t image, int64_t c0, int64_t c1, const accumulator_t<S>* along,
                          const accumulator_t<S>* inverse) {
  const int64_t channel_stride = a.channels_last ? 1 : a.area, position_stride = a.channels_last ? a.channels : 1;
  S* dmap = static_cast<S*>(a.dmap) + image * a.channels * a.area;
  if (a.channels_last)
    for (int64_t p = 0; p < a.area; ++p) std::memset(dmap + p * a.channels + c0, 0, (c1 - c0) * sizeof(S));
  else
    std::memset(dmap + c0 * a.area, 0, (c1 - c0) * a.area * sizeof(S));
  const int64_t* positions = a.positions.of(image);
  for (int64_t i = 0; i < a.positions.count; ++i) {
    const int64_t row = (i * a.batch + image) * a.channels;
    const S* dout = static_cast<const S*>(a.dout) + row;
    const S* out = static_cast<const S*>(a.out) + row;
    S* to = dmap + positions[i] * position_stride;
    for (int64_t c = c0; c < c1; ++c) {
      S& sum = to[c * channel_stride];
      const auto gradient = a.normalize ? (widen(dout[c]) - widen(out[c]) * along[i]) * inverse[i] : widen(dout[c]);
      sum = narrow<S>(widen(sum) + gradient);
    }
  }
}

template <class S>
void scatter_vectors(const Scatter& a) {
  using T = accumulator_t<S>;
  // With few images, their channels are shared out too.
  const int64_t share = a.batch >= 16 ? a.channels : 64, shares = (a.channels + share - 1) / share;
  parallel(a.batch * shares, [&](int64_t item) {
    const int64_t image = item / shares, begin = item % shares * share;
    const int64_t end = begin + share < a.channels ? begin + share : a.channels;
    const int64_t count = a.normalize ? a.positions.count : 0;
    Buffer<T> along(count), inverse(count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = i * a.batch + image;
      vec<T> sum{};
      for_vectors<T>(a.channels, [&](int64_t c, int64_t some) {
        sum = multiply_add(load_some(static_cast<const S*>(a.dout) + row * a.channels + c, some),
                           load_some(static_cast<const S*>(a.out) + row * a.channels + c, some), sum);
      });
      along[i] = sum_lanes<T>(sum);
      inverse[i] = static_cast<const T*>(a.inv_norm)[row];
    }
    const int64_t block = a.channels_last ? end - begin : channel_block;
    for (int64_t c = begin; c < end; c += block)
      scatter_image<S>(a, image, c, c + block < end ? c + block : end, along.data(), inverse.data());
  });
}

void gather(const Gather& arguments) { ANOMEM_FOR_TYPE(arguments.type, gather_vectors, arguments) }

void scatter(const Scatter& arguments) { ANOMEM_FOR_TYPE(arguments.type, scatter_vectors, arguments) }

}  // namespace anomem::cpu::ANOMEM_ISA
