// Rows on their way into products: set one by one, rounded to what products multiply, then packed as either factor.
#pragma once

#include "cpu/buffer.h"
#include "cpu/gemm.h"
#include "cpu/rows.h"

namespace anomem::cpu::ANOMEM_ISA {

#if ANOMEM_BFLOAT16_PAIRS
// Packs B = source [k, n] in pairs of rows; panels lie `panel` pairs apart (0: one after the other), and rows of zeros are
// added up to `padded`.
inline void pack_pairs(const Bfloat16* source, int64_t stride, int64_t k, int64_t n, Pair* packed, int64_t panel,
                       int64_t padded) {
  constexpr int width = Block<float>::width;
  const int64_t last = factors<Bfloat16>(padded > k ? padded : k);
  for (int64_t first = 0; first < n; first += width, packed += panel > 0 ? panel : last * width)
    for (int64_t half = 0; half < width; half += lanes<float>) {
      const int64_t left = n - first - half, count = left < lanes<float> ? left : lanes<float>;
      for (int64_t p = 0; p < last; ++p) {
        const Bfloat16* from = source + 2 * p * stride + first + half;
        const bool row = count > 0 && 2 * p < k, next = count > 0 && 2 * p + 1 < k;
        store(packed + p * width + half, row ? load_some(from, count) : vec<float>{},
              next ? load_some(from + stride, count) : vec<float>{});
      }
    }
}
#endif

template <class S>
class FactorRows {
 public:
  using T = accumulator_t<S>;
  using F = factor_t<S>;
  using Element = std::conditional_t<in_pairs<S>, S, T>;

  FactorRows(int64_t rows, int64_t length)
      : length_(length), row_(factors<S>(length) * Factor<S>::terms), data_(rows * row_) {}

  // Row r = scale · x.
  template <class From>
  void set(int64_t r, const From* x, T scale) {
    Element* row = data_.data() + r * row_;
    scaled_copy(x, length_, scale, row);
    if (row_ > length_) row[length_] = Element{};
  }

  // As the left factor, rows `row()` apart.
  const F* data() const { return reinterpret_cast<const F*>(data_.data()); }
  int64_t row() const { return row_ / Factor<S>::terms; }

  // The first `count` rows become the columns of B, [columns / width][factors in a row][width]; with `padded`, columns
  // of zeros follow up to there.
  void pack_columns(int64_t count, F* packed, int64_t padded = 0) const {
    if constexpr (in_pairs<S>)  // a pair moves as the 32 bits that it is
      pack_transposed(reinterpret_cast<const float*>(data_.data()), row_ / 2, count, row_ / 2,
                      reinterpret_cast<float*>(packed), padded);
    else
      pack_transposed(data_.data(), row_, count, row_, packed, padded);
  }

  // The first `count` rows are the rows of B, [columns / width][factors in `count` terms][width]; `panel` and `padded` as
  // in `pack`.
  void pack_rows(int64_t count, F* packed, int64_t panel = 0, int64_t padded = 0) const {
    if constexpr (in_pairs<S>) pack_pairs(data_.data(), row_, count, length_, packed, panel, padded);
    else pack(data_.data(), row_, count, length_, packed, panel, padded);
  }

 private:
  int64_t length_, row_;
  Buffer<Element> data_;
};

}  // namespace anomem::cpu::ANOMEM_ISA
