// The transformed taps of a 3×3 convolution (conv3x3_tile.h), packed for products.
#pragma once

#include "cpu/conv3x3_tile.h"
#include "cpu/parallel.h"

namespace anomem::cpu::ANOMEM_ISA {

// The transformed taps as right factors [C, K] of the 16 products, in panels of K.
template <class S>
class TapPanels {
 public:
  using T = accumulator_t<S>;
  using E = transformed_t<S>;
  static constexpr int kWidth = Block<T>::kWidth;

  explicit TapPanels(const Conv3x3& a)
      : terms_(factors<S>(a.shape.channels)),
        panels_((a.channels_out + kWidth - 1) / kWidth),
        data_(panels_ * kPlaces * terms_ * kWidth) {
    const S* weight = static_cast<const S*>(a.weight);
    parallel_ranges(panels_, [&](int64_t begin, int64_t end) {
      if (a.transposed) return rows(weight, a.shape.channels, a.channels_out, begin, end);
      columns(weight, a.shape.channels, a.channels_out, begin, end);
    });
  }

  const factor_t<S>* panel(int64_t column, int place) const {
    return data_.data() + (column / kWidth * kPlaces + place) * terms_ * kWidth;
  }

 private:
  // The taps [K, 3, 3, C]: row k becomes column k.
  void columns(const S* weight, int64_t channels, int64_t channels_out, int64_t begin, int64_t end) {
    using Word = std::conditional_t<kInPairs<S>, float, T>;  // a pair moves as 32 bits
    const int64_t stride = terms_ * Factor<S>::kTerms;
    Buffer<E> rows(kPlaces * kWidth * stride);
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kWidth, count = at_most(kWidth, channels_out - first);
      for (int64_t k = 0; k < count; ++k)
        for_vectors<T>(channels, [&](int64_t c, int64_t some) {
          vec<T> g[9], u[kPlaces];
#pragma GCC unroll 9
          for (int tap = 0; tap < 9; ++tap) g[tap] = load_some(weight + ((first + k) * 9 + tap) * channels + c, some);
          transform_taps(g, u);
#pragma GCC unroll 16
          for (int p = 0; p < kPlaces; ++p) store_some(rows.data() + (p * kWidth + k) * stride + c, u[p], some);
        });
      if (stride > channels)
        for (int64_t row = 0; row < kPlaces * kWidth; ++row) rows[row * stride + channels] = E{};
      for (int p = 0; p < kPlaces; ++p)
        transpose(reinterpret_cast<const Word*>(rows.data() + p * kWidth * stride), terms_, count, terms_, kWidth,
                  reinterpret_cast<Word*>(at(panel, p)), kWidth);
    }
  }

  // The taps [C, 3, 3, K] in the opposite order: row c stays row c.
  void rows(const S* weight, int64_t channels, int64_t channels_out, int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t half = 0; half < kWidth; half += kLanes<T>) {
        const int64_t first = panel * kWidth + half, some = at_most(kLanes<T>, channels_out - first);
        for (int64_t c = 0; c < channels; c += Factor<S>::kTerms) {
          vec<T> u[2][kPlaces] = {};
          for (int term = 0; term < Factor<S>::kTerms; ++term) {
            if (some <= 0 || c + term >= channels) continue;
            vec<T> g[9];
#pragma GCC unroll 9
            for (int tap = 0; tap < 9; ++tap)
              g[tap] = load_some(weight + ((c + term) * 9 + 8 - tap) * channels_out + first, some);
            transform_taps(g, u[term]);
          }
          const int64_t offset = c / Factor<S>::kTerms * kWidth + half;
#pragma GCC unroll 16
          for (int p = 0; p < kPlaces; ++p) {
            if constexpr (kInPairs<S>) store(at(panel, p) + offset, u[0][p], u[1][p]);
            else store(at(panel, p) + offset, u[0][p]);
          }
        }
      }
  }

  factor_t<S>* at(int64_t panel, int place) { return data_.data() + (panel * kPlaces + place) * terms_ * kWidth; }

  int64_t terms_, panels_;
  Buffer<factor_t<S>> data_;
};

}  // namespace anomem::cpu::ANOMEM_ISA
