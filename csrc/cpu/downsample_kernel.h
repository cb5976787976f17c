// The strided sample of a map and its gradient: one pass over a quarter of the map.
//
// The processor does not foresee that every second row is read: the next one is asked for while the present one is
// copied or added.
#pragma once

#include "cpu/downsample.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace anomem::cpu::ANOMEM_ISA {

// Calls f(offset in the map, offset in the sample), counted in elements, for every row of the sample.
template <class S, class F>
ANOMEM_INLINE void for_sampled_rows(const MapShape& shape, const S* map, const F& f) {
  const int64_t rows = shape.sampled_height(), width = shape.width * shape.channels;
  const int64_t sampled_width = shape.sampled_width() * shape.channels;
  const auto offset = [&](int64_t row) { return (row / rows * shape.height + row % rows * 2) * width; };
  parallel_ranges(shape.batch * rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (row + 1 < end) fetch_row(map + offset(row + 1), width);
      f(offset(row), row * sampled_width);
    }
  });
}

// Every second of the pixels from `from` on. Of the usual sizes the compiler makes a load and a store.
template <int64_t kBytes>
inline void take_pixels(const char* from, int64_t count, int64_t bytes, char* to) {
  const int64_t size = kBytes > 0 ? kBytes : bytes;
  for (int64_t i = 0; i < count; ++i, from += 2 * size, to += size) std::memcpy(to, from, size);
}

template <class S>
void compute(const DownsampleTake& a) {
  const S* x = static_cast<const S*>(a.x);
  S* sampled = static_cast<S*>(a.sampled);
  const int64_t pixels = a.shape.sampled_width(), bytes = a.shape.channels * static_cast<int64_t>(sizeof(S));
  for_sampled_rows(a.shape, x, [&](int64_t of_map, int64_t of_sample) {
    const char* from = reinterpret_cast<const char*>(x + of_map);
    char* to = reinterpret_cast<char*>(sampled + of_sample);
    switch (bytes) {
      case 32: return take_pixels<32>(from, pixels, bytes, to);
      case 64: return take_pixels<64>(from, pixels, bytes, to);
      case 128: return take_pixels<128>(from, pixels, bytes, to);
      default: return take_pixels<0>(from, pixels, bytes, to);
    }
  });
}

template <class S>
void compute(const DownsampleAdd& a) {
  S* map = static_cast<S*>(a.map);
  const S* sampled = static_cast<const S*>(a.sampled);
  const int64_t pixels = a.shape.sampled_width(), channels = a.shape.channels;
  for_sampled_rows(a.shape, map, [&](int64_t of_map, int64_t of_sample) {
    S* to = map + of_map;
    const S* from = sampled + of_sample;
    for (int64_t i = 0; i < pixels; ++i, to += 2 * channels, from += channels)
      for_vectors<accumulator_t<S>>(channels, [=](int64_t j, int64_t count) {
        store_some(to + j, load_some(to + j, count) + load_some(from + j, count), count);
      });
  });
}

}  // namespace anomem::cpu::ANOMEM_ISA
