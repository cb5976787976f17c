#include "cpu/tile_product.h"

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cpu/isa.h"
#include "cpu/library_product.h"

#if ANOMEM_X86_VARIANTS && defined(__linux__) && __GNUC__ >= 11
#define ANOMEM_TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define ANOMEM_TILES 0
#endif

namespace anomem::cpu {
namespace {

struct Free {
  void operator()(Bfloat16* p) const { std::free(p); }
};

class Parts {
 public:
  Bfloat16* take(int64_t size) {
    if (size > size_) {
      size_ = 0;
      data_.reset(static_cast<Bfloat16*>(std::aligned_alloc(64, round_up(size * 2, 64))));
      if (!data_) throw std::bad_alloc();
      size_ = size;
    }
    return data_.get();
  }

 private:
  std::unique_ptr<Bfloat16, Free> data_;
  int64_t size_ = 0;
};

}  // namespace

Bfloat16* left_parts(int64_t size) {
  static thread_local Parts parts;
  return parts.take(size);
}

Bfloat16* right_parts(int64_t size) {
  static thread_local Parts parts;
  return parts.take(size);
}

#if ANOMEM_TILES
namespace {

// Blocks of 32 lines: for each 32 terms three parts, each as two tiles of 16 lines.
constexpr int64_t kTile = 512, kPart = 2 * kTile, kStep = 3 * kPart;

// Linux lends the tiles to a process that asks.
bool may_use_tiles() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl")

#define ANOMEM_TILE_INLINE inline __attribute__((always_inline))

struct Halves {
  __m512i part[3];  // in the upper half of each lane
};

// Half of a unit away from zero and cut: a tie is no matter, since the next part takes what is left.
ANOMEM_TILE_INLINE Halves split(__m512 x, __m512i& largest) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512i sign = _mm512_set1_epi32(0x7fffffff);
  largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(x), sign));
  Halves to;
  to.part[0] = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(x), half), upper);
  const __m512 rest = _mm512_sub_ps(x, _mm512_castsi512_ps(to.part[0]));
  to.part[1] = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(rest), half), upper);
  // Cut for the sake of numbers below the range of normal ones.
  to.part[2] = _mm512_and_si512(_mm512_castps_si512(_mm512_sub_ps(rest, _mm512_castsi512_ps(to.part[1]))), upper);
  return to;
}

bool in_range(__m512i largest) {
  constexpr uint32_t most = (127u + 30) << 23, least = (127u - 45) << 23;
  alignas(64) uint32_t lanes[16];
  _mm512_store_si512(lanes, largest);
  uint32_t bits = 0;
  for (const uint32_t lane : lanes) bits = lane > bits ? lane : bits;
  return bits == 0 || (bits >= least && bits <= most);
}

__mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : count > 0 ? (1u << count) - 1 : 0; }

}  // namespace

bool split_left(const float* a, int64_t stride, int64_t m, int64_t k, Bfloat16* to) {
  const int64_t steps = round_up(k, 32) / 32;
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                      33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i order = _mm512_load_si512(kUpper);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t first = 0; first < round_up(m, 32); first += 16)
    for (int64_t p = 0; p < 32 * steps; p += 32) {
      Bfloat16* row = to + (first / 32 * steps + p / 32) * kStep + first % 32 / 16 * kTile;
      for (int64_t i = first; i < first + 16; ++i, row += 32) {
        const int64_t left = i < m ? k - p : 0;
        const float* from = a + i * stride + p;
        const Halves one = split(_mm512_maskz_loadu_ps(first_lanes(left), from), largest);
        const Halves rest = split(_mm512_maskz_loadu_ps(first_lanes(left - 16), from + 16), largest);
#pragma GCC unroll 3
        for (int part = 0; part < 3; ++part)
          _mm512_store_si512(row + part * kPart, _mm512_permutex2var_epi16(one.part[part], order, rest.part[part]));
      }
    }
  return in_range(largest);
}

bool split_right(const float* b, int64_t stride, int64_t k, int64_t n, Bfloat16* to) {
  const int64_t steps = round_up(k, 32) / 32;
  __m512i largest = _mm512_setzero_si512();
  for (int64_t j = 0; j < round_up(n, 32); j += 16) {
    const __mmask16 columns = first_lanes(n - j);
    for (int64_t p = 0; p < 32 * steps; p += 2) {
      const float* from = b + p * stride + j;
      const Halves first = split(_mm512_maskz_loadu_ps(p < k ? columns : 0, from), largest);
      const Halves next = split(_mm512_maskz_loadu_ps(p + 1 < k ? columns : 0, from + stride), largest);
      Bfloat16* row = to + (j / 32 * steps + p / 32) * kStep + j % 32 / 16 * kTile + p % 32 * 16;
#pragma GCC unroll 3
      for (int part = 0; part < 3; ++part)
        _mm512_store_si512(row + part * kPart,
                           _mm512_or_si512(_mm512_srli_epi32(first.part[part], 16), next.part[part]));
    }
  }
  return in_range(largest);
}

