// Vectors of one instruction set, by the compiler's vector extensions: the same code runs with SSE2, AVX2, AVX-512 and
// NEON. Highway and xsimd were not taken: the library links torch alone.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#include "cpu/scratch.h"
#include "cpu/types.h"

#define ANOMEM_INLINE inline __attribute__((always_inline))
// Of a lambda that takes or returns vectors: out of line it would lack the instruction set.
#define ANOMEM_ALWAYS __attribute__((always_inline))

namespace anomem::cpu::ANOMEM_ISA {

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float vector __attribute__((vector_size(ANOMEM_VECTOR_BYTES)));
  typedef float loose __attribute__((vector_size(ANOMEM_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t bits __attribute__((vector_size(ANOMEM_VECTOR_BYTES)));
  typedef uint32_t words __attribute__((vector_size(ANOMEM_VECTOR_BYTES)));
  static constexpr int kLanes = ANOMEM_VECTOR_BYTES / 4;
};

template <>
struct Simd<double> {
  typedef double vector __attribute__((vector_size(ANOMEM_VECTOR_BYTES)));
  typedef double loose __attribute__((vector_size(ANOMEM_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t bits __attribute__((vector_size(ANOMEM_VECTOR_BYTES)));
  typedef uint64_t words __attribute__((vector_size(ANOMEM_VECTOR_BYTES)));
  static constexpr int kLanes = ANOMEM_VECTOR_BYTES / 8;
};

// A vector of the accumulation type T (float or double), and its number of lanes.
template <class T>
using vec = typename Simd<T>::vector;
template <class T>
constexpr int kLanes = Simd<T>::kLanes;

template <class T>
ANOMEM_INLINE vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::loose*>(p);
}

// Widened: bfloat16 is the upper half of a float.
ANOMEM_INLINE vec<float> load(const Bfloat16* p) {
  typedef Simd<float>::words words;
#if ANOMEM_X86_VARIANTS && ANOMEM_VECTOR_BYTES == 64
  // One instruction, where GCC 12 makes five of a conversion.
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return reinterpret_cast<vec<float>>(words(_mm512_maskz_cvtepu16_epi32(0xffff, bits)) << 16);
#else
  typedef uint16_t halves __attribute__((vector_size(ANOMEM_VECTOR_BYTES / 2), aligned(2), may_alias));
  return reinterpret_cast<vec<float>>(__builtin_convertvector(*reinterpret_cast<const halves*>(p), words) << 16);
#endif
}

// As many numbers as a vector of doubles has, widened.
ANOMEM_INLINE vec<double> load_double(const double* p) { return load(p); }
ANOMEM_INLINE vec<double> load_double(const float* p) {
  typedef float half __attribute__((vector_size(ANOMEM_VECTOR_BYTES / 2), aligned(4), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const half*>(p), vec<double>);
}
ANOMEM_INLINE vec<double> load_double(const Bfloat16* p) {
  typedef uint16_t quarter __attribute__((vector_size(ANOMEM_VECTOR_BYTES / 4), aligned(2), may_alias));
  typedef uint32_t words __attribute__((vector_size(ANOMEM_VECTOR_BYTES / 2)));
  typedef float half __attribute__((vector_size(ANOMEM_VECTOR_BYTES / 2)));
  const words bits = __builtin_convertvector(*reinterpret_cast<const quarter*>(p), words) << 16;
  return __builtin_convertvector(reinterpret_cast<half>(bits), vec<double>);
}

template <class T>
ANOMEM_INLINE void store(T* p, vec<T> x) {
  *reinterpret_cast<typename Simd<T>::loose*>(p) = x;
}

ANOMEM_INLINE void store(Bfloat16* p, vec<float> x) {
#if ANOMEM_BFLOAT16_PAIRS
  const __m256i halves = __m256i(_mm512_maskz_cvtneps_pbh(0xffff, __m512(x)));  // below 2^-126 it stores 0
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
#else
  typedef uint16_t halves __attribute__((vector_size(ANOMEM_VECTOR_BYTES / 2), aligned(2), may_alias));
  typedef Simd<float>::words words;
  const words bits = reinterpret_cast<words>(x);
  const words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const words nan = words{} + 0x7fc0;
  *reinterpret_cast<halves*>(p) = __builtin_convertvector(reinterpret_cast<words>(x == x) ? rounded : nan, halves);
#endif
}

// The first n < lanes elements; the rest of the vector is zero.
template <class S>
ANOMEM_INLINE vec<accumulator_t<S>> load_first(const S* p, int64_t n) {
#if ANOMEM_X86_VARIANTS && ANOMEM_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<S, float>) return vec<float>(_mm512_maskz_loadu_ps((1u << n) - 1, p));
  if constexpr (std::is_same_v<S, double>) return vec<double>(_mm512_maskz_loadu_pd((1u << n) - 1, p));
#endif
  S padded[kLanes<accumulator_t<S>>] = {};
  std::memcpy(padded, p, n * sizeof(S));
  return load(padded);
}

template <class S>
ANOMEM_INLINE void store_first(S* p, vec<accumulator_t<S>> x, int64_t n) {
#if ANOMEM_X86_VARIANTS && ANOMEM_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<S, float>) return _mm512_mask_storeu_ps(p, (1u << n) - 1, __m512(x));
#endif
  S padded[kLanes<accumulator_t<S>>];
  store(padded, x);
  std::memcpy(p, padded, n * sizeof(S));
}

template <class T>
ANOMEM_INLINE vec<T> broadcast(T x) {
  return vec<T>{} + x;
}

// One rounding where the instruction set has FMA: the compiler contracts the expression.
template <class V>
ANOMEM_INLINE V multiply_add(V a, V b, V c) {
  return a * b + c;
}

ANOMEM_INLINE vec<float> square_root(vec<float> x) {
#if ANOMEM_X86_VARIANTS && ANOMEM_VECTOR_BYTES == 64
  return vec<float>(_mm512_maskz_sqrt_ps(0xffff, x));  // the plain one warns in GCC 12
#elif ANOMEM_X86_VARIANTS && ANOMEM_VECTOR_BYTES == 32
  return vec<float>(_mm256_sqrt_ps(x));
#elif ANOMEM_X86_VARIANTS
  return vec<float>(_mm_sqrt_ps(x));
#else
  for (int i = 0; i < kLanes<float>; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// NaN in `b` is kept; NaN in `a` is not.
template <class V>
ANOMEM_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}
template <class V>
ANOMEM_INLINE V smaller(V a, V b) {
  return a < b ? a : b;
}

#if ANOMEM_X86_VARIANTS && ANOMEM_VECTOR_BYTES == 64
// One instruction each, where GCC 12 makes a comparison and a choice.
ANOMEM_INLINE vec<float> larger(vec<float> a, vec<float> b) {
  return vec<float>(_mm512_maskz_max_ps(0xffff, __m512(a), __m512(b)));
}
ANOMEM_INLINE vec<float> smaller(vec<float> a, vec<float> b) {
  return vec<float>(_mm512_maskz_min_ps(0xffff, __m512(a), __m512(b)));
}
#endif

// 0, 1, 2, …
template <class T>
ANOMEM_INLINE typename Simd<T>::bits lane_index() {
  typename Simd<T>::bits index;
  for (int i = 0; i < kLanes<T>; ++i) index[i] = i;
  return index;
}

// Lane i of the result is lane (i + kBy) mod kLanes of x.
template <class T, int kBy>
ANOMEM_INLINE vec<T> rotate(vec<T> x) {
#if defined(__clang__)
  T lane[kLanes<T>], rotated[kLanes<T>];
  store(lane, x);
  for (int i = 0; i < kLanes<T>; ++i) rotated[i] = lane[(i + kBy) % kLanes<T>];
  return load(rotated);
#else
  return __builtin_shuffle(x, (lane_index<T>() + kBy) & (kLanes<T> - 1));
#endif
}

// Lane i of the result is lane index[i] of a and b, one after the other.
template <class V, class Index>
ANOMEM_INLINE V pick(V a, V b, Index index) {
#if defined(__clang__)
  constexpr int lanes = sizeof index / sizeof index[0];
  V picked;
  for (int i = 0; i < lanes; ++i) picked[i] = index[i] < lanes ? a[index[i]] : b[index[i] - lanes];
  return picked;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// Lane j of row i and lane i of row j change places.
template <class T, int kBy = kLanes<T> / 2>
ANOMEM_INLINE void transpose_square(vec<T> (&rows)[kLanes<T>]) {
  if constexpr (kBy > 0) {
    const auto lane = lane_index<T>();
    const auto odd = (lane & kBy) != 0;  // halves of blocks of 2 · kBy lanes
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i)
      if ((i & kBy) == 0) {
        const vec<T> first = rows[i], second = rows[i + kBy];
        rows[i] = odd ? rotate<T, kLanes<T> - kBy>(second) : first;
        rows[i + kBy] = odd ? second : rotate<T, kBy>(first);
      }
    transpose_square<T, kBy / 2>(rows);
  }
}

// Sum and maximum over the lanes, in a fixed order: halves are folded onto each other. Both keep a NaN.
template <class T, int kHalf = kLanes<T> / 2>
ANOMEM_INLINE T sum_lanes(vec<T> x) {
  if constexpr (kHalf == 0) return x[0];
  else return sum_lanes<T, kHalf / 2>(x + rotate<T, kHalf>(x));
}

template <class T, int kHalf = kLanes<T> / 2>
ANOMEM_INLINE T max_lanes(vec<T> x) {
  if constexpr (kHalf == 0) {
    return x[0];
  } else {
    const vec<T> other = rotate<T, kHalf>(x);
    return max_lanes<T, kHalf / 2>((x > other) | (x != x) ? x : other);
  }
}

// a · b, in two running sums.
template <class S>
ANOMEM_INLINE accumulator_t<S> dot_product(const S* a, const S* b, int64_t count) {
  using T = accumulator_t<S>;
  constexpr int64_t step = kLanes<T>;
  vec<T> even{}, odd{};  // not an array: it would be indexed in memory
  int64_t p = 0;
  for (; p + 2 * step <= count; p += 2 * step) {
    even = multiply_add(load(a + p), load(b + p), even);
    odd = multiply_add(load(a + p + step), load(b + p + step), odd);
  }
  if (p + step <= count) {
    even = multiply_add(load(a + p), load(b + p), even);
    p += step;
  }
  if (p < count) even += load_first(a + p, count - p) * load_first(b + p, count - p);
  return sum_lanes<T>(even + odd);
}

template <class T>
constexpr T kLog2e = T{1.4426950408889634074};

// 2^x for x = n + f, n the nearest integer. Adding 1.5·2^(mantissa bits) leaves n in the low bits of the sum; a shift
// moves it into the exponent. 2^f is a Chebyshev fit on [-1/2, 1/2].
template <class T>
constexpr T kRounding = sizeof(T) == 4 ? T{12582912} : T{6755399441055744};

// 2^f for f in [-1/2, 1/2].
ANOMEM_INLINE vec<float> exp2_of_fraction(vec<float> f) {
  constexpr float coefficients[] = {
      1.54614446986e-4f, 1.340042818e-3f, 9.618056679e-3f, 5.550327227e-2f, 2.402265092e-1f, 6.931472067e-1f, 1.0f};
  vec<float> power = broadcast(coefficients[0]);
  for (int i = 1; i < 7; ++i) power = multiply_add(power, f, broadcast(coefficients[i]));
  return power;
}

// 2^f · 2^(n + bias), n in the low bits of `shifted`. If n + bias is out of range the result is arbitrary, and the
// caller drops it; unsigned words wrap around without undefined behaviour.
ANOMEM_INLINE vec<float> exp2_of_parts(vec<float> f, vec<float> shifted, int bias) {
  const vec<float> power = exp2_of_fraction(f);
  const auto n = reinterpret_cast<Simd<float>::words>(shifted);
  return power * reinterpret_cast<vec<float>>((n << 23) + (static_cast<uint32_t>(127 + bias) << 23));
}

ANOMEM_INLINE vec<double> exp2_of_parts(vec<double> f, vec<double> shifted, int bias) {
  constexpr double coefficients[] = {4.455817908336064493e-10, 7.0741942972885210056e-9, 1.0178057087733941105e-7,
                                     1.3215432535912376166e-6, 1.5252733841556772589e-5, 1.5403530463724354209e-4,
                                     1.3333558146406470697e-3, 9.6181291075872566681e-3, 5.5504108664821627039e-2,
                                     2.4022650695910159567e-1, 6.9314718055994530925e-1, 1.0};
  vec<double> power = broadcast(coefficients[0]);
  for (int i = 1; i < 12; ++i) power = multiply_add(power, f, broadcast(coefficients[i]));
  const auto n = reinterpret_cast<Simd<double>::words>(shifted);
  return power * reinterpret_cast<vec<double>>((n << 52) + (static_cast<uint64_t>(1023 + bias) << 52));
}

// 2^x for x in [-126, 127] (float) or [-1022, 1023] (double), to about one unit in the last place; NaN stays NaN.
template <class V>
ANOMEM_INLINE V exp2_in_range(V x) {
  using T = std::remove_reference_t<decltype(x[0])>;
  const V shifted = x + kRounding<T>;
  return exp2_of_parts(x - (shifted - kRounding<T>), shifted, 0);
}

// 2^(x · (factor + rest) − shift), in the same range. The shift goes into the exponent alone: subtracting it from the
// product would round away the product's last digits.
template <class V>
ANOMEM_INLINE V exp2_of_product(V x, V factor, V rest, int shift) {
  using T = std::remove_reference_t<decltype(x[0])>;
  const V shifted = multiply_add(x, factor, V{} + kRounding<T>);
  const V f = multiply_add(x, rest, multiply_add(x, factor, kRounding<T> - shifted));
  return exp2_of_parts(f, shifted, -shift);
}

template <class T>
constexpr T kExp2Lowest = sizeof(T) == 4 ? T{-126} : T{-1022};

// 2^x for x ≤ 127 (1023): 0 below the smallest normal number, -inf included; NaN stays NaN.
template <class V>
ANOMEM_INLINE V exp2_or_zero(V x) {
  using T = std::remove_reference_t<decltype(x[0])>;
  const V lowest = V{} + kExp2Lowest<T>;
  const auto below = x < lowest;
  return below ? V{} : exp2_in_range(below ? lowest : x);
}

#if ANOMEM_X86_VARIANTS && ANOMEM_VECTOR_BYTES == 64
// The same numbers in two thirds of the instructions.
ANOMEM_INLINE vec<float> exp2_or_zero(vec<float> x) {
  const vec<float> n = vec<float>(_mm512_maskz_roundscale_ps(0xffff, __m512(x), _MM_FROUND_TO_NEAREST_INT));
  const __mmask16 kept = _mm512_cmp_ps_mask(__m512(x), _mm512_set1_ps(kExp2Lowest<float>), _CMP_NLT_UQ);
  return vec<float>(_mm512_maskz_scalef_ps(kept, __m512(exp2_of_fraction(x - n)), __m512(n)));
}
#endif

template <class V>
ANOMEM_INLINE V exp_or_zero(V x) {
  return exp2_or_zero(x * kLog2e<std::remove_reference_t<decltype(x[0])>>);
}

// Scratch memory (scratch.h) of elements, given back at the end of its scope.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(take_scratch(round_up(count * static_cast<int64_t>(sizeof(T)) + 64, 64)))) {}
  ~Buffer() { give_scratch(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

}  // namespace anomem::cpu::ANOMEM_ISA
