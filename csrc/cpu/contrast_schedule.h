// The order in which the tiles of a contrast are added.
#pragma once

#include <cstdint>

#include "cpu/contrast.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace anomem::cpu::ANOMEM_ISA {

// Rounds of tile pairs. No row of tiles occurs twice in a round: its pairs run at once, and each adds to its two rows.
// Every row receives its sums in the order of the rounds, whatever the number of threads.

// Every unordered pair of tiles, and every tile with itself, by the circle method. With an odd number of tiles one is
// left over in each round and meets itself; with an even number all do so in a last round.
struct Tournament {
  int64_t tiles;
  bool is_odd() const { return tiles % 2 == 1; }
  int64_t rounds() const { return tiles; }
  int64_t pairs(int64_t round) const { return is_odd() ? (tiles + 1) / 2 : round == tiles - 1 ? tiles : tiles / 2; }

  // first ≤ second
  void pair(int64_t round, int64_t index, int64_t* first, int64_t* second) const {
    const int64_t circle = is_odd() ? tiles : tiles - 1;
    int64_t a, b;
    if (!is_odd() && round == tiles - 1) {
      a = b = index;
    } else if (index == 0) {
      a = round;
      b = is_odd() ? round : tiles - 1;
    } else {
      a = (round + index) % circle;
      b = (round - index + circle) % circle;
    }
    *first = a < b ? a : b;
    *second = a < b ? b : a;
  }
};

// Every pair of a row tile and a column tile.
struct Crossing {
  int64_t rows, columns;
  int64_t rounds() const { return rows < columns ? columns : rows; }
  int64_t pairs(int64_t) const { return rows < columns ? rows : columns; }
  void pair(int64_t round, int64_t index, int64_t* row, int64_t* column) const {
    *row = rows < columns ? index : (index + round) % rows;
    *column = rows < columns ? (index + round) % columns : index;
  }
};

// Tiles or blocks of a group in strips of `length` each.
struct Strips {
  int64_t length, count;  // of a strip, of all
  int64_t begin(int64_t strip) const { return strip * length; }
  int64_t end(int64_t strip) const { return (strip + 1) * length < count ? (strip + 1) * length : count; }
};

// Calls f(row tile, column tile) for the pairs of two strips, or of one with itself, in blocks whose tiles a
// second-level cache holds.
template <class F>
inline void for_tile_pairs(const Strips& tiles, int64_t first, int64_t second, const F& f) {
  constexpr int64_t side = 4;
  const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
  for (int64_t i = tiles.begin(first); i < tiles.end(first); i += side)
    for (int64_t j = first == second ? i : tiles.begin(second); j < tiles.end(second); j += side)
      for (int64_t a = i; a < least(i + side, tiles.end(first)); ++a)
        for (int64_t b = i == j ? a : j; b < least(j + side, tiles.end(second)); ++b) f(a, b);
}

// Packs two strips of rows, or one that meets itself, into scratch of `width` numbers T a row, and calls f(rows of the
// first, rows of the second). place(start, row) are a strip's rows from `row` on, packed at `start`; pack(block, rows)
// packs a block of them.
template <class T, class Place, class Pack, class F>
inline void with_packed_strips(const Strips& blocks, int64_t first, int64_t second, int64_t width, const Place& place,
                               const Pack& pack, const F& f) {
  const bool same = first == second;
  const int64_t rows = blocks.length * kRowPadding;
  Scratch scratch((same ? 1 : 2) * rows * width * static_cast<int64_t>(sizeof(T)));
  T* const start = static_cast<T*>(scratch.data());
  const auto packed = [&](int64_t strip, T* at) {
    const auto to = place(at, strip * rows);
    for (int64_t block = blocks.begin(strip); block < blocks.end(strip); ++block) pack(block, to);
    return to;
  };
  const auto left = packed(first, start), right = same ? left : packed(second, start + rows * width);
  f(left, right);
}

// Runs a contrast, `wave` groups at a time, each in its place of the workspace:
// 1. prepare(group, place, block) for every block of rows,
// 2. add(group, place, row tile or strip, column tile or strip) round by round,
// 3. finish(group, place, block) for every block of rows.
template <class Rounds, class Prepare, class Add, class Finish>
void run_in_waves(int64_t groups, int64_t wave, int64_t blocks, const Rounds& schedule, const Prepare& prepare,
                  const Add& add, const Finish& finish) {
  for (int64_t start = 0; start < groups; start += wave) {
    const int64_t count = groups - start < wave ? groups - start : wave;
    if (schedule.rounds() == 1) {  // one tile: a group is one item
      parallel(count, [&](int64_t place) {
        for (int64_t block = 0; block < blocks; ++block) prepare(start + place, place, block);
        add(start + place, place, 0, 0);
        for (int64_t block = 0; block < blocks; ++block) finish(start + place, place, block);
      });
      continue;
    }
    parallel(count * blocks, [&](int64_t i) { prepare(start + i / blocks, i / blocks, i % blocks); });
    for (int64_t round = 0; round < schedule.rounds(); ++round) {
      const int64_t pairs = schedule.pairs(round);
      parallel(count * pairs, [&](int64_t i) {
        int64_t first, second;
        schedule.pair(round, i % pairs, &first, &second);
        add(start + i / pairs, i / pairs, first, second);
      });
    }
    parallel(count * blocks, [&](int64_t i) { finish(start + i / blocks, i / blocks, i % blocks); });
  }
}

}  // namespace anomem::cpu::ANOMEM_ISA
