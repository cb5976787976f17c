#include "cpu/tile_product.h"

#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
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

// Memory of the calling thread, which keeps it, for parts of a factor that were not given.
Bfloat16* still_parts(int64_t size) {
  static thread_local Parts parts;
  return parts.take(size);
}

// The same for two blocks of lines whose parts are made while the tiles multiply.
Bfloat16* moving_parts(int64_t size) {
  static thread_local Parts parts;
  return parts.take(size);
}

}  // namespace

#if ANOMEM_TILES
namespace {

// Terms that are split at a time. A factor's parts then stay in the second-level cache.
constexpr int64_t kSplitTerms = 512;

// Blocks of 32 lines: for each 32 terms three parts, each as two tiles of 16 lines.
constexpr int64_t kTile = 512, kPart = 2 * kTile, kStep = 3 * kPart;

// Linux lends the tiles to a process that asks.
bool may_use_tiles() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // in GCC 12's own headers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
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

ANOMEM_TILE_INLINE bool in_range(__m512i largest) {
  constexpr uint32_t most = (127u + 30) << 23, least = (127u - 45) << 23;
  const uint32_t bits = _mm512_reduce_max_epu32(largest);
  return bits == 0 || (bits >= least && bits <= most);
}

ANOMEM_TILE_INLINE __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xffff : count > 0 ? (1u << count) - 1 : 0;
}

// 32 neighbouring terms of a row of A, of which `left` are read, to its line of a block's parts.
ANOMEM_TILE_INLINE void split_terms(const float* from, int64_t left, Bfloat16* line, __m512i& largest) {
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                      33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i order = _mm512_load_si512(kUpper);
  const Halves one = split(_mm512_maskz_loadu_ps(first_lanes(left), from), largest);
  const Halves rest = split(_mm512_maskz_loadu_ps(first_lanes(left - 16), from + 16), largest);
#pragma GCC unroll 3
  for (int part = 0; part < 3; ++part)
    _mm512_store_si512(line + part * kPart, _mm512_permutex2var_epi16(one.part[part], order, rest.part[part]));
}

// Two neighbouring rows of B in 32 columns, of which `columns` are read, and `next` whether the second row is.
ANOMEM_TILE_INLINE void split_rows(const float* from, int64_t stride, int64_t columns, bool row, bool next,
                                   Bfloat16* pairs, __m512i& largest) {
#pragma GCC unroll 2
  for (int64_t half = 0; half < 2; ++half) {
    const __mmask16 lanes = first_lanes(columns - 16 * half);
    const Halves first = split(_mm512_maskz_loadu_ps(row ? lanes : 0, from + 16 * half), largest);
    const Halves second = split(_mm512_maskz_loadu_ps(next ? lanes : 0, from + stride + 16 * half), largest);
#pragma GCC unroll 3
    for (int part = 0; part < 3; ++part)
      _mm512_store_si512(pairs + half * kTile + part * kPart,
                         _mm512_or_si512(_mm512_srli_epi32(first.part[part], 16), second.part[part]));
  }
}

// 32 rows of A or columns of B and `terms` terms, whose parts are made unit by unit.
struct LeftLines {
  const float* from;
  int64_t stride, lines, terms;

  int64_t units() const { return round_up(terms, 32); }
  ANOMEM_TILE_INLINE void split_unit(int64_t unit, Bfloat16* to, __m512i& largest) const {
    const int64_t step = unit / 32, row = unit % 32;
    split_terms(from + row * stride + step * 32, row < lines ? terms - step * 32 : 0,
                to + step * kStep + row / 16 * kTile + row % 16 * 32, largest);
  }
};

struct RightLines {
  const float* from;
  int64_t stride, lines, terms;

  int64_t units() const { return round_up(terms, 32) / 2; }
  ANOMEM_TILE_INLINE void split_unit(int64_t unit, Bfloat16* to, __m512i& largest) const {
    const int64_t term = 2 * unit;
    split_rows(from + term * stride, stride, lines, term < terms, term + 1 < terms,
               to + unit / 16 * kStep + unit % 16 * 32, largest);
  }
};

