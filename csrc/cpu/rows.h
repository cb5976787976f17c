// Passes over one row: scaling, normalisation (anomem/reference/retrieve.py) and its gradient.
#pragma once

#include "cpu/memory.h"
#include "cpu/simd.h"

namespace anomem::cpu::ANOMEM_ISA {

// Calls f(offset, count) for every vector of a row of n elements. Only the last count may be less than kLanes.
template <class T, class F>
ANOMEM_INLINE void for_vectors(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) f(i, static_cast<int64_t>(kLanes<T>));
  if (i < n) f(i, n - i);
}

template <class S>
ANOMEM_INLINE vec<accumulator_t<S>> load_some(const S* p, int64_t count) {
  return count == kLanes<accumulator_t<S>> ? load(p) : load_first(p, count);
}

template <class S>
ANOMEM_INLINE void store_some(S* p, vec<accumulator_t<S>> x, int64_t count) {
  if (count == kLanes<accumulator_t<S>>) return store(p, x);
  store_first(p, x, count);
}

// x with the lanes from `count` on replaced.
template <class T>
ANOMEM_INLINE vec<T> keep_first(vec<T> x, int64_t count, T rest = 0) {
  using Word = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  return lane_index<T>() < typename Simd<T>::bits{} + static_cast<Word>(count) ? x : broadcast(rest);
}

// Asks for a row of n elements that will be read soon, in the second-level cache.
template <class S>
ANOMEM_INLINE void fetch_row(const S* x, int64_t n) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(S));
  for (int64_t i = 0; i < n; i += line) __builtin_prefetch(x + i, 0, 2);
}

// x ← scale · x.
template <class T>
inline void scale_row(T* x, int64_t n, T scale) {
  for_vectors<T>(n, [&](int64_t i, int64_t count) { store_some(x + i, load_some(x + i, count) * scale, count); });
}

// sum ← sum + scale · x.
template <class T>
inline void add_scaled(const T* x, int64_t n, T scale, T* sum) {
  for_vectors<T>(n, [&](int64_t i, int64_t count) {
    store_some(sum + i, multiply_add(load_some(x + i, count), broadcast(scale), load_some(sum + i, count)), count);
  });
}

// to ← scale · x, widened or rounded to the element type of `to`.
template <class From, class To>
inline void scaled_copy(const From* x, int64_t n, accumulator_t<To> scale, To* to) {
  for_vectors<accumulator_t<To>>(
      n, [&](int64_t i, int64_t count) { store_some(to + i, load_some(x + i, count) * scale, count); });
}

template <class T>
ANOMEM_INLINE bool is_finite(T x) {
  return x - x == 0;
}

template <class T>
ANOMEM_INLINE T larger_or_nan(T a, T b) {
  return a != a || b <= a ? a : b;
}

// For a row whose squares overflow: the power of two that brings its largest element to about 2^20. 0 if an element is
// infinite or NaN: no factor helps.
template <class S>
inline accumulator_t<S> shrinking_factor(const S* x, int64_t n) {
  using T = accumulator_t<S>;
  T peak = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T size = std::abs(widen(x[i]));
    if (!is_finite(size)) return 0;
    peak = size > peak ? size : peak;
  }
  int exponent = 0;
  std::frexp(peak, &exponent);
  return std::ldexp(T{1}, 20 - exponent);
}

// Σ (scale · x)².
template <class S>
inline accumulator_t<S> sum_of_squares(const S* x, int64_t n, accumulator_t<S> scale) {
  using T = accumulator_t<S>;
  vec<T> squares{};
  for_vectors<T>(n, [&](int64_t i, int64_t count) {
    const vec<T> v = load_some(x + i, count) * scale;
    squares = multiply_add(v, v, squares);
  });
  return sum_lanes<T>(squares);
}

// Not below the length of a row whose d squares have this sum, some of which may be too small for T.
template <class T>
inline T length_at_most(T squares, int64_t d) {
  return std::sqrt(squares + static_cast<T>(d) * std::numeric_limits<T>::min());
}

// 1/|x|, or 0 if |x| ≤ 1e-12: such a row becomes zero and passes no gradient. NaN stays NaN; 0 for an infinite element.
template <class S>
inline accumulator_t<S> inverse_length(const S* x, int64_t n) {
  using T = accumulator_t<S>;
  const T length = std::sqrt(sum_of_squares(x, n, T{1}));
  if (!is_finite(length))
    if (const T scale = shrinking_factor(x, n); scale != 0) return scale / std::sqrt(sum_of_squares(x, n, scale));
  return length <= T{1e-12} ? T{0} : T{1} / length;
}

// y = norm(x), widened. Returns the factor on x (on x − mean for "layer"); the gradient needs it. `eps` is added to the
// variance for "layer".
template <class S>
inline accumulator_t<S> normalize_row(const S* x, int64_t d, Normalize how, accumulator_t<S>* y,
                                      accumulator_t<S> eps = 1e-5) {
  using T = accumulator_t<S>;
  T factor = 1;
  if (how == Normalize::kLayer) {
    vec<T> sum{}, squares{};
    for_vectors<T>(d, [&](int64_t i, int64_t count) { sum += load_some(x + i, count); });
    const vec<T> mean = broadcast(sum_lanes<T>(sum) / static_cast<T>(d));
    for_vectors<T>(d, [&](int64_t i, int64_t count) {
      const vec<T> centred = keep_first<T>(load_some(x + i, count) - mean, count);
      squares = multiply_add(centred, centred, squares);
    });
    const T variance = sum_lanes<T>(squares) / static_cast<T>(d);
    if (!is_finite(variance))
      if (const T shrink = shrinking_factor(x, d); shrink != 0) {
        scaled_copy(x, d, shrink, y);
        // Beside the variance of a long row, of 2^-8 and more when shrunk, the constant is nothing.
        return shrink * normalize_row<T>(y, d, how, y, T{1e-30});
      }
    factor = 1 / std::sqrt(variance + eps);
    const vec<T> scale = broadcast(factor);
    for_vectors<T>(
        d, [&](int64_t i, int64_t count) { store_some(y + i, (load_some(x + i, count) - mean) * scale, count); });
    return factor;
  }
  if (how == Normalize::kL2) factor = inverse_length(x, d);
  scaled_copy(x, d, factor, y);
  return factor;
}

// dx = scale · (gradient of norm at x) · dy, from y = norm(x) and the factor that normalize_row returned.
template <class S>
inline void normalize_row_backward(const accumulator_t<S>* dy, const accumulator_t<S>* y, accumulator_t<S> factor,
                                   accumulator_t<S> scale, int64_t d, Normalize how, S* dx) {
  using T = accumulator_t<S>;
  T mean = 0, projection = 0;
  if (how == Normalize::kLayer) {
    vec<T> sum{};
    for_vectors<T>(d, [&](int64_t i, int64_t count) { sum += load_some(dy + i, count); });
    mean = sum_lanes<T>(sum) / static_cast<T>(d);
    projection = dot_product(dy, y, d) / static_cast<T>(d);
  } else if (how == Normalize::kL2) {
    projection = dot_product(dy, y, d);
  }
  const vec<T> outer = broadcast(how == Normalize::kNone ? scale : scale * factor);
  for_vectors<T>(d, [&](int64_t i, int64_t count) {
    const vec<T> inner = how == Normalize::kNone
                             ? load_some(dy + i, count)
                             : load_some(dy + i, count) - mean - load_some(y + i, count) * projection;
    store_some(dx + i, inner * outer, count);
  });
}

}  // namespace anomem::cpu::ANOMEM_ISA
