// Products of rows rounded to bytes, four neighbouring terms of a sum in a factor (AVX512-VNNI): twice the
// multiplications of pairs of bfloat16, and exact sums. They find candidates only (candidates.h), so a bound of their
// error is measured with them.
//
// Rows are rounded relative to the prototypes' mean a, which makes them shorter: with y = x − a and n = m − a
//
//   x·m = y·n + a·n + x·a.
//
// a·n belongs to the column, and x·a is the same for all columns of a row.
#pragma once

#include <utility>

#include "cpu/factors.h"
#include "cpu/rows.h"

#if ANOMEM_BFLOAT16_PAIRS
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12's own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
namespace anomem::cpu::ANOMEM_ISA {

// Number of quads in a sum of d terms.
constexpr int64_t quads_of(int64_t d) { return (d + 3) / 4; }

constexpr int64_t kQuadRows = 14, kQuadColumns = Block<float>::kWidth;
constexpr int64_t kMostQuadTerms = 1 << 16;  // 255 · 127 · d fits into 32 bits

// The largest |x|, NaN where one is.
inline float largest_size(const float* x, int64_t d) {
  vec<float> largest{};
  for_vectors<float>(d, [&](int64_t i, int64_t count) {
    const vec<float> v = load_some(x + i, count), size = v < 0 ? -v : v;
    largest = (size > largest) | (size != size) ? size : largest;
  });
  return max_lanes<float>(largest);
}

// to[i] = x[i] / step, rounded, as 8 bits of two's complement, plus `shift` modulo 256; returns |x − step · to|.
inline float round_to_bytes(const float* x, int64_t d, float step, int8_t shift, int8_t* to) {
  const vec<float> inverse = broadcast(step > 0 ? 1 / step : 0.0f), unit = broadcast(step);
  const __m128i moved = _mm_set1_epi8(shift);
  vec<float> squares{};
  for_vectors<float>(d, [&](int64_t i, int64_t count) {
    const vec<float> v = load_some(x + i, count);
    const __m128i rounded = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(__m512(v * inverse)));
    const vec<float> lost = v - vec<float>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(rounded))) * unit;
    squares = multiply_add(lost, lost, squares);
    _mm_mask_storeu_epi8(to + i, static_cast<__mmask16>((1u << count) - 1), _mm_add_epi8(rounded, moved));
  });
  return length_at_most(sum_lanes<float>(squares), d);
}

// The prototypes of a bank.
class QuadPanels {
 public:
  QuadPanels(const float* rows, int64_t count, int64_t d)
      : d_(d), mean_(d), shift_(count), packed_(packed_size<float>(quads_of(d), count)) {
    const int64_t stride = 4 * quads_of(d);
    Buffer<float> centred(count * d);
    Buffer<int8_t> bytes(count * stride);
    std::memset(mean_.data(), 0, d * sizeof(float));
    for (int64_t j = 0; j < count; ++j) add_scaled(rows + j * d, d, 1 / static_cast<float>(count), mean_.data());
    float peak = 0;
    for (int64_t j = 0; j < count; ++j) {
      float* row = centred.data() + j * d;
      difference(rows + j * d, row);
      peak = larger_or_nan(peak, largest_size(row, d));
    }
    step_ = peak / 127;
    for (int64_t j = 0; j < count; ++j) {
      const float* row = centred.data() + j * d;
      int8_t* const to = bytes.data() + j * stride;
      std::memset(to, 0, stride);
      const float lost = round_to_bytes(row, d, step_, -128, to), length = length_at_most(dot_product(row, row, d), d);
      most_lost_ = larger_or_nan(most_lost_, lost);
      longest_ = larger_or_nan(longest_, length);
      shift_[j] = dot_product(mean_.data(), row, d);
    }
    mean_length_ = length_at_most(dot_product(mean_.data(), mean_.data(), d), d);
    pack_transposed(reinterpret_cast<const float*>(bytes.data()), quads_of(d), count, quads_of(d),
                    reinterpret_cast<float*>(packed_.data()));
  }

  int64_t features() const { return d_; }
  const float* mean() const { return mean_.data(); }
  const float* shift() const { return shift_.data(); }  // a·n of each column
  float step() const { return step_; }

  // to ← x − a.
  void difference(const float* x, float* to) const {
    for_vectors<float>(d_, [&](int64_t i, int64_t count) {
      store_some(to + i, load_some(x + i, count) - load_some(mean_.data() + i, count), count);
    });
  }

