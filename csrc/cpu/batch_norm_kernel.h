// Batch norm with an optional sum and ReLU, on maps as rows of channels.
//
// Each direction has two passes over the map: one for sums over the rows, one for the result. The second goes through
// the pieces of the map backwards, so that it begins with what the first has left in the cache. Rows come in chunks
// that stay in the first-level cache. A chunk's mean is exact to its own rounding, and chunks are joined in double, so
// that a large mean costs no digits of the variance.
#pragma once

#include "cpu/batch_norm.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace anomem::cpu::ANOMEM_ISA {

// Vectors that the inner loops take side by side.
constexpr int kStrip = 4;

// How a map [R, C] is divided. Rows of few channels are joined to wide ones, `fold` at a time. The pieces and chunks do
// not depend on the number of threads.
class Chunks {
 public:
  template <class T>
  static Chunks of(int64_t rows, int64_t channels) {
    constexpr int64_t strip = kStrip * kLanes<T>;
    return Chunks(rows, channels, channels < strip && strip % channels == 0 ? strip / channels : 1, 16384 / sizeof(T));
  }

  int64_t pieces() const { return pieces_; }
  int64_t widest() const { return fold_ * channels_; }
  int64_t rows_of(int64_t piece) const { return first_row(last_chunk(piece)) - first_row(last_chunk(piece - 1)); }

  // Calls f(offset, rows, width) for the chunks of a piece: so many rows of `width` numbers, C or a multiple of C.
  template <class F>
  void of_piece(int64_t piece, const F& f) const {
    for (int64_t chunk = last_chunk(piece - 1); chunk < last_chunk(piece); ++chunk) {
      const int64_t first = first_row(chunk), rows = first_row(chunk + 1) - first, wide = rows / fold_;
      if (wide > 0) f(first * channels_, wide, fold_ * channels_);
      if (rows > wide * fold_) f((first + wide * fold_) * channels_, rows - wide * fold_, channels_);
    }
  }

  // The same for all pieces, the last ones first, in parallel.
  template <class F>
  void backwards(const F& f) const {
    parallel(pieces_, [&](int64_t mirrored) { of_piece(pieces_ - 1 - mirrored, f); });
  }

 private:
  Chunks(int64_t rows, int64_t channels, int64_t fold, int64_t numbers)
      : rows_(rows), channels_(channels), fold_(fold) {
    const int64_t length = numbers / channels < 64 ? 64 : numbers / channels;
    length_ = length / fold * fold;
    chunks_ = (rows + length_ - 1) / length_;
    pieces_ = chunks_ < 64 ? chunks_ : 64;
  }

  int64_t last_chunk(int64_t piece) const { return (piece + 1) * chunks_ / pieces_; }
  int64_t first_row(int64_t chunk) const { return chunk * length_ < rows_ ? chunk * length_ : rows_; }

  int64_t rows_, channels_, fold_, length_, chunks_, pieces_;
};

// Calls f(n, j, some) for n vectors side by side from column j on, n a constant; the last one may have some lanes only.
template <class T, class F>
ANOMEM_INLINE void for_strips(int64_t width, const F& f) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t j = 0;
  for (; j + kStrip * lanes <= width; j += kStrip * lanes) f(std::integral_constant<int, kStrip>{}, j, lanes);
  for (; j + lanes <= width; j += lanes) f(std::integral_constant<int, 1>{}, j, lanes);
  if (j < width) f(std::integral_constant<int, 1>{}, j, width - j);
}

// Calls f(n, first, last, j, some) for the vectors of some rows of a chunk. Of long rows there are at most kRows: they
// lie apart by a power of two, and fall into the same few sets of the cache.
template <class T, int kRows, class F>
ANOMEM_INLINE void for_blocks(int64_t rows, int64_t width, const F& f) {
  const int64_t block = width > kStrip * kLanes<T> ? kRows : rows;
  for (int64_t first = 0; first < rows; first += block) {
    const int64_t last = first + block < rows ? first + block : rows;
    for_strips<T>(width, [&](auto count, int64_t j, int64_t some) { f(count, first, last, j, some); });
  }
}

// Mean and sum of squared deviations [C] of `count` rows, joined with those of others (Chan, Golub and LeVeque 1979).
template <class T>
inline void join_moments(const T* mean, const T* squares, double count, int64_t channels, double& before,
                         double* joint_mean, double* joint_squares) {
  const double part = count / (before + count), weight = before * part;
  for (int64_t j = 0; j < channels; ++j) {
    const double shift = static_cast<double>(mean[j]) - joint_mean[j];
    joint_mean[j] += shift * part;
    joint_squares[j] += static_cast<double>(squares[j]) + shift * shift * weight;
  }
  before += count;
}