namespace {

// Tiles 0 to 3 are the sums of 32 × 32, 4 and 5 of the left, 6 and 7 of the right factor.
ANOMEM_TILE_INLINE void load_left(const Bfloat16* part) {
  _tile_loadd(4, part, 64);
  _tile_loadd(5, part + kTile, 64);
}

ANOMEM_TILE_INLINE void load_right(const Bfloat16* part) {
  _tile_loadd(6, part, 64);
  _tile_loadd(7, part + kTile, 64);
}

ANOMEM_TILE_INLINE void multiply_tiles() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// The sums of 32 × 32 over `steps` times 32 terms, small products first.
ANOMEM_TILE_INLINE void sum_block(int64_t steps, const Bfloat16* left, const Bfloat16* right) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s, left += kStep, right += kStep) {
    load_left(left + 2 * kPart);
    load_right(right);
    multiply_tiles();
    load_left(left + kPart);
    multiply_tiles();
    load_right(right + kPart);
    multiply_tiles();
    load_left(left);
    multiply_tiles();
    load_right(right + 2 * kPart);
    multiply_tiles();
    load_right(right);
    multiply_tiles();
  }
}

// The sums, to C or added to it.
ANOMEM_TILE_INLINE void store_block(int64_t rows, int64_t columns, float* c, int64_t c_stride, bool accumulate) {
  const int64_t bytes = 4 * c_stride;
  if (!accumulate && rows >= 32 && columns >= 32) {
    _tile_stored(0, c, bytes);
    _tile_stored(1, c + 16, bytes);
    _tile_stored(2, c + 16 * c_stride, bytes);
    _tile_stored(3, c + 16 * c_stride + 16, bytes);
    return;
  }
  alignas(64) float sums[32 * 32];
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  _tile_stored(2, sums + 16 * 32, 128);
  _tile_stored(3, sums + 16 * 32 + 16, 128);
  for (int64_t i = 0; i < at_most(rows, 32); ++i)
    for (int64_t j = 0; j < at_most(columns, 32); j += 16) {
      const __mmask16 lanes = first_lanes(columns - j);
      __m512 x = _mm512_load_ps(sums + i * 32 + j);
      float* to = c + i * c_stride + j;
      if (accumulate) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(lanes, to));
      _mm512_mask_storeu_ps(to, lanes, x);
    }
}

}  // namespace

void multiply_parts(int64_t m, int64_t n, int64_t k, const Bfloat16* left, const Bfloat16* right, int64_t right_terms,
                    float* c, int64_t c_stride, bool accumulate) {
  constexpr int64_t chain = 4;  // steps, 128 terms: a block of the left factor stays in the first-level cache
  const int64_t steps = round_up(k, 32) / 32, right_steps = round_up(right_terms, 32) / 32;
  for (int64_t i = 0; i < m; i += 32)
    for (int64_t s = 0; s < steps; s += chain)
      for (int64_t j = 0; j < n; j += 32) {
        sum_block(at_most(chain, steps - s), left + (i / 32 * steps + s) * kStep,
                  right + (j / 32 * right_steps + s) * kStep);
        store_block(m - i, n - j, c + i * c_stride + j, c_stride, accumulate || s > 0);
      }
}

struct alignas(64) TileLayout {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// A constant: GCC 12 takes the instruction to read eight bytes and drops what is written to the others.
constexpr TileLayout kLayout;

void take_tiles() { _tile_loadconfig(&kLayout); }

void release_tiles() { _tile_release(); }

#pragma GCC pop_options

namespace {

// A product of small whole numbers and quarters of units in the last place of bfloat16, whose sums are exact.
bool is_right() {
  constexpr int64_t m = 33, n = 35, k = 45;
  std::vector<float> a(m * k), b(k * n), c(m * n, 1.0f);
  for (int64_t i = 0; i < m * k; ++i) a[i] = static_cast<float>(i * 5 % 7 - 3) * (1 + 0x1p-10f);
  for (int64_t i = 0; i < k * n; ++i) b[i] = static_cast<float>(i * 3 % 5 - 2);
  Bfloat16 *const left = left_parts(parts_size(m, k)), *const right = right_parts(parts_size(n, k));
  if (!split_left(a.data(), k, m, k, left) || !split_right(b.data(), n, k, n, right)) return false;
  take_tiles();
  multiply_parts(m, n, k, left, right, k, c.data(), n, true);
  release_tiles();
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      float sum = 1.0f;
      for (int64_t p = 0; p < k; ++p) sum += a[i * k + p] * b[p * n + j];
      if (c[i * n + j] != sum) return false;
    }
  return true;
}

}  // namespace

bool splits_products() {
  static const bool right = isa() == Isa::kAvx512Bf16 && takes_library_products(Type::kFloat32, 1024, 1024, 1024) &&
                            may_use_tiles() && is_right();
  return right;
}
#else
bool splits_products() { return false; }
bool split_left(const float*, int64_t, int64_t, int64_t, Bfloat16*) { return false; }
bool split_right(const float*, int64_t, int64_t, int64_t, Bfloat16*) { return false; }
void multiply_parts(int64_t, int64_t, int64_t, const Bfloat16*, const Bfloat16*, int64_t, float*, int64_t, bool) {}
void take_tiles() {}
void release_tiles() {}
#endif

}  // namespace anomem::cpu
