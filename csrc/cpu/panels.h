// A memory's keys and values, normalised and packed once per call and then shared by all chunks of queries.
#pragma once

#include "cpu/factors.h"
#include "cpu/memory.h"
#include "cpu/product.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

namespace anomem::cpu::ANOMEM_ISA {

// norm(K) [M, d], widened.
template <class S>
void normalized_keys(const Memory& memory, accumulator_t<S>* to) {
  const S* keys = static_cast<const S*>(memory.keys);
  for (int64_t m = 0; m < memory.prototypes; ++m)
    normalize_row(keys + m * memory.features, memory.features, memory.normalize, to + m * memory.features);
}

// Width of the panels of a call's factors.
template <class T>
inline int64_t widest_panel(bool library) {
  return library ? kLibraryPanel : Block<T>::kWidth;
}

// The parts of a packed right factor [k, n], made once for all products that take them in tiles (tile_product.h).
template <class F>
class PanelParts {
 public:
  PanelParts(int64_t k, int64_t n, bool library)
      : k_(k),
        n_(round_up(n, Block<sum_t<F>>::kWidth)),
        used_(kSplits && std::is_same_v<F, float> && library && splits_products()),
        data_(used_ ? parts_size(n_, k) : 0) {}

  void make(const F* packed) {
    if constexpr (std::is_same_v<F, float>)
      for (int64_t column = 0; used_ && column < n_; column += kLibraryPanel) {
        const int64_t width = panel_width<float>(column, n_, kLibraryPanel);
        used_ = split_right(packed + column * k_, width, k_, width, data_.data() + parts_size(column, k_));
      }
  }

  // Null where there are none.
  const Bfloat16* data() const { return used_ ? data_.data() : nullptr; }

 private:
  int64_t k_, n_;
  bool used_;
  Buffer<Bfloat16> data_;
};

// The parts of a left factor [m, k] of float32 that several products take in tiles.
template <class F>
class LeftParts {
 public:
  LeftParts(int64_t m, int64_t k)
      : used_(kSplits && std::is_same_v<F, float> && splits_products()), data_(used_ ? parts_size(m, k) : 0) {}

  void make(const F* a, int64_t stride, int64_t m, int64_t k) {
    if constexpr (std::is_same_v<F, float>) fits_ = used_ && split_left(a, stride, m, k, data_.data());
  }

  // Null where there are none.
  const Bfloat16* data() const { return fits_ ? data_.data() : nullptr; }

 private:
  bool used_, fits_ = false;
  Buffer<Bfloat16> data_;
};

// The right factors of a retrieval, packed for the library's products if `library`. Values are rounded to factors of R.
// Keys are not rounded: a softmax amplifies the rounding of its scores.
template <class S, class R = accumulator_t<S>>
class ReadPanels {
 public:
  using T = accumulator_t<S>;

  // `in_parts`: whether parts are made of them, where products are in tiles.
  ReadPanels(const Memory& memory, bool library, bool in_parts = true)
      : keys_transposed_(packed_size<T>(memory.features, memory.prototypes)),
        values_(packed_size<T>(factors<R>(memory.prototypes), memory.value_features)),
        key_parts_(memory.features, memory.prototypes, library && in_parts),
        value_parts_(memory.prototypes, memory.value_features, library && in_parts) {
    const int64_t m = memory.prototypes, d = memory.features, dv = memory.value_features;
    Buffer<T> keys(m * d);
    normalized_keys<S>(memory, keys.data());
    const int64_t widest = widest_panel<T>(library);
    pack_transposed(keys.data(), d, m, d, keys_transposed_.data(), 0, widest);
    FactorRows<R> rows(m, dv);
    const S* values = static_cast<const S*>(memory.values.data);
    for (int64_t j = 0; j < m; ++j)
      if (memory.tied()) rows.set(j, keys.data() + j * d, T{1});
      else rows.set(j, values + j * dv, T{1});
    rows.pack_rows(m, values_.data(), 0, 0, widest);
    key_parts_.make(keys_transposed_.data());
    value_parts_.make(values_.data());
  }

  // d × M: scores = Q Kᵀ. Which product a row gets in tiles depends on the rows beside it (tile_product.h).
  RightFactor<T> keys_transposed(bool in_tiles = true) const {
    return {keys_transposed_.data(), key_parts_.data(), in_tiles};
  }
  // M × dv: out = P V.
  RightFactor<factor_t<R>> values() const { return {values_.data(), value_parts_.data()}; }

 private:
  Buffer<T> keys_transposed_;
  Buffer<factor_t<R>> values_;
  PanelParts<T> key_parts_;
  PanelParts<factor_t<R>> value_parts_;
};

// The right factors of a retrieval's gradient. The mean of rows is subtracted before they are rounded to bfloat16. The
// softmax's gradient does not depend on it, and nearly identical prototypes differ only in low digits, which rounding
// would lose.
template <class S>
class GradientPanels {
 public:
  using T = accumulator_t<S>;
  using F = factor_t<S>;

