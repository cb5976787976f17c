// The direct 3×3 convolution of bfloat16 maps, for processors that multiply in tiles (library_product.h): there its
// products take less time than the transforms of conv3x3_tile.h. The weight is packed once and read once for each block
// of pixels; conv3x3_direct_weight.h has its gradient.
#pragma once

#include "cpu/conv3x3.h"
#include "cpu/conv3x3_positions.h"
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

  // The products of `rows` rows of the left factor with the panel at `column`, over `terms` terms from `first` on;
  // added to the sums [rows, width] except for the first of all terms.
  void multiply(int64_t rows, const Bfloat16* left, int64_t stride, int64_t first, int64_t terms, int64_t column,
                float* sums) const {
    constexpr int64_t step = 576;  // that a row of tiles stays in the first-level cache
    const Pair* const panel = data_.data() + channels_ / 2 * 9 * column + first / 2 * width(column);
    for (int64_t term = 0; term < terms; term += step)
      library_product(rows, width(column), at_most(step, terms - term), left + term, stride,
                      reinterpret_cast<const Bfloat16*>(panel + term / 2 * width(column)), width(column), sums,
                      width(column), first + term > 0);
  }

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

// `count` rows of sums become pixels of the result, in the columns of one panel.
inline void round_pixels(const Conv3x3& a, const float* sums, int64_t width, int64_t pixel, int64_t count,
                         int64_t column) {
  Bfloat16* to = static_cast<Bfloat16*>(a.y) + pixel * a.channels_out + column;
  for (int64_t i = 0; i < count; ++i, sums += width, to += a.channels_out)
    scaled_copy(sums, at_most(kLibraryPanel, a.channels_out - column), 1.0f, to);
}

// For narrow maps of many channels, where the windows of no pixel would be many: the pixels of one tap at a time, and
// the sums of all channels of a block in the second-level cache.
inline void compute_by_taps(const Conv3x3& a, const DirectTaps& taps) {
  constexpr int64_t bytes = int64_t{800} << 10;
  const Positions positions(a.shape, 0);
  const int64_t channels = tile_terms(a.shape.channels), outputs = round_up(a.channels_out, Block<float>::kWidth);
  const int64_t fit = at_least(bytes / (4 * outputs + 2 * channels), 64), pixels = positions.count();
  const int64_t blocks = (pixels + fit - 1) / fit, length = round_up((pixels + blocks - 1) / blocks, 32);
  const int64_t stride = channels + kTileTerms;
  parallel_ranges((pixels + length - 1) / length, [&](int64_t begin, int64_t end) {
    const LibraryProducts library(true, true);
    Buffer<Bfloat16> map(length * stride);
    Buffer<float> sums(length * outputs);
    for (int64_t first = begin * length; first < at_most(end * length, pixels); first += length) {
      for (int64_t place = 0; place < 9; ++place) {
        PixelCursor cursor(positions, first, place % 3 - 1, place / 3 - 1);
        for (Bfloat16* to = map.data(); to != map.data() + length * stride; to += stride) {
          const Bfloat16* const pixel = cursor.next(static_cast<const Bfloat16*>(a.x), a.shape.channels);
          if (pixel != nullptr) copy_channels(pixel, a.shape.channels, to);
          else std::memset(to, 0, channels * sizeof(Bfloat16));
        }
        for (int64_t column = 0; column < a.channels_out; column += kLibraryPanel)
          taps.multiply(length, map.data(), stride, place * channels, channels, column, sums.data() + length * column);
      }
      for (int64_t column = 0; column < a.channels_out; column += kLibraryPanel)
        round_pixels(a, sums.data() + length * column, taps.width(column), first, at_most(length, pixels - first),
                     column);
    }
  });
}

inline void compute_directly(const Conv3x3& a) {
  const MapShape& shape = a.shape;
  const DirectTaps taps(a);
  if (shape.width < 8 && shape.channels > 256) return compute_by_taps(a, taps);
  const int64_t length = block_windows(shape), windows = MapWindows::count(shape), pitch = shape.width + 1;
  // One panel after the other where it stays in the second-level cache, though each makes the windows again.
  const int64_t columns = shape.channels <= 256 ? kLibraryPanel : a.channels_out;
  parallel_ranges((windows + length - 1) / length, [&](int64_t begin, int64_t end) {
    const LibraryProducts library(true, true);
    MapWindows map(shape, length);
    Buffer<float> sums(length * kLibraryPanel);
    const int64_t blocks = end - begin, passes = (a.channels_out + columns - 1) / columns;
    for (int64_t item = 0; item < passes * blocks; ++item) {
      const int64_t first = (begin + item % blocks) * length, last = at_most(first + length, windows);
      const int64_t pass = item / blocks * columns;
      map.set(static_cast<const Bfloat16*>(a.x), first, length);
      for (int64_t column = pass; column < at_most(pass + columns, a.channels_out); column += kLibraryPanel) {
        const int64_t width = taps.width(column);
        taps.multiply(length, map.data(), map.stride(), 0, 3 * map.stride(), column, sums.data());
        for (int64_t at = first; at < last;) {  // row by row
          const int64_t row = at / pitch, x = at % pitch, next = at_most((row + 1) * pitch, last);
          round_pixels(a, sums.data() + (at - first) * width, width, row * shape.width + x,
                       at_most(next - at, shape.width - x), column);
          at = next;
        }
      }
    }
  });
}

}  // namespace anomem::cpu::ANOMEM_ISA
#endif
