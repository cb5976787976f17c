// The pixels of a map one after the other, for the direct convolution (conv3x3_direct.h).
#pragma once

#include "cpu/conv3x3.h"
#include "cpu/simd.h"

namespace anomem::cpu::ANOMEM_ISA {

// An order of pixels. `between` positions of zeros follow each row, and as many rows of zeros each image: with one, a
// tap is a shift of the positions.
struct Positions {
  Positions(const MapShape& s, int64_t between) : shape(s), zeros(between) {}

  int64_t pitch() const { return shape.width + zeros; }
  int64_t count() const { return shape.batch * (shape.height + zeros) * pitch(); }

  const MapShape& shape;
  int64_t zeros;
};

// The pixels at successive positions, of a map shifted by a tap.
class PixelCursor {
 public:
  PixelCursor(const Positions& positions, int64_t position, int64_t down = 0, int64_t right = 0)
      : positions_(positions), down_(down), right_(right), before_(position < 0 ? -position : 0) {
    if (position < 0) return;
    const int64_t line = position / positions.pitch(), lines = positions.shape.height + positions.zeros;
    column_ = position % positions.pitch();
    y_ = line % lines;
    row_ = line / lines * positions.shape.height + y_;
  }

  // The next position's pixel of `channels` channels, or null where it has none.
  ANOMEM_INLINE const Bfloat16* next(const Bfloat16* map, int64_t channels) {
    if (before_ > 0) return --before_, nullptr;
    const MapShape& shape = positions_.shape;
    const int64_t x = column_ + right_, y = y_ + down_;
    const bool here = column_ < shape.width && y_ < shape.height && row_ < shape.batch * shape.height;
    const bool inside = x >= 0 && x < shape.width && y >= 0 && y < shape.height;
    const Bfloat16* const at = here && inside ? map + ((row_ + down_) * shape.width + x) * channels : nullptr;
    if (++column_ >= positions_.pitch()) {
      column_ = 0;
      if (y_ < shape.height) ++row_;
      if (++y_ >= shape.height + positions_.zeros) y_ = 0;
    }
    return at;
  }

 private:
  const Positions& positions_;
  int64_t down_, right_, before_, column_ = 0, y_ = 0, row_ = 0;
};

}  // namespace anomem::cpu::ANOMEM_ISA
