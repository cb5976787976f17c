// native_deviation_map: takes and normalises a chunk of positions, retrieves, keeps only the distance. Features,
// scores, weights and retrieved vectors of a chunk live in scratches that together fit into L2.
#include <torch/csrc/stable/library.h>

#include "memory.h"
#include "rows.cuh"

namespace anomem::cuda {
namespace {

// Positions first … first + count of images image … image + images, as rows [images · count, d].
template <class T>
void take_positions(const DeviceScope& scope, const Tensor& map, int64_t image, int64_t images, int64_t first,
                    int64_t count, int64_t normalize, const Tensor& out) {
  TakeArguments<T> a = take_from<T>(map);
  a.map += image * a.stride_batch;
  a.batch = images;
  a.first = first;
  a.count = count;
  a.out = writable<T>(out);
  a.out_stride_position = a.channels;
  a.out_stride_batch = count * a.channels;
  a.normalize = static_cast<int>(normalize);
  take(scope, a);
}

Tensor deviation_map(const Tensor& map, const Tensor& keys, const OptionalTensor& values, const OptionalTensor& beta,
                     double scale, int64_t normalize, int64_t distance, const OptionalTensor& log_prior) {
  check_map(map);
  check_element_type(map, "map");
  const int64_t batch = map.size(0), features = map.size(1), positions = map.size(2) * map.size(3);
  check_memory(map, features, keys, values, beta, ScalarType::Float, normalize);
  check_deviation_map(map, keys, values, distance, log_prior, ScalarType::Float);
  const DeviceScope scope(map);
  const Memory memory = make_memory(scope, keys, values, beta, scale, normalize);
  const Tensor out = empty(map, {batch, map.size(2), map.size(3)}, ScalarType::Float);
  if (out.numel() == 0) return out;

  const int64_t size = memory.size(), item = static_cast<int64_t>(map.element_size());
  const int64_t chunk = chunk_rows(batch * positions, (size + features) * (4 + item));
  // Whole images where they fit, else parts of one image.
  const int64_t images = std::max(chunk / positions, int64_t{1});
  const int64_t part = std::min(chunk, positions);
  const int64_t longest = images * part;
  const Tensor queries = empty(map, {longest, features});
  const Tensor scores = empty(map, {longest, size}, ScalarType::Float);
  const Tensor weights = empty(map, {longest, size});
  const Tensor lse = empty(map, {longest}, ScalarType::Float);
  const Tensor retrieved = empty(map, {longest, features}, ScalarType::Float);
  for (int64_t image = 0; image < batch; image += images) {
    for (int64_t first = 0; first < positions; first += part) {
      const int64_t together = std::min(images, batch - image), count = std::min(part, positions - first);
      const int64_t n = together * count;
      const Tensor q = rows(queries, 0, n), s = rows(scores, 0, n), w = rows(weights, 0, n), r = rows(retrieved, 0, n);
      with_type_of(map, [&](auto zero) {
        take_positions<decltype(zero)>(scope, map, image, together, first, count, normalize, q);
      });
      product(s, q, transposed(memory.keys));
      softmax(scope, memory, s, {data<float>(log_prior), positions, first}, w, writable<float>(lse));
      product(r, w, memory.values);
      with_type_of(map, [&](auto zero) {
        using T = decltype(zero);
        launch<RowDistance<T>>(scope, {data<T>(q), data<float>(r), n, features, static_cast<int>(distance),
                                       writable<float>(out) + image * positions + first});
      });
    }
  }
  return out;
}

}  // namespace
}  // namespace anomem::cuda

STABLE_TORCH_LIBRARY_IMPL(anomem, ANOMEM_KEY, m) {
  m.impl("native_deviation_map", TORCH_BOX(&anomem::cuda::deviation_map));
}
