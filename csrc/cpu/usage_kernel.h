// Usage of a memory: counts, mean weights, entropies and mean direction of a retrieval whose result is not kept.
#pragma once

#include "cpu/panels.h"
#include "cpu/parallel.h"
#include "cpu/product.h"
#include "cpu/softmax.h"
#include "cpu/usage.h"

namespace anomem::cpu::ANOMEM_ISA {

// Index of the largest weight, the first of equals; 0 in a row of NaN.
template <class T>
inline int64_t strongest(const T* e, int64_t m) {
  int64_t best = 0;
  for (int64_t j = 1; j < m; ++j) best = e[j] > e[best] ? j : best;
  return best;
}

// Sums over the queries of one work item.
struct UsageSums {
  int64_t* count;     // [M]
  double* mass;       // [M]
  double* direction;  // [d]
};

// Adds one chunk of queries at a time: in T within a chunk, in float64 across chunks.
template <class S>
class UsageChunk {
 public:
  using T = accumulator_t<S>;

  UsageChunk(const Usage& a, const ReadPanels<S>& panels, int64_t rows)
      : a_(a),
        panels_(panels),
        rows_(rows),
        m_(a.memory.prototypes),
        d_(a.memory.features),
        score_stride_(padded_stride<T>(m_)),
        retrieved_stride_(padded_stride<T>(d_)),
        query_(rows, d_, a.memory.normalize),
        scores_(rows * score_stride_),
        retrieved_(rows * retrieved_stride_),
        scale_(rows),
        mass_(m_),
        direction_(d_) {}

  void add(int64_t first, int64_t count, const UsageSums& sums) {
    query_.load(static_cast<const S*>(a_.query.data) + first * a_.query.stride, a_.query.stride, count);
    const bool library = a_.memory.library;
    const int64_t height = library ? rows_ : count;
    product(height, m_, d_, query_.data(), query_.stride(), 1, panels_.keys_transposed(), scores_.data(), score_stride_,
            false, library);
    std::memset(mass_.data(), 0, m_ * sizeof(T));
    for (int64_t r = 0; r < count; ++r) {
      T* e = scores_.data() + r * score_stride_;
      const RowSum<T> row = exponentials<true>(e, m_, static_cast<T>(a_.memory.beta));
      scale_[r] = 1 / row.sum;
      static_cast<T*>(a_.entropy)[first + r] = std::log(row.sum) - row.weighted / row.sum;
      sums.count[strongest(e, m_)] += 1;
      add_scaled(e, m_, scale_[r], mass_.data());
    }
    product(height, d_, m_, scores_.data(), score_stride_, 1, panels_.values(), retrieved_.data(), retrieved_stride_,
            false, library);
    std::memset(direction_.data(), 0, d_ * sizeof(T));
    for (int64_t r = 0; r < count; ++r) {
      T* retrieved = retrieved_.data() + r * retrieved_stride_;
      scale_row(retrieved, d_, scale_[r]);
      add_scaled(retrieved, d_, inverse_length(retrieved, d_), direction_.data());
    }
    for (int64_t j = 0; j < m_; ++j) sums.mass[j] += mass_[j];
    for (int64_t j = 0; j < d_; ++j) sums.direction[j] += direction_[j];
  }

 private:
  const Usage& a_;
  const ReadPanels<S>& panels_;
  int64_t rows_, m_, d_, score_stride_, retrieved_stride_;
  QueryRows<S> query_;
  Buffer<T> scores_, retrieved_, scale_, mass_, direction_;
};

// means[j] ← Σ_slot sums[slot, j] / n.
template <class T>
inline void mean_over_slots(Buffer<double>& sums, int64_t slots, int64_t width, int64_t n, T* means) {
  for (int64_t j = 0; j < width; ++j) {
    double sum = 0;
    for (int64_t slot = 0; slot < slots; ++slot) sum += sums[slot * width + j];
    means[j] = static_cast<T>(sum / static_cast<double>(n));
  }
}

// Chunks are shared out to slots, whose number depends on sizes alone. The slots are added in order.
template <class S>
void compute(const Usage& a) {
  using T = accumulator_t<S>;
  const int64_t m = a.memory.prototypes, d = a.memory.features, n = a.query.count;
  const ReadPanels<S> panels(a.memory, a.memory.library);
  const int64_t rows = chunk_rows(n, m, a.memory.library), chunks = (n + rows - 1) / rows,
                slots = chunks < 64 ? chunks : 64;
  Buffer<int64_t> counts(slots * m);
  Buffer<double> masses(slots * m), directions(slots * d);
  parallel(slots, [&](int64_t slot) {
    const UsageSums sums{counts.data() + slot * m, masses.data() + slot * m, directions.data() + slot * d};
    std::memset(sums.count, 0, m * sizeof(int64_t));
    std::memset(sums.mass, 0, m * sizeof(double));
    std::memset(sums.direction, 0, d * sizeof(double));
    const LibraryProducts library(a.memory.library, false);
    UsageChunk<S> work(a, panels, rows);
    for (int64_t chunk = slot * chunks / slots; chunk < (slot + 1) * chunks / slots; ++chunk) {
      const int64_t first = chunk * rows;
      work.add(first, n - first < rows ? n - first : rows, sums);
    }
  });
  std::memset(a.count, 0, m * sizeof(int64_t));
  for (int64_t slot = 0; slot < slots; ++slot)
    for (int64_t j = 0; j < m; ++j) a.count[j] += counts[slot * m + j];
  mean_over_slots(masses, slots, m, n, static_cast<T*>(a.mass));
  mean_over_slots(directions, slots, d, n, static_cast<T*>(a.direction));
}

}  // namespace anomem::cpu::ANOMEM_ISA
