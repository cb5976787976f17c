// The direct 3×3 convolution of bfloat16 maps, for processors that multiply in tiles (library_product.h): there its
// products take less time than the transforms of conv3x3_tile.h. The weight is packed once and read once for each block
// of pixels; conv3x3_direct_weight.h has its gradient.
#pragma once

#include "cpu/conv3x3.h"
#include "cpu/factors.h"
#include "cpu/library_product.h"
#include "cpu/parallel.h"

#if ANOMEM_BFLOAT16_PAIRS
namespace anomem::cpu::ANOMEM_ISA {

// Channels are padded with zeros to whole steps of the processor's tiles.
constexpr int64_t kTileTerms = 32;

inline int64_t tile_terms(int64_t channels) { return round_up(channels, kTileTerms); }

// One pixel's channels, then zeros.
ANOMEM_INLINE void copy_channels(const Bfloat16* from, int64_t channels, Bfloat16* to) {
  int64_t c = 0;
  for (; c + kTileTerms <= channels; c += kTileTerms) _mm512_storeu_si512(to + c, _mm512_loadu_si512(from + c));
  if (c < channels) _mm512_storeu_si512(to + c, _mm512_maskz_loadu_epi16((1u << (channels - c)) - 1, from + c));
}

// The first `count` ≤ 16 elements, zeros after them, each in the lower half of 32 bits.
ANOMEM_INLINE __m512i load_words(const Bfloat16* from, int64_t count) {
  if (count == 16)
    return _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  const __mmask16 kept = static_cast<__mmask16>((1u << count) - 1);
  return _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(kept, from));
}

// Pairs of two rows' words.
ANOMEM_INLINE __m512i join(__m512i first, __m512i second) {
  return _mm512_or_si512(first, _mm512_maskz_slli_epi32(0xffff, second, 16));
}

// The taps as right factor [9 C, K] in panels of K. Its rows are in the order of a window (MapWindows).
class DirectTaps {
 public:
  explicit DirectTaps(const Conv3x3& a)
      : channels_(tile_terms(a.shape.channels)),
        outputs_(round_up(a.channels_out, Block<float>::kWidth)),
        data_(9 * channels_ / 2 * outputs_) {
    parallel((outputs_ + kLibraryPanel - 1) / kLibraryPanel * 9, [&](int64_t item) {
      const int64_t column = item / 9 * kLibraryPanel, place = item % 9, tap = place % 3 * 3 + place / 3;
      Pair* const to = data_.data() + channels_ / 2 * (9 * column + place * width(column));
      if (a.transposed) rows(a, column, 8 - tap, to);
      else columns(a, column, tap, to);
    });
  }

  int64_t width(int64_t column) const { return panel_width<float>(column, outputs_, kLibraryPanel); }
  const Pair* panel(int64_t column) const { return data_.data() + channels_ / 2 * 9 * column; }

 private:
  // One tap of the weight [K, 3, 3, C]: row k becomes column k.
  void columns(const Conv3x3& a, int64_t column, int64_t tap, Pair* to) const {
    const int64_t count = at_most(kLibraryPanel, a.channels_out - column), channels = a.shape.channels;
    const Bfloat16* const from = static_cast<const Bfloat16*>(a.weight) + (column * 9 + tap) * channels;
    Buffer<Bfloat16> padded(count * channels_);
    for (int64_t k = 0; k < count; ++k) copy_channels(from + k * 9 * channels, channels, padded.data() + k * channels_);
    transpose(reinterpret_cast<const float*>(padded.data()), channels_ / 2, count, channels_ / 2, width(column),
              reinterpret_cast<float*>(to), width(column));  // a pair moves as 32 bits
  }

  // One tap of the weight [C, 3, 3, K]: rows c and c + 1 become pairs.
  void rows(const Conv3x3& a, int64_t column, int64_t tap, Pair* to) const {
    const int64_t stride = 9 * a.channels_out;
    const Bfloat16* from = static_cast<const Bfloat16*>(a.weight) + tap * a.channels_out + column;
    for (int64_t c = 0; c < channels_; c += 2, from += 2 * stride, to += width(column))
      for (int64_t k = 0; k < width(column); k += 16) {
        const int64_t count = at_least(at_most(a.channels_out - column - k, 16), 0);
        _mm512_storeu_si512(to + k, join(load_words(from + k, c < a.shape.channels ? count : 0),
                                         load_words(from + stride + k, c + 1 < a.shape.channels ? count : 0)));
      }
  }