// Mean and sum of squared deviations of each column of a chunk.
template <class S>
inline void moments_of(const S* x, int64_t rows, int64_t width, accumulator_t<S>* mean, accumulator_t<S>* squares) {
  using T = accumulator_t<S>;
  for_strips<T>(width, [&](auto count, int64_t j, int64_t some) {
    constexpr int n = decltype(count)::value;
    vec<T> sum[n] = {}, centre[n], square[n] = {};
    for (int64_t k = 0; k < rows; ++k)
#pragma GCC unroll 4
      for (int i = 0; i < n; ++i) sum[i] += load_some(x + k * width + j + i * kLanes<T>, some);
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) centre[i] = sum[i] / broadcast(static_cast<T>(rows));
    for (int64_t k = 0; k < rows; ++k)
#pragma GCC unroll 4
      for (int i = 0; i < n; ++i) {
        const vec<T> centred = load_some(x + k * width + j + i * kLanes<T>, some) - centre[i];
        square[i] = multiply_add(centred, centred, square[i]);
      }
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) {
      store_some(mean + j + i * kLanes<T>, centre[i], some);
      store_some(squares + j + i * kLanes<T>, square[i], some);
    }
  });
}

template <class S>
void compute(const BatchNormStatistics& a) {
  using T = accumulator_t<S>;
  const int64_t channels = a.channels;
  const auto chunks = Chunks::of<T>(a.rows, channels);
  Buffer<double> moments(chunks.pieces() * 2 * channels);
  parallel(chunks.pieces(), [&](int64_t piece) {
    Buffer<T> scratch(2 * chunks.widest());
    T *mean = scratch.data(), *squares = mean + chunks.widest();
    double *joint_mean = moments.data() + piece * 2 * channels, *joint_squares = joint_mean + channels, before = 0;
    for (int64_t j = 0; j < 2 * channels; ++j) joint_mean[j] = 0;
    chunks.of_piece(piece, [&](int64_t offset, int64_t rows, int64_t width) {
      moments_of(static_cast<const S*>(a.x) + offset, rows, width, mean, squares);
      for (int64_t j = 0; j < width; j += channels)
        join_moments(mean + j, squares + j, static_cast<double>(rows), channels, before, joint_mean, joint_squares);
    });
  });
  double *mean = moments.data(), *squares = mean + channels, before = static_cast<double>(chunks.rows_of(0));
  for (int64_t piece = 1; piece < chunks.pieces(); ++piece) {
    const double *other = moments.data() + piece * 2 * channels, rows = static_cast<double>(chunks.rows_of(piece));
    join_moments(other, other + channels, rows, channels, before, mean, squares);
  }
  for (int64_t j = 0; j < channels; ++j) {
    static_cast<T*>(a.mean)[j] = static_cast<T>(mean[j]);
    static_cast<T*>(a.variance)[j] = static_cast<T>(squares[j] / before);
  }
}

// What y = (x − mean) · scale + bias takes, computed once a call and repeated for joined rows.
template <class T>
class Lines {
 public:
  Lines(const Affine& a, int64_t channels, int64_t widest) : width_(widest), numbers_(4 * widest) {
    const auto given = [](const Optional<const void>& numbers, int64_t j, T otherwise) {
      return numbers.given ? static_cast<const T*>(numbers.data)[j] : otherwise;
    };
    for (int64_t at = 0; at < widest; ++at) {
      const int64_t j = at % channels;
      const T inverse = T{1} / std::sqrt(static_cast<const T*>(a.variance)[j] + static_cast<T>(a.eps));
      numbers_[at] = static_cast<const T*>(a.mean)[j];
      numbers_[width_ + at] = inverse;
      numbers_[2 * width_ + at] = inverse * given(a.weight, j, 1);
      numbers_[3 * width_ + at] = given(a.bias, j, 0);
    }
  }

  // Those of the columns of one vector.
  struct Line {
    vec<T> mean, inverse, scale, bias;
    ANOMEM_INLINE vec<T> at(vec<T> x) const { return multiply_add(x - mean, scale, bias); }
  };
  ANOMEM_INLINE Line of(int64_t j, int64_t some) const {
    const T* at = numbers_.data() + j;
    return {load_some(at, some), load_some(at + width_, some), load_some(at + 2 * width_, some),
            load_some(at + 3 * width_, some)};
  }
  T inverse(int64_t j) const { return numbers_[width_ + j]; }