  // Bound of |y·n − rounded product| for a y of this length that lost so much, and of the rounding of x·m in float32;
  // `slack` in units of the lengths of x and m.
  float bound(float length, float lost, float slack) const {
    return lost * longest_ + (length + lost) * most_lost_ + slack * (length + mean_length_) * (longest_ + mean_length_);
  }

  // Of the panels from a column on, a multiple of a panel's width.
  const uint32_t* from(int64_t column) const { return packed_.data() + column * quads_of(d_); }

 private:
  int64_t d_;
  Buffer<float> mean_;
  Buffer<float> shift_;
  Buffer<uint32_t> packed_;  // [columns / width][quads][width], bytes that are 128 too large: one factor is unsigned
  float step_ = 0, longest_ = 0, most_lost_ = 0, mean_length_ = 0;
};

// The products of kQuadRows rows with one panel, as float32. `start` [kQuadRows] undoes the panel's 128.
__attribute__((noinline)) inline void quad_block(int64_t quads, const int32_t* rows, const int32_t* start,
                                                 const uint32_t* panel, float* to, int64_t to_stride) {
  __m512i sums[kQuadRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kQuadRows; ++i) sums[i][0] = sums[i][1] = _mm512_set1_epi32(start[i]);
  for (int64_t p = 0; p < quads; ++p, panel += kQuadColumns) {
    const __m512i left = _mm512_loadu_si512(panel), right = _mm512_loadu_si512(panel + kLanes<float>);
#pragma GCC unroll 16
    for (int i = 0; i < kQuadRows; ++i) {
      const __m512i factor = _mm512_set1_epi32(rows[i * quads + p]);
      // Not the intrinsics: gcc 12 copies and spills their sums.
      asm("vpdpbusd %2, %1, %0" : "+v"(sums[i][0]) : "v"(left), "v"(factor));
      asm("vpdpbusd %2, %1, %0" : "+v"(sums[i][1]) : "v"(right), "v"(factor));
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kQuadRows; ++i) {
    _mm512_storeu_ps(to + i * to_stride, _mm512_cvtepi32_ps(sums[i][0]));
    _mm512_storeu_ps(to + i * to_stride + kLanes<float>, _mm512_cvtepi32_ps(sums[i][1]));
  }
}

// Rows on their way into products.
class QuadRows {
 public:
  QuadRows(int64_t rows, int64_t d)
      : quads_(quads_of(d)), row_(d), data_(round_up(rows, kQuadRows) * quads_), start_(round_up(rows, kQuadRows)) {
    std::memset(data_.data(), 0, round_up(rows, kQuadRows) * quads_ * sizeof(int32_t));
    std::memset(start_.data(), 0, round_up(rows, kQuadRows) * sizeof(int32_t));
  }

  // Row r = x. Returns the unit of its products, and the bound of their error.
  std::pair<float, float> set(int64_t r, const float* x, const QuadPanels& panels, float slack) {
    const int64_t d = panels.features();
    panels.difference(x, row_.data());
    const float step = largest_size(row_.data(), d) / 127;
    auto* to = reinterpret_cast<int8_t*>(data_.data() + r * quads_);
    const float lost = round_to_bytes(row_.data(), d, step, 0, to);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t p = 0; p < quads_; p += kLanes<float>) {
      const int64_t left = quads_ - p;
      const auto some = static_cast<__mmask16>(left < kLanes<float> ? (1u << left) - 1 : ~0u);
      const __m512i bytes = _mm512_maskz_loadu_epi32(some, data_.data() + r * quads_ + p);
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(-128), bytes);
    }
    start_[r] = -_mm512_reduce_add_epi32(sum);
    const float length = length_at_most(dot_product(row_.data(), row_.data(), d), d);
    return {step * panels.step(), panels.bound(length, lost, slack)};
  }

  // The rounded products of the first m rows with n columns from `first` on, a multiple of kQuadColumns. They are in
  // units of both steps. Rows up to a multiple of kQuadRows are written too.
  void multiply(int64_t m, const QuadPanels& panels, int64_t first, int64_t n, float* to, int64_t to_stride) const {
    for (int64_t column = 0; column < n; column += kQuadColumns)
      for (int64_t i = 0; i < m; i += kQuadRows)
        quad_block(quads_, data_.data() + i * quads_, start_.data() + i, panels.from(first + column),
                   to + i * to_stride + column, to_stride);
  }

 private:
  int64_t quads_;
  Buffer<float> row_;
  Buffer<int32_t> data_, start_;
};

}  // namespace anomem::cpu::ANOMEM_ISA
#pragma GCC diagnostic pop
#endif