template <class Lines>
ANOMEM_TILE_INLINE bool split_lines(const Lines& lines, Bfloat16* to) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t unit = 0; unit < lines.units(); ++unit) lines.split_unit(unit, to, largest);
  return in_range(largest);
}

}  // namespace

bool split_left(const float* a, int64_t stride, int64_t m, int64_t k, Bfloat16* to) {
  bool fits = true;
  for (int64_t i = 0; i < m; i += 32)
    fits &= split_lines(LeftLines{a + i * stride, stride, m - i, k}, to + parts_size(i, k));
  return fits;
}

bool split_right(const float* b, int64_t stride, int64_t k, int64_t n, Bfloat16* to) {
  bool fits = true;
  for (int64_t j = 0; j < n; j += 32) fits &= split_lines(RightLines{b + j, stride, n - j, k}, to + parts_size(j, k));
  return fits;
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

struct Nothing {
  ANOMEM_TILE_INLINE void operator()() const {}
};

// The sums of 32 × 32 over `steps` times 32 terms, small products first. `meanwhile` is called four times a step: the
// tiles multiply beside the vector units.
template <class Meanwhile>
ANOMEM_TILE_INLINE void sum_block(int64_t steps, const Bfloat16* left, const Bfloat16* right, Meanwhile&& meanwhile) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s, left += kStep, right += kStep) {
    load_left(left + 2 * kPart);
    load_right(right);
    multiply_tiles();
    meanwhile();
    load_left(left + kPart);
    multiply_tiles();
    meanwhile();
    load_right(right + kPart);
    multiply_tiles();
    load_left(left);
    multiply_tiles();
    meanwhile();
    load_right(right + 2 * kPart);
    multiply_tiles();
    meanwhile();
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

// Terms of a chain of sums, 256, in steps of 32.
constexpr int64_t kChainSteps = 8;

// Parts of a factor: `terms` of them are laid out, those of a product begin at `first`.
struct StillParts {
  const Bfloat16* data;
  int64_t terms, first;

  const Bfloat16* at(int64_t line, int64_t step) const {
    return data + parts_size(line, terms) + (first / 32 + step) * kStep;
  }
};

// Some terms of a product C = A B: where its numbers are, and the library's product of lines that do not fit.
struct Terms {
  int64_t m, n, first, count;
  const float* a;
  int64_t a_stride;
  const Panels& b;
  float* c;
  int64_t c_stride;
  bool accumulate;  // or the first of these terms overwrite C

  int64_t columns() const { return round_up(n, 32); }  // that are written
  int64_t steps() const { return round_up(count, 32) / 32; }
  const float* left(int64_t row, int64_t term) const { return a + row * a_stride + first + term; }
  int64_t right_stride(int64_t column) const {
    return b.stride > 0 ? b.stride : b.width(column / b.widest * b.widest, n);
  }
  const float* right(int64_t term, int64_t column) const {
    const int64_t panel = column / b.widest * b.widest;
    return b.data + panel * b.step + (b.first + first + term) * right_stride(column) + column - panel;
  }
  bool adds(int64_t step) const { return accumulate || step > 0; }
  void store(int64_t row, int64_t column, int64_t step) const {
    store_block(m - row, columns() - column, c + row * c_stride + column, c_stride, adds(step));
  }

  // The library's product of lines within a panel, from a step on, a chain at a time.
  void by_library(int64_t row, int64_t rows, int64_t column, int64_t columns, int64_t step, int64_t end) const {
    for (; step < end; step += kChainSteps)
      library_product(rows, columns, at_most(32 * at_most(kChainSteps, end - step), count - 32 * step),
                      left(row, 32 * step), a_stride, right(32 * step, column), right_stride(column),
                      c + row * c_stride + column, c_stride, adds(step));
  }
};

// The lines of one factor, of which 32 and a chain are split at a time while the tiles multiply those before.
struct MovingRows {
  using Lines = LeftLines;
  static constexpr bool kLeft = true;
  const Terms& of;

  int64_t lines() const { return of.m; }
  int64_t others() const { return of.columns(); }
  ANOMEM_TILE_INLINE LeftLines at(int64_t row, int64_t step) const {
    return {of.left(row, 32 * step), of.a_stride, of.m - row, at_most(32 * kChainSteps, of.count - 32 * step)};
  }
  void by_library(int64_t row, int64_t step, int64_t end) const {
    for (int64_t column = 0; column < of.columns(); column += of.b.widest)
      of.by_library(row, at_most(32, of.m - row), column, of.b.width(column, of.n), step, end);
  }
  // The parts of the other factor. Not of what lies beyond its last column: whether they fit must not depend on it.
  bool split_others(Bfloat16* parts) const {
    bool fits = true;
    for (int64_t j = 0; j < of.n; j += 32)
      fits &= split_right(of.right(0, j), of.right_stride(j), of.count, at_most(32, of.n - j),
                          parts + parts_size(j, of.count));
    return fits;
  }
};

struct MovingColumns {
  using Lines = RightLines;
  static constexpr bool kLeft = false;
  const Terms& of;

  int64_t lines() const { return of.columns(); }
  int64_t others() const { return of.m; }
  ANOMEM_TILE_INLINE RightLines at(int64_t column, int64_t step) const {
    return {of.right(32 * step, column), of.right_stride(column), of.n - column,
            at_most(32 * kChainSteps, of.count - 32 * step)};
  }
  void by_library(int64_t column, int64_t step, int64_t end) const { of.by_library(0, of.m, column, 32, step, end); }
  bool split_others(Bfloat16* parts) const { return split_left(of.left(0, 0), of.a_stride, of.m, of.count, parts); }
};

// All parts are given. A block of the left factor stays in the first-level cache.
void multiply_parts(const Terms& terms, const StillParts& left, const StillParts& right) {
  constexpr int64_t chain = kChainSteps / 2;
  for (int64_t i = 0; i < terms.m; i += 32)
    for (int64_t s = 0; s < terms.steps(); s += chain)
      for (int64_t j = 0; j < terms.columns(); j += 32) {
        sum_block(at_most(chain, terms.steps() - s), left.at(i, s), right.at(j, s), Nothing());
        terms.store(i, j, s);
      }
}

// The parts of one factor are given.
template <class Moving>
void multiply_moving(const Moving& moving, const StillParts& still) {
  const Terms& terms = moving.of;
  const int64_t steps = terms.steps(), chains = (steps + kChainSteps - 1) / kChainSteps;
  const int64_t blocks = round_up(moving.lines(), 32) / 32 * chains;
  constexpr int64_t size = 32 * 32 * kChainSteps * 3;
  if (blocks == 0) return;
  Bfloat16* const parts = moving_parts(2 * size);
  const auto block_at = [&](int64_t b) { return moving.at(b / chains * 32, b % chains * kChainSteps); };
  bool fits = split_lines(block_at(0), parts);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t line = b / chains * 32, step = b % chains * kChainSteps, end = at_most(steps, step + kChainSteps);
    const Bfloat16* const now = parts + b % 2 * size;
    Bfloat16* const next_parts = parts + (b + 1) % 2 * size;
    const typename Moving::Lines next = block_at(b + 1 < blocks ? b + 1 : b);
    const int64_t units = b + 1 < blocks ? next.units() : 0;
    const int64_t calls = 4 * (end - step) * (round_up(moving.others(), 32) / 32), quota = (units + calls - 1) / calls;
    int64_t unit = 0;
    __m512i largest = _mm512_setzero_si512();
    const auto split_some = [&](int64_t count) __attribute__((always_inline)) {
      for (const int64_t last = at_most(units, unit + count); unit < last; ++unit)
        next.split_unit(unit, next_parts, largest);
    };
    __asm__ volatile("" ::: "memory");  // the instructions of tiles do not say that they read memory
    if (fits) {
      for (int64_t other = 0; other < moving.others(); other += 32) {
        const Bfloat16* const rest = still.at(other, step);
        sum_block(end - step, Moving::kLeft ? now : rest, Moving::kLeft ? rest : now,
                  [&]() __attribute__((always_inline)) { split_some(quota); });
        terms.store(Moving::kLeft ? line : other, Moving::kLeft ? other : line, step);
      }
    } else {
      moving.by_library(line, step, end);
    }
    split_some(units);
    fits = in_range(largest);
  }
}