 private:
  int64_t width_;
  Buffer<T> numbers_;
};

template <class S, bool kAdd, bool kRelu>
inline void apply_lines(const BatchNormApply& a) {
  using T = accumulator_t<S>;
  const auto chunks = Chunks::of<T>(a.rows, a.channels);
  const Lines<T> lines(a.affine, a.channels, chunks.widest());
  chunks.backwards([&](int64_t offset, int64_t rows, int64_t width) {
    const S* x = static_cast<const S*>(a.x) + offset;
    const S* add = kAdd ? static_cast<const S*>(a.add.data) + offset : nullptr;
    S* out = static_cast<S*>(a.out) + offset;
    for_blocks<T, 1>(rows, width, [&](auto count, int64_t first, int64_t last, int64_t j, int64_t some) {
      constexpr int n = decltype(count)::value;
      typename Lines<T>::Line line[n];
#pragma GCC unroll 4
      for (int i = 0; i < n; ++i) line[i] = lines.of(j + i * kLanes<T>, some);
      for (int64_t k = first; k < last; ++k)
#pragma GCC unroll 4
        for (int i = 0; i < n; ++i) {
          const int64_t at = k * width + j + i * kLanes<T>;
          vec<T> y = line[i].at(load_some(x + at, some));
          if constexpr (kAdd) y += load_some(add + at, some);
          if constexpr (kRelu) y = larger(vec<T>{}, y);
          store_some(out + at, y, some);
        }
    });
  });
}

template <class S>
void compute(const BatchNormApply& a) {
  if (a.add.given) a.affine.relu ? apply_lines<S, true, true>(a) : apply_lines<S, true, false>(a);
  else a.affine.relu ? apply_lines<S, false, true>(a) : apply_lines<S, false, false>(a);
}

// How the gradient passes the ReLU: always, where y > 0 in a new computation of y, or where the output is positive.
enum class Gate { kOpen, kMadeAgain, kOutput };

template <Gate gate, class S>
ANOMEM_INLINE vec<accumulator_t<S>> gated(const S* dout, vec<accumulator_t<S>> x, const S* out,
                                          const typename Lines<accumulator_t<S>>::Line& line, int64_t some) {
  using T = accumulator_t<S>;
  const vec<T> g = load_some(dout, some);
  if constexpr (gate == Gate::kOpen) return g;
  const vec<T> y = gate == Gate::kOutput ? load_some(out, some) : line.at(x);
  return y <= 0 ? vec<T>{} : g;  // NaN passes, as in torch
}

template <class F>
inline void with_gate(const Affine& affine, bool has_output, const F& f) {
  if (!affine.relu) f(std::integral_constant<Gate, Gate::kOpen>{});
  else if (has_output) f(std::integral_constant<Gate, Gate::kOutput>{});
  else f(std::integral_constant<Gate, Gate::kMadeAgain>{});
}

