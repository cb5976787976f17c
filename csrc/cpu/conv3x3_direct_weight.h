// The gradient of the weight of the direct 3×3 convolution (conv3x3_direct.h): for each tap a product of the upstream
// gradient and the shifted map, summed over pixels.
#pragma once

#include "cpu/conv3x3_direct.h"
#include "cpu/conv3x3_positions.h"

#if ANOMEM_BFLOAT16_PAIRS
namespace anomem::cpu::ANOMEM_ISA {

// In large maps a tap is a shift of positions. In small ones the zeros would be half of the work, and in wide ones the
// rows around a chain would: there each tap's pixels are gathered.
inline int64_t zeros_between(const MapShape& shape) {
  if (shape.width > 192) return 0;
  return 10 * (shape.height + 1) * (shape.width + 1) <= 13 * shape.height * shape.width ? 1 : 0;
}

// Positions that are summed in one chain: as many as leave both factors in the second-level cache.
struct PositionChain {
  explicit PositionChain(const Positions& positions) {
    constexpr int64_t most = 1024, product = 512;
    const int64_t all = positions.count();
    const int64_t chains = at_least((all + most - 1) / most, 1), each = at_least((all + chains - 1) / chains, 1);
    products = (each + product - 1) / product;
    terms = round_up((each + products - 1) / products, kTileTerms);
    length = products * terms;
  }

  int64_t products, terms, length;  // products of a chain, and positions of each and of all
};

// The upstream gradient of a chain as left factors [K, positions of a product].
class GradientColumns {
 public:
  GradientColumns(const Positions& positions, const PositionChain& chain, int64_t outputs)
      : positions_(positions),
        chain_(chain),
        outputs_(outputs),
        stride_(chain.terms + kTileTerms),
        padded_(round_up(outputs, 32)),
        data_(chain.products * padded_ * stride_) {}

  const Bfloat16* row(int64_t product, int64_t k) const { return data_.data() + (product * padded_ + k) * stride_; }
  int64_t stride() const { return stride_; }

  // 32 positions, from the `at`-th of the chain on; `first` is the chain's first.
  void set(const Conv3x3Weight& a, int64_t first, int64_t at) {
    const Bfloat16* pixels[32];
    PixelCursor cursor(positions_, first + at);
    for (const Bfloat16*& pixel : pixels) pixel = cursor.next(static_cast<const Bfloat16*>(a.grad), outputs_);
    Bfloat16* const to = data_.data() + at / chain_.terms * padded_ * stride_ + at % chain_.terms;
    for (int64_t k = 0; k < outputs_; k += 16) {
      const int64_t count = at_most(outputs_ - k, 16);
      vec<float> square[16];
      const auto words = [&](const Bfloat16* pixel)
                             ANOMEM_ALWAYS { return pixel ? load_words(pixel + k, count) : _mm512_setzero_si512(); };
      for (int i = 0; i < 16; ++i)
        square[i] = reinterpret_cast<vec<float>>(join(words(pixels[2 * i]), words(pixels[2 * i + 1])));
      transpose_square<float>(square);
      for (int i = 0; i < 16; ++i) store(reinterpret_cast<float*>(to + (k + i) * stride_), square[i]);
    }
  }

 private:
  const Positions& positions_;
  const PositionChain& chain_;
  int64_t outputs_, stride_, padded_;
  Buffer<Bfloat16> data_;
};

// Some channels of the map at a chain's positions as right factors: pairs of positions (0, 1), (2, 3), … and, for taps
// that shift by an odd number, (1, 2), (3, 4), … Small maps are shifted before they become pairs.
class PairedPositions {
 public:
  PairedPositions(const Positions& positions, const PositionChain& chain)
      : positions_(positions),
        margin_(positions.zeros * round_up(positions.pitch() + 1, 2)),
        pairs_(chain.length / 2 + margin_),
        data_((1 + positions.zeros) * pairs_ * kLibraryPanel) {}

  // The right factor of a tap from the `at`-th position of the chain on.
  const Bfloat16* tap(int64_t tap, int64_t at) const {
    const int64_t shift = (tap / 3 - 1) * positions_.pitch() + tap % 3 - 1;
    const int64_t position = at + (positions_.zeros == 1 ? margin_ + shift : 0);
    return reinterpret_cast<const Bfloat16*>(data_.data() + (position % 2 * pairs_ + position / 2) * width_);
  }

  // `width` channels from c on, shifted by a tap; `first` is the chain's first position.
  void set_tap(const Bfloat16* x, int64_t first, int64_t tap, int64_t c, int64_t width) {
    width_ = width;
    const int64_t channels = positions_.shape.channels, count = at_most(channels - c, width);
    PixelCursor cursor(positions_, first, tap / 3 - 1, tap % 3 - 1);
    Pair* to = data_.data();
    for (int64_t p = 0; p < pairs_; ++p, to += width_) {
      const Bfloat16* const pixel = cursor.next(x, channels);
      const Bfloat16* const second = cursor.next(x, channels);
      for (int64_t i = 0; i < width_; i += 16)
        _mm512_storeu_si512(to + i, join(words(pixel, c, i, count), words(second, c, i, count)));
    }
  }

