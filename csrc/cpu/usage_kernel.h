// Counts, weights, entropies and mean direction of a retrieval, without its result.
#pragma once

#include "cpu/panels.h"
#include "cpu/softmax.h"
#include "cpu/usage.h"

namespace anomem::cpu::ANOMEM_ISA {

// Index of the largest weight, the first of equals; 0 in a row of NaN. The largest exponential is 1.
template <class T>
inline int64_t strongest(const T* e, int64_t m) {
  for (int64_t j = 0; j < m; ++j)
    if (e[j] >= 1) return j;
  return 0;
}

// sum ← sum + scale · x.
template <class T>
inline void add_scaled(const T* x, int64_t n, T scale, T* sum) {
  for_vectors<T>(n, [&](int64_t i, int64_t count) {
    store_some(sum + i, multiply_add(load_some(x + i, count), broadcast(scale), load_some(sum + i, count)), count);
  });
}

// Chunks are summed in the working precision, and shared out to a fixed number of slots, which are summed in float64.
template <class S>
void usage_rows(const Usage& a) {
  using T = accumulator_t<S>;
  const int64_t m = a.memory.prototypes, d = a.memory.features, n = a.queries;
  const Panels<S> panels(a.memory, false);
  const int64_t rows = chunk_rows(n, m), chunks = (n + rows - 1) / rows;
  const int64_t score_row = padded_row<T>(m), read_row = padded_row<T>(d);
  const int64_t slots = chunks < 64 ? chunks : 64;
  Buffer<int64_t> counts(slots * m);
  Buffer<double> masses(slots * m), directions(slots * d);
  parallel(slots, [&](int64_t slot) {
    QueryRows<S> query(rows, d, a.memory.normalize);
    Buffer<T> scores(rows * score_row), read(rows * read_row), scale(rows), mass(m), direction(d);
    int64_t* count_sum = counts.data() + slot * m;
    double* mass_sum = masses.data() + slot * m;
    double* direction_sum = directions.data() + slot * d;
    std::memset(count_sum, 0, m * sizeof(int64_t));
    std::memset(mass_sum, 0, m * sizeof(double));
    std::memset(direction_sum, 0, d * sizeof(double));
    for (int64_t chunk = slot * chunks / slots; chunk < (slot + 1) * chunks / slots; ++chunk) {
      const int64_t first = chunk * rows, count = n - first < rows ? n - first : rows;
      query.load(static_cast<const S*>(a.query) + first * a.query_row, a.query_row, count);
      product(count, m, d, query.data(), query.row(), 1, panels.keys_transposed(), scores.data(), score_row, false);
      std::memset(mass.data(), 0, m * sizeof(T));
      std::memset(direction.data(), 0, d * sizeof(T));
      for (int64_t r = 0; r < count; ++r) {
        T* e = scores.data() + r * score_row;
        const RowSum<T> row = exponentials<true>(e, m, T(a.memory.beta));
        scale[r] = 1 / row.sum;
        static_cast<T*>(a.entropy)[first + r] = std::log(row.sum) - row.weighted / row.sum;
        count_sum[strongest(e, m)] += 1;
        add_scaled(e, m, scale[r], mass.data());
      }
      product(count, d, m, scores.data(), score_row, 1, panels.values(), read.data(), read_row, false);
      for (int64_t r = 0; r < count; ++r) {
        const T* row = read.data() + r * read_row;
        const T inverse = inverse_length(dot(row, row, d) * scale[r] * scale[r]);
        add_scaled(row, d, scale[r] * inverse, direction.data());
      }
      for (int64_t j = 0; j < m; ++j) mass_sum[j] += mass[j];
      for (int64_t j = 0; j < d; ++j) direction_sum[j] += direction[j];
    }
  });
  for (int64_t j = 0; j < m; ++j) {
    double mass = 0;
    a.count[j] = 0;
    for (int64_t slot = 0; slot < slots; ++slot) {
      a.count[j] += counts[slot * m + j];
      mass += masses[slot * m + j];
    }
    static_cast<T*>(a.mass)[j] = T(mass / double(n));
  }
  for (int64_t j = 0; j < d; ++j) {
    double direction = 0;
    for (int64_t slot = 0; slot < slots; ++slot) direction += directions[slot * d + j];
    static_cast<T*>(a.direction)[j] = T(direction / double(n));
  }
}

void usage(const Usage& arguments) { ANOMEM_FOR_TYPE(arguments.memory.type, usage_rows, arguments) }

}  // namespace anomem::cpu::ANOMEM_ISA
