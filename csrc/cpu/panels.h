// A memory's keys and values, normalised and packed once per call and then shared by all chunks of queries.
#pragma once

#include "cpu/buffer.h"
#include "cpu/gemm.h"
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

// Packed factors of the four products with the memory. Without separate values two of them serve all four.
template <class S>
class Panels {
 public:
  using T = accumulator_t<S>;

  // `backward`: also those that only the gradient needs.
  Panels(const Memory& memory, bool backward)
      : keys_(memory.prototypes * memory.features),
        keys_transposed_(packed_size<T>(memory.features, memory.prototypes)),
        keys_as_they_lie_(memory.values == nullptr || backward ? packed_size<T>(memory.prototypes, memory.features) : 0),
        values_(memory.values == nullptr ? 0 : packed_size<T>(memory.prototypes, memory.value_features)),
        values_transposed_(memory.values == nullptr || !backward
                               ? 0
                               : packed_size<T>(memory.value_features, memory.prototypes)),
        tied_(memory.values == nullptr) {
    const int64_t m = memory.prototypes, d = memory.features, dv = memory.value_features;
    normalized_keys<S>(memory, keys_.data());
    pack_transposed(keys_.data(), d, m, d, keys_transposed_.data());
    if (tied_ || backward) pack(keys_.data(), d, m, d, keys_as_they_lie_.data());
    if (tied_) return;
    const S* values = static_cast<const S*>(memory.values);
    pack(values, dv, m, dv, values_.data());
    if (backward) pack_transposed(values, dv, m, dv, values_transposed_.data());
  }

  const T* keys_transposed() const { return keys_transposed_.data(); }  // d × M: scores = Q Kᵀ
  const T* keys() const { return keys_as_they_lie_.data(); }            // M × d: dQ = dS K
  const T* values() const { return tied_ ? keys() : values_.data(); }   // M × dv: out = P V
  const T* values_transposed() const {                                  // dv × M: dP = dO Vᵀ
    return tied_ ? keys_transposed() : values_transposed_.data();
  }

 private:
  Buffer<T> keys_, keys_transposed_, keys_as_they_lie_, values_, values_transposed_;
  bool tied_;
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