  int64_t channels_, outputs_;
  Buffer<Pair> data_;
};

// The windows of a map: the 3×3 pixels around each, as rows of a left factor. A slot holds three pixels of a column of
// the map, and three neighbouring slots are a window. A row of the map has one slot more than pixels, of zeros, so that
// the windows at its ends are right; the window that begins at its last slot is of no pixel.
class MapWindows {
 public:
  MapWindows(const MapShape& shape, int64_t most)
      : shape_(shape), slot_(3 * tile_terms(shape.channels)), data_((most + 2) * slot_) {}

  static int64_t count(const MapShape& shape) { return shape.batch * shape.height * (shape.width + 1); }

  int64_t stride() const { return slot_; }
  const Bfloat16* data() const { return data_.data(); }

  // The windows [first, first + count).
  void set(const Bfloat16* x, int64_t first, int64_t count) {
    const int64_t channels = shape_.channels, padded = slot_ / 3, line = shape_.width * channels;
    int64_t row = first / (shape_.width + 1), column = first % (shape_.width + 1);
    for (Bfloat16* to = data_.data(); to != data_.data() + (count + 2) * slot_; to += slot_) {
      if (column == 0 || row >= shape_.batch * shape_.height) {
        std::memset(to, 0, slot_ * sizeof(Bfloat16));
      } else {
        const Bfloat16* const pixel = x + row * line + (column - 1) * channels;
        const int64_t y = row % shape_.height;
        if (y > 0) copy_channels(pixel - line, channels, to);
        else std::memset(to, 0, padded * sizeof(Bfloat16));
        copy_channels(pixel, channels, to + padded);
        if (y + 1 < shape_.height) copy_channels(pixel + line, channels, to + 2 * padded);
        else std::memset(to + 2 * padded, 0, padded * sizeof(Bfloat16));
      }
      if (++column > shape_.width) column = 0, ++row;
    }
  }

 private:
  const MapShape& shape_;
  int64_t slot_;
  Buffer<Bfloat16> data_;
};

// Windows of a block: as many as leave them and one panel of sums in the second-level cache, in blocks of the same
// length.
inline int64_t block_windows(const MapShape& shape) {
  constexpr int64_t most = 256;
  const int64_t count = MapWindows::count(shape), blocks = (count + most - 1) / most;
  return round_up((count + blocks - 1) / blocks, 32);
}

// Terms of one product: its factors pass through the first-level cache.
constexpr int64_t kProductTerms = 576;

inline void compute_directly(const Conv3x3& a) {
  const MapShape& shape = a.shape;
  const int64_t length = block_windows(shape), windows = MapWindows::count(shape);
  const int64_t window = 9 * tile_terms(shape.channels);
  const DirectTaps taps(a);
  parallel_ranges((windows + length - 1) / length, [&](int64_t begin, int64_t end) {
    const LibraryProducts library(true, true);
    MapWindows map(shape, length);
    Buffer<float> sums(length * kLibraryPanel);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * length, count = at_most(length, windows - first);
      map.set(static_cast<const Bfloat16*>(a.x), first, length);
      for (int64_t column = 0; column < a.channels_out; column += kLibraryPanel) {
        const int64_t width = taps.width(column), some = at_most(kLibraryPanel, a.channels_out - column);
        for (int64_t term = 0; term < window; term += kProductTerms)
          library_product(length, width, at_most(kProductTerms, window - term), map.data() + term, map.stride(),
                          reinterpret_cast<const Bfloat16*>(taps.panel(column) + term / 2 * width), width, sums.data(),
                          width, term > 0);
        int64_t row = first / (shape.width + 1), x = first % (shape.width + 1);
        for (int64_t i = 0; i < count; ++i) {
          if (x < shape.width) {
            Bfloat16* const to = static_cast<Bfloat16*>(a.y) + (row * shape.width + x) * a.channels_out + column;
            scaled_copy(sums.data() + i * width, some, 1.0f, to);
          }
          if (++x > shape.width) x = 0, ++row;
        }
      }
    }
  });
}

}  // namespace anomem::cpu::ANOMEM_ISA
#endif