// No parts are given. The smaller factor is split first.
template <class Moving>
void multiply_unsplit(const Moving& moving, int64_t others) {
  const int64_t steps = moving.of.steps(), count = moving.of.count;
  Bfloat16* const parts = still_parts(parts_size(others, count));
  if (moving.split_others(parts)) return multiply_moving(moving, {parts, count, 0});
  for (int64_t line = 0; line < moving.lines(); line += 32) moving.by_library(line, 0, steps);
}

}  // namespace

void product_in_tiles(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_stride, const Bfloat16* a_parts,
                      const Panels& b, float* c, int64_t c_stride, bool accumulate) {
  for (int64_t first = 0; first < k; first += kSplitTerms) {
    const Terms terms{m, n, first,    at_most(kSplitTerms, k - first), a, a_stride,
                      b, c, c_stride, accumulate || first > 0};
    const StillParts left{a_parts, k, first}, right{b.parts, b.all, b.first + first};
    const MovingRows rows{terms};
    const MovingColumns columns{terms};
    if (a_parts != nullptr && b.parts != nullptr) multiply_parts(terms, left, right);
    else if (b.parts != nullptr) multiply_moving(rows, right);
    else if (a_parts != nullptr) multiply_moving(columns, left);
    else if (n <= m) multiply_unsplit(rows, n);
    else multiply_unsplit(columns, m);
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
#pragma GCC diagnostic pop

namespace {

// Products of small whole numbers and quarters of units in the last place of bfloat16, whose sums are exact, with each
// choice of parts that are given.
bool is_right() {
  constexpr int64_t m = 67, n = 35, k = 45, stride = 64;
  std::vector<float> a(m * k), b(k * n), sums(m * n, 1.0f);
  for (int64_t i = 0; i < m * k; ++i) a[i] = static_cast<float>(i * 5 % 7 - 3) * (1 + 0x1p-10f);
  for (int64_t i = 0; i < k * n; ++i) b[i] = static_cast<float>(i * 3 % 5 - 2);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j)
      for (int64_t p = 0; p < k; ++p) sums[i * n + j] += a[i * k + p] * b[p * n + j];
  Parts a_memory, b_memory;
  Bfloat16 *const a_parts = a_memory.take(parts_size(m, k)), *const b_parts = b_memory.take(parts_size(n, k));
  if (!split_left(a.data(), k, m, k, a_parts) || !split_right(b.data(), n, k, n, b_parts)) return false;
  for (int given = 0; given < 4; ++given) {
    std::vector<float> c(m * stride, 1.0f);
    take_tiles();
    product_in_tiles(m, n, k, a.data(), k, given & 1 ? a_parts : nullptr,
                     {b.data(), 1, n, given & 2 ? b_parts : nullptr, 0, k, stride}, c.data(), stride, true);
    release_tiles();
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j)
        if (c[i * stride + j] != sums[i * n + j]) return false;
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
void product_in_tiles(int64_t, int64_t, int64_t, const float*, int64_t, const Bfloat16*, const Panels&, float*, int64_t,
                      bool) {}
void take_tiles() {}
void release_tiles() {}
#endif

}  // namespace anomem::cpu