  // `in_parts` as in ReadPanels.
  GradientPanels(const Memory& memory, bool in_parts)
      : tied_(memory.tied()),
        shared_(memory.tied() && !kInPairs<S>),
        keys_transposed_(packed_size<T>(memory.features, memory.prototypes)),
        keys_(packed_size<T>(factors<S>(memory.prototypes), memory.features)),
        values_transposed_(shared_ ? 0 : packed_size<T>(factors<S>(memory.value_features), memory.prototypes)),
        transposed_key_parts_(memory.features, memory.prototypes, memory.library && in_parts),
        key_parts_(memory.prototypes, memory.features, memory.library && in_parts),
        value_parts_(memory.value_features, memory.prototypes, memory.library && in_parts && !shared_),
        mean_(memory.features),
        values_mean_(memory.tied() ? 0 : memory.value_features) {
    const int64_t m = memory.prototypes, d = memory.features, dv = memory.value_features;
    Buffer<T> keys(m * d);
    normalized_keys<S>(memory, keys.data());
    const int64_t widest = widest_panel<T>(memory.library);
    pack_transposed(keys.data(), d, m, d, keys_transposed_.data(), 0, widest);
    FactorRows<S> rows(m, d);
    set_centred(keys.data(), m, d, mean_.data(), rows);
    rows.pack_rows(m, keys_.data(), 0, 0, widest);
    transposed_key_parts_.make(keys_transposed_.data());
    key_parts_.make(keys_.data());
    if (shared_) return;
    if (memory.tied()) {
      rows.pack_columns(m, values_transposed_.data(), 0, widest);
      return;
    }
    Buffer<T> values(m * dv);
    scaled_copy(static_cast<const S*>(memory.values.data), m * dv, T{1}, values.data());
    FactorRows<S> value_rows(m, dv);
    set_centred(values.data(), m, dv, values_mean_.data(), value_rows);
    value_rows.pack_columns(m, values_transposed_.data(), 0, widest);
    value_parts_.make(values_transposed_.data());
  }

  // d × M: scores = Q Kᵀ.
  RightFactor<T> keys_transposed(bool in_tiles = true) const {
    return {keys_transposed_.data(), transposed_key_parts_.data(), in_tiles};
  }
  // M × d: dQ = dS K.
  RightFactor<F> keys() const { return {keys_.data(), key_parts_.data()}; }
  // [d], subtracted from the keys in pairs.
  const T* keys_mean() const { return mean_.data(); }
  // [dv], subtracted from the values in pairs.
  const T* values_mean() const { return tied_ ? mean_.data() : values_mean_.data(); }
  // dv × M: dP = dO Vᵀ.
  RightFactor<F> values_transposed() const {
    if constexpr (!kInPairs<S>)
      if (shared_) return keys_transposed();
    return {values_transposed_.data(), value_parts_.data()};
  }

 private:
  static void set_centred(T* source, int64_t m, int64_t n, T* mean, FactorRows<S>& rows) {
    if constexpr (kInPairs<S>) {
      std::memset(mean, 0, n * sizeof(T));
      for (int64_t j = 0; j < m; ++j) add_scaled(source + j * n, n, T{1} / static_cast<T>(m), mean);
      for (int64_t j = 0; j < m; ++j) add_scaled(mean, n, T{-1}, source + j * n);
    }
    for (int64_t j = 0; j < m; ++j) rows.set(j, source + j * n, T{1});
  }

  bool tied_, shared_;
  Buffer<T> keys_transposed_;
  Buffer<F> keys_, values_transposed_;
  PanelParts<T> transposed_key_parts_;
  PanelParts<F> key_parts_, value_parts_;
  Buffer<T> mean_, values_mean_;
};

// Normalised and widened query rows, and the factors their gradient needs. Rows that need neither are not copied.
template <class S>
class QueryRows {
 public:
  using T = accumulator_t<S>;

  QueryRows(int64_t rows, int64_t d, Normalize how) : rows_(rows), d_(d), how_(how), copy_(rows * d), factors_(rows) {}

  // The rows from `count` on are zeros up to the end of the chunk.
  void load(const S* query, int64_t stride, int64_t count) {
    in_place_ = std::is_same_v<S, T> && how_ == Normalize::kNone && count == rows_;
    if constexpr (std::is_same_v<S, T>) {
      if (in_place_) {
        data_ = query;
        stride_ = stride;
        return;
      }
    }
    for (int64_t r = 0; r < count; ++r)
      factors_[r] = normalize_row(query + r * stride, d_, how_, copy_.data() + r * d_);
    std::memset(copy_.data() + count * d_, 0, (rows_ - count) * d_ * sizeof(T));
    data_ = copy_.data();
    stride_ = d_;
  }

  const T* data() const { return data_; }
  int64_t stride() const { return stride_; }
  const T* operator[](int64_t r) const { return data_ + r * stride_; }
  T factor(int64_t r) const { return in_place_ ? T{1} : factors_[r]; }

 private:
  int64_t rows_, d_;
  Normalize how_;
  Buffer<T> copy_, factors_;
  bool in_place_ = false;
  const T* data_ = nullptr;
  int64_t stride_ = 0;
};

}  // namespace anomem::cpu::ANOMEM_ISA