template <class S>
void compute(const BatchNormSums& a) {
  using T = accumulator_t<S>;
  const int64_t channels = a.channels;
  const auto chunks = Chunks::of<T>(a.rows, channels);
  const int64_t widest = chunks.widest();
  const Lines<T> lines(a.affine, channels, widest);
  Buffer<double> sums(chunks.pieces() * 2 * channels);
  with_gate(a.affine, a.out.given, [&](auto gate) {
    parallel(chunks.pieces(), [&](int64_t piece) {
      Buffer<T> scratch(2 * widest);
      double *constant = sums.data() + piece * 2 * channels, *along = constant + channels;
      for (int64_t j = 0; j < 2 * channels; ++j) constant[j] = 0;
      chunks.of_piece(piece, [&](int64_t offset, int64_t rows, int64_t width) {
        const S *x = static_cast<const S*>(a.x) + offset, *dout = static_cast<const S*>(a.dout) + offset;
        const S* out = a.out.given ? static_cast<const S*>(a.out.data) + offset : dout;
        T *totals = scratch.data(), *products = totals + widest;
        std::memset(totals, 0, 2 * widest * sizeof(T));
        for_blocks<T, 4>(rows, width, [&](auto count, int64_t first, int64_t last, int64_t j, int64_t some) {
          constexpr int n = decltype(count)::value;
          typename Lines<T>::Line line[n];
          vec<T> total[n], product[n];
#pragma GCC unroll 4
          for (int i = 0; i < n; ++i) {
            line[i] = lines.of(j + i * kLanes<T>, some);
            total[i] = load_some(totals + j + i * kLanes<T>, some);
            product[i] = load_some(products + j + i * kLanes<T>, some);
          }
          for (int64_t k = first; k < last; ++k)
#pragma GCC unroll 4
            for (int i = 0; i < n; ++i) {
              const int64_t at = k * width + j + i * kLanes<T>;
              const vec<T> value = load_some(x + at, some);
              const vec<T> g = gated<decltype(gate)::value>(dout + at, value, out + at, line[i], some);
              total[i] += g;
              product[i] = multiply_add(g, value - line[i].mean, product[i]);
            }
#pragma GCC unroll 4
          for (int i = 0; i < n; ++i) {
            store_some(totals + j + i * kLanes<T>, total[i], some);
            store_some(products + j + i * kLanes<T>, product[i], some);
          }
        });
        for (int64_t at = 0; at < width; at += channels)
          for (int64_t j = 0; j < channels; ++j) {
            constant[j] += static_cast<double>(totals[at + j]);
            along[j] += static_cast<double>(products[at + j]);
          }
      });
    });
  });
  for (int64_t j = 0; j < channels; ++j) {
    double constant = 0, along = 0;
    for (int64_t piece = 0; piece < chunks.pieces(); ++piece) {
      constant += sums[piece * 2 * channels + j];
      along += sums[piece * 2 * channels + channels + j];
    }
    static_cast<T*>(a.constant)[j] = static_cast<T>(constant);
    static_cast<T*>(a.along)[j] = static_cast<T>(along * static_cast<double>(lines.inverse(j)));
  }
}

template <class S>
void compute(const BatchNormGradient& a) {
  using T = accumulator_t<S>;
  const int64_t channels = a.channels;
  const auto chunks = Chunks::of<T>(a.rows, channels);
  const int64_t widest = chunks.widest();
  const Lines<T> lines(a.affine, channels, widest);
  // dx = (g − mean of g − (x − mean) · slope) · scale.
  Buffer<T> means(2 * widest);
  for (int64_t at = 0; at < widest; ++at) {
    const int64_t j = at % channels;
    means[at] =
        static_cast<T>(static_cast<double>(static_cast<const T*>(a.constant)[j]) / static_cast<double>(a.count));
    means[widest + at] =
        static_cast<T>(static_cast<double>(static_cast<const T*>(a.along)[j]) / static_cast<double>(a.count)) *
        lines.inverse(j);
  }
  with_gate(a.affine, a.out.given, [&](auto gate) {
    chunks.backwards([&](int64_t offset, int64_t rows, int64_t width) {
      const S *x = static_cast<const S*>(a.x) + offset, *dout = static_cast<const S*>(a.dout) + offset;
      const S* out = a.out.given ? static_cast<const S*>(a.out.data) + offset : dout;
      S *dx = static_cast<S*>(a.dx) + offset, *dadd = a.dadd.given ? static_cast<S*>(a.dadd.data) + offset : nullptr;
      for_blocks<T, 1>(rows, width, [&](auto count, int64_t first, int64_t last, int64_t j, int64_t some) {
        constexpr int n = decltype(count)::value;
        typename Lines<T>::Line line[n];
        vec<T> constant[n], slope[n];
#pragma GCC unroll 4
        for (int i = 0; i < n; ++i) {
          line[i] = lines.of(j + i * kLanes<T>, some);
          constant[i] = load_some(means.data() + j + i * kLanes<T>, some);
          slope[i] = load_some(means.data() + widest + j + i * kLanes<T>, some);
        }
        for (int64_t k = first; k < last; ++k)
#pragma GCC unroll 4
          for (int i = 0; i < n; ++i) {
            const int64_t at = k * width + j + i * kLanes<T>;
            const vec<T> value = load_some(x + at, some);
            const vec<T> g = gated<decltype(gate)::value>(dout + at, value, out + at, line[i], some);
            if (dadd != nullptr) store_some(dadd + at, g, some);
            store_some(dx + at, (g - multiply_add(value - line[i].mean, slope[i], constant[i])) * line[i].scale, some);
          }
      });
    });
  });
}

}  // namespace anomem::cpu::ANOMEM_ISA