  // The same for all taps.
  void set_all(const Bfloat16* x, int64_t first, int64_t c, int64_t width) {
    width_ = width;
    const int64_t channels = positions_.shape.channels, count = at_most(channels - c, width);
    PixelCursor cursor(positions_, first - margin_);
    Pair *even = data_.data(), *odd = data_.data() + pairs_ * width_;
    const Bfloat16* pixel = cursor.next(x, channels);
    for (int64_t p = 0; p < pairs_; ++p, even += width_, odd += width_) {
      const Bfloat16* const second = cursor.next(x, channels);
      const Bfloat16* const third = cursor.next(x, channels);
      for (int64_t i = 0; i < width_; i += 16) {
        const __m512i middle = words(second, c, i, count);
        _mm512_storeu_si512(even + i, join(words(pixel, c, i, count), middle));
        _mm512_storeu_si512(odd + i, join(middle, words(third, c, i, count)));
      }
      pixel = third;
    }
  }

 private:
  // 16 of a pixel's channels from c + i on; zeros from the `count`-th after c on, and without a pixel.
  static ANOMEM_INLINE __m512i words(const Bfloat16* pixel, int64_t c, int64_t i, int64_t count) {
    if (pixel == nullptr || i >= count) return _mm512_setzero_si512();
    return load_words(pixel + c + i, at_most(count - i, 16));
  }

  const Positions& positions_;
  int64_t margin_, pairs_, width_ = 0;
  Buffer<Pair> data_;
};

// Adds a tap's sums [rows, width] of one chain, and rounds them after the last.
inline void add_chain(const Conv3x3Weight& a, const float* sums, int64_t k, int64_t rows, int64_t tap, int64_t c,
                      int64_t width, float* total, bool begins, bool ends) {
  const int64_t channels = a.shape.channels, padded = tile_terms(channels);
  for (int64_t i = 0; i < at_most(rows, a.channels_out - k); ++i, sums += width) {
    float* const so_far = total + ((k + i) * 9 + tap) * padded + c;
    Bfloat16* const to = static_cast<Bfloat16*>(a.dweight) + ((k + i) * 9 + tap) * channels + c;
    for_vectors<float>(at_most(width, channels - c), [&](int64_t j, int64_t count) {
      const vec<float> sum = begins ? load(sums + j) : load(so_far + j) + load(sums + j);
      if (ends) store_some(to + j, sum, count);
      else store(so_far + j, sum);
    });
  }
}

inline void compute_directly(const Conv3x3Weight& a) {
  constexpr int64_t slice = 256;
  const Positions positions(a.shape, zeros_between(a.shape));
  const Bfloat16* const x = static_cast<const Bfloat16*>(a.x);
  const int64_t channels = tile_terms(a.shape.channels), outputs = round_up(a.channels_out, 32);
  const int64_t panels = (channels + kLibraryPanel - 1) / kLibraryPanel, all = positions.count();
  const PositionChain chain(positions);
  GradientColumns grad(positions, chain, a.channels_out);
  Buffer<float> total(all > chain.length ? outputs * 9 * channels : 0);
  if (all == 0) std::memset(a.dweight, 0, a.channels_out * 9 * a.shape.channels * sizeof(Bfloat16));
  for (int64_t first = 0; first < all; first += chain.length) {
    const bool begins = first == 0, ends = first + chain.length >= all;
    parallel(chain.length / 32, [&](int64_t item) { grad.set(a, first, 32 * item); });
    parallel_ranges(panels * 9, [&](int64_t begin, int64_t end) {
      const LibraryProducts library(true, true);
      PairedPositions map(positions, chain);
      Buffer<float> sums(at_most(slice, outputs) * kLibraryPanel);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t tap = item % 9, c = item / 9 * kLibraryPanel, width = at_most(kLibraryPanel, channels - c);
        if (positions.zeros == 0) map.set_tap(x, first, tap, c, width);
        else if (item == begin || tap == 0) map.set_all(x, first, c, width);
        for (int64_t k = 0; k < outputs; k += slice) {
          const int64_t rows = at_most(slice, outputs - k);
          for (int64_t p = 0; p < chain.products; ++p)
            library_product(rows, width, chain.terms, grad.row(p, k), grad.stride(), map.tap(tap, p * chain.terms),
                            width, sums.data(), width, p > 0);
          add_chain(a, sums.data(), k, rows, tap, c, width, total.data(), begins, ends);
        }
      }
    });
  }
}

}  // namespace anomem::cpu::ANOMEM_ISA
#endif
