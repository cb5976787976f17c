// A memory's keys and values, normalised and packed once per call and then shared by all chunks of queries.
#pragma once

#include "cpu/buffer.h"
#include "cpu/factor_rows.h"
#include "cpu/memory.h"
#include "cpu/product.h"
#include "cpu/rows.h"

namespace anomem::cpu::ANOMEM_ISA {

// norm(K) [M, d], widened.
template <class S>
void normalized_keys(const Memory& memory, accumulator_t<S>* to) {
  const S* keys = static_cast<const S*>(memory.keys);
  for (int64_t m = 0; m < memory.prototypes; ++m)
    normalize_row(keys + m * memory.features, memory.features, memory.normalize, to + m * memory.features);
}

// What a read multiplies with. R: what its values are rounded to. Keys are not: a softmax shows every rounding of its
// scores.
template <class S, class R = accumulator_t<S>>
class ReadPanels {
 public:
  using T = accumulator_t<S>;

  explicit ReadPanels(const Memory& memory)
      : keys_transposed_(packed_size<T>(memory.features, memory.prototypes)),
        values_(packed_size<T>(factors<R>(memory.prototypes), memory.value_features)) {
    const int64_t m = memory.prototypes, d = memory.features, dv = memory.value_features;
    Buffer<T> keys(m * d);
    normalized_keys<S>(memory, keys.data());
    pack_transposed(keys.data(), d, m, d, keys_transposed_.data());
    FactorRows<R> rows(m, dv);
    const S* values = static_cast<const S*>(memory.values);
    for (int64_t j = 0; j < m; ++j)
      if (values == nullptr) rows.set(j, keys.data() + j * d, T(1));
      else rows.set(j, values + j * dv, T(1));
    rows.pack_rows(m, values_.data());
  }

  const T* keys_transposed() const { return keys_transposed_.data(); }  // d × M: scores = Q Kᵀ
  const factor_t<R>* values() const { return values_.data(); }          // M × dv: out = P V

 private:
  Buffer<T> keys_transposed_;
  Buffer<factor_t<R>> values_;
};

// What the gradient of a read multiplies with. Of rows that are rounded the mean is taken off first: the softmax's
// gradient does not see it, and prototypes that have nearly become one differ in the digits behind it.
template <class S>
class GradientPanels {
 public:
  using T = accumulator_t<S>;
  using F = factor_t<S>;

  explicit GradientPanels(const Memory& memory)
      : shared_(memory.values == nullptr && !in_pairs<S>),
        keys_transposed_(packed_size<T>(memory.features, memory.prototypes)),
        keys_(packed_size<T>(factors<S>(memory.prototypes), memory.features)),
        values_transposed_(shared_ ? 0 : packed_size<T>(factors<S>(memory.value_features), memory.prototypes)),
        mean_(memory.features) {
    const int64_t m = memory.prototypes, d = memory.features, dv = memory.value_features;
    Buffer<T> keys(m * d);
    normalized_keys<S>(memory, keys.data());
    pack_transposed(keys.data(), d, m, d, keys_transposed_.data());
    FactorRows<S> rows(m, d);
    set_centred(keys.data(), m, d, mean_.data(), rows);
    rows.pack_rows(m, keys_.data());
    if (shared_) return;
    if (memory.values == nullptr) {
      rows.pack_columns(m, values_transposed_.data());
      return;
    }
    Buffer<T> values(m * dv), mean(dv);
    scaled_copy(static_cast<const S*>(memory.values), m * dv, T(1), values.data());
    FactorRows<S> value_rows(m, dv);
    set_centred(values.data(), m, dv, mean.data(), value_rows);
    value_rows.pack_columns(m, values_transposed_.data());
  }

  const T* keys_transposed() const { return keys_transposed_.data(); }  // d × M: scores = Q Kᵀ
  const F* keys() const { return keys_.data(); }                        // M × d: dQ = dS K
  const T* keys_mean() const { return mean_.data(); }                   // [d], what was taken off them, in pairs
  const F* values_transposed() const {                                  // dv × M: dP = dO Vᵀ
    if constexpr (!in_pairs<S>)
      if (shared_) return keys_transposed();
    return values_transposed_.data();
  }

 private:
  static void set_centred(T* source, int64_t m, int64_t n, T* mean, FactorRows<S>& rows) {
    if constexpr (in_pairs<S>) {
      std::memset(mean, 0, n * sizeof(T));
      for (int64_t j = 0; j < m; ++j) add_scaled(source + j * n, n, T(1) / T(m), mean);
      for (int64_t j = 0; j < m; ++j) add_scaled(mean, n, T(-1), source + j * n);
    }
    for (int64_t j = 0; j < m; ++j) rows.set(j, source + j * n, T(1));
  }

  bool shared_;
  Buffer<T> keys_transposed_;
  Buffer<F> keys_, values_transposed_;
  Buffer<T> mean_;
};

// Normalised and widened query rows, in place where nothing is to be done, and the factors their gradient needs.
template <class S>
class QueryRows {
 public:
  using T = accumulator_t<S>;

  QueryRows(int64_t rows, int64_t d, Normalize how)
      : d_(d), how_(how), copy_(rows * d), factors_(rows), in_place_(std::is_same_v<S, T> && how == Normalize::none) {}

  void load(const S* query, int64_t row, int64_t count) {
    if constexpr (std::is_same_v<S, T>) {
      if (in_place_) {
        data_ = query;
        row_ = row;
        return;
      }
    }
    for (int64_t r = 0; r < count; ++r) factors_[r] = normalize_row(query + r * row, d_, how_, copy_.data() + r * d_);
    data_ = copy_.data();
    row_ = d_;
  }

  const T* data() const { return data_; }
  int64_t row() const { return row_; }
  const T* operator[](int64_t r) const { return data_ + r * row_; }
  T factor(int64_t r) const { return in_place_ ? T(1) : factors_[r]; }

 private:
  int64_t d_;
  Normalize how_;
  Buffer<T> copy_, factors_;
  bool in_place_;
  const T* data_ = nullptr;
  int64_t row_ = 0;
};

}  // namespace anomem::cpu::ANOMEM_ISA
