// Distances between features and retrieved vectors, in chunks of positions. Neither the transposed features nor the
// retrieved vectors are ever whole in memory.
#pragma once

#include "cpu/deviation_map.h"
#include "cpu/panels.h"
#include "cpu/parallel.h"
#include "cpu/product.h"
#include "cpu/softmax.h"

namespace anomem::cpu::ANOMEM_ISA {

// The distance of q and scale · retrieved: 1 − cos, or the length of the difference.
template <class T>
inline T row_distance(const T* q, const T* retrieved, int64_t d, T scale, Distance distance) {
  if (distance == Distance::kEuclidean) {
    vec<T> squares{};
    for_vectors<T>(d, [&](int64_t i, int64_t count) {
      const vec<T> difference = load_some(q + i, count) - load_some(retrieved + i, count) * scale;
      squares = multiply_add(difference, difference, squares);
    });
    return std::sqrt(sum_lanes<T>(squares));
  }
  constexpr T eps = T{1e-12};
  const T left = std::sqrt(dot_product(q, q, d)), right = std::sqrt(dot_product(retrieved, retrieved, d)) * scale;
  return 1 - dot_product(q, retrieved, d) * scale / ((left < eps ? eps : left) * (right < eps ? eps : right));
}

// Normalised vectors of the positions first … first + count of the flattened [B, H·W], widened, one per row.
template <class S>
inline void read_vectors(const FeatureMap& map, Normalize how, int64_t first, int64_t count, int64_t* offsets,
                         accumulator_t<S>* rows) {
  const S* data = static_cast<const S*>(map.data);
  const int64_t area = map.area(), d = map.channels;
  for (int64_t r = 0; r < count; ++r) offsets[r] = map.offset((first + r) / area, (first + r) % area);
  if (map.channel_stride == 1) {
    for (int64_t r = 0; r < count; ++r) normalize_row(data + offsets[r], d, how, rows + r * d);
    return;
  }
  for (int64_t c = 0; c < d; ++c)
    for (int64_t r = 0; r < count; ++r) rows[r * d + c] = widen(data[offsets[r] + c * map.channel_stride]);
  for (int64_t r = 0; r < count; ++r) normalize_row(rows + r * d, d, how, rows + r * d);
}

template <class S>
void compute(const DeviationMap& a) {
  using T = accumulator_t<S>;
  const int64_t m = a.memory.prototypes, d = a.memory.features;
  const int64_t area = a.map.area(), n = a.map.batch * area;
  const ReadPanels<S> panels(a.memory, a.memory.library);
  const int64_t rows = chunk_rows(n, m, a.memory.library), score_stride = padded_stride<T>(m),
                retrieved_stride = padded_stride<T>(d);
  const T* prior = static_cast<const T*>(a.log_prior.data);
  parallel((n + rows - 1) / rows, [&](int64_t chunk) {
    const int64_t first = chunk * rows, count = n - first < rows ? n - first : rows;
    const int64_t height = a.memory.library ? rows : count;
    const LibraryProducts library(a.memory.library, false);
    Buffer<int64_t> offsets(rows);
    Buffer<T> query(rows * d), scores(rows * score_stride), retrieved(rows * retrieved_stride), scale(rows);
    read_vectors<S>(a.map, a.memory.normalize, first, count, offsets.data(), query.data());
    std::memset(query.data() + count * d, 0, (rows - count) * d * sizeof(T));
    product(height, m, d, query.data(), d, 1, panels.keys_transposed(), scores.data(), score_stride, false,
            a.memory.library);
    for (int64_t r = 0; r < count; ++r) {
      const T* row_prior = a.log_prior.given ? prior + (first + r) % area * m : nullptr;
      scale[r] = 1 / exponentials(scores.data() + r * score_stride, m, static_cast<T>(a.memory.beta), row_prior).sum;
    }
    product(height, d, m, scores.data(), score_stride, 1, panels.values(), retrieved.data(), retrieved_stride, false,
            a.memory.library);
    for (int64_t r = 0; r < count; ++r)
      static_cast<T*>(a.out)[first + r] =
          row_distance(query.data() + r * d, retrieved.data() + r * retrieved_stride, d, scale[r], a.distance);
  });
}

}  // namespace anomem::cpu::ANOMEM_ISA
