// A memory's keys and values, normalised and packed once per call and then shared by all chunks of queries. Threads
// pack its prototypes block by block: of few queries this takes longer than their products.
#pragma once

#include "cpu/factors.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/product.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

namespace anomem::cpu::ANOMEM_ISA {

// Prototypes of a block: whole panels of any width.
constexpr int64_t kPrototypes = kLibraryPanel;

// Calls f(first, count, scratch) for every block of a memory's prototypes, in parallel. `Scratch` is made for each
// thread, from `arguments`.
template <class Scratch, class F, class... Arguments>
inline void for_blocks(int64_t prototypes, const F& f, const Arguments&... arguments) {
  parallel_ranges((prototypes + kPrototypes - 1) / kPrototypes, [&](int64_t begin, int64_t end) {
    Scratch scratch(arguments...);
    for (int64_t first = begin * kPrototypes; first < prototypes && first < end * kPrototypes; first += kPrototypes)
      f(first, at_most(kPrototypes, prototypes - first), scratch);
  });
}

// norm(K) of a block [count, d], widened.
template <class S>
inline void normalized_keys(const Memory& memory, int64_t first, int64_t count, accumulator_t<S>* to) {
  const int64_t d = memory.features;
  const S* keys = static_cast<const S*>(memory.keys) + first * d;
  for (int64_t j = 0; j < count; ++j) normalize_row(keys + j * d, d, memory.normalize, to + j * d);
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
    if constexpr (std::is_same_v<F, float>) {
      if (!used_) return;
      const int64_t panels = (n_ + kLibraryPanel - 1) / kLibraryPanel;
      Buffer<int64_t> split(panels);
      parallel(panels, [&](int64_t panel) {
        const int64_t column = panel * kLibraryPanel, width = panel_width<float>(column, n_, kLibraryPanel);
        split[panel] = split_right(packed + column * k_, width, k_, width, data_.data() + parts_size(column, k_));
      });
      for (int64_t panel = 0; panel < panels; ++panel) used_ = used_ && split[panel];
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

// Scratch in which a block of prototypes is normalised and rounded.
template <class S>
struct PackedBlock {
  Buffer<accumulator_t<S>> wide;  // [kPrototypes, length]
  FactorRows<S> rows;

  explicit PackedBlock(int64_t length) : wide(kPrototypes * length), rows(kPrototypes, length) {}
};

// The right factors of a retrieval, packed for the library's products if `library`. Values are rounded to factors of R.
// Keys are not rounded: a softmax amplifies the rounding of its scores.
template <class S, class R = accumulator_t<S>>
class ReadPanels {
 public:
  using T = accumulator_t<S>;

  // `with_keys`: whether any scores are made of normalised keys. `in_parts`: whether parts are made of the factors,
  // where products are in tiles and several chunks read them.
  ReadPanels(const Memory& memory, bool library, bool in_parts = true, bool with_keys = true)
      : keys_transposed_(with_keys ? packed_size<T>(memory.features, memory.prototypes) : 0),
        values_(packed_size<T>(factors<R>(memory.prototypes), memory.value_features)),
        key_parts_(memory.features, memory.prototypes, library && in_parts && with_keys),
        value_parts_(memory.prototypes, memory.value_features, library && in_parts) {
    const int64_t m = memory.prototypes, d = memory.features, dv = memory.value_features;
    const int64_t widest = widest_panel<T>(library);
    const S* const values = static_cast<const S*>(memory.values.data);
    const auto pack_block = [&](int64_t first, int64_t count, Scratch& scratch) {
      const T* const keys = scratch.keys.data();
      if (with_keys || memory.tied()) normalized_keys<S>(memory, first, count, scratch.keys.data());
      if (with_keys) pack_transposed(keys, d, count, d, keys_transposed_.data() + first * d, 0, widest);
      for (int64_t j = 0; j < count; ++j)
        if (memory.tied()) scratch.rows.set(j, keys + j * d, T{1});
        else scratch.rows.set(j, values + (first + j) * dv, T{1});
      scratch.rows.pack_some_rows(count, first, m, values_.data(), widest);
    };
    for_blocks<Scratch>(m, pack_block, d, dv);
    if (with_keys) key_parts_.make(keys_transposed_.data());
    value_parts_.make(values_.data());
  }

  // d × M: scores = Q Kᵀ. Which product a row gets in tiles depends on the rows beside it (tile_product.h).
  RightFactor<T> keys_transposed(bool in_tiles = true) const {
    return {keys_transposed_.data(), key_parts_.data(), in_tiles};
  }
  // M × dv: out = P V.
  RightFactor<factor_t<R>> values() const { return {values_.data(), value_parts_.data()}; }

 private:
  struct Scratch {
    Buffer<T> keys;  // [kPrototypes, d]
    FactorRows<R> rows;

    Scratch(int64_t d, int64_t dv) : keys(kPrototypes * d), rows(kPrototypes, dv) {}
  };

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

  // `in_parts` and `with_keys` as in ReadPanels.
  GradientPanels(const Memory& memory, bool in_parts, bool with_keys)
      : tied_(memory.tied()),
        shared_(memory.tied() && !kInPairs<S>),
        keys_transposed_(with_keys ? packed_size<T>(memory.features, memory.prototypes) : 0),
        keys_(packed_size<T>(factors<S>(memory.prototypes), memory.features)),
        values_transposed_(shared_ ? 0 : packed_size<T>(factors<S>(memory.value_features), memory.prototypes)),
        transposed_key_parts_(memory.features, memory.prototypes, memory.library && in_parts && with_keys),
        key_parts_(memory.prototypes, memory.features, memory.library && in_parts),
        value_parts_(memory.value_features, memory.prototypes, memory.library && in_parts && !shared_),
        mean_(memory.features),
        values_mean_(memory.tied() ? 0 : memory.value_features) {
    const int64_t m = memory.prototypes, d = memory.features, dv = memory.value_features;
    const int64_t widest = widest_panel<T>(memory.library);
    const auto keys = [&](int64_t first, int64_t count, T* to) { normalized_keys<S>(memory, first, count, to); };
    set_mean(m, d, keys, mean_.data());
    const auto pack_keys = [&](int64_t first, int64_t count, PackedBlock<S>& block) {
      keys(first, count, block.wide.data());
      if (with_keys) pack_transposed(block.wide.data(), d, count, d, keys_transposed_.data() + first * d, 0, widest);
      set_centred(count, d, mean_.data(), block);
      block.rows.pack_some_rows(count, first, m, keys_.data(), widest);
      if (tied_ && !shared_)
        block.rows.pack_columns(count, values_transposed_.data() + first * factors<S>(d), 0, widest);
    };
    for_blocks<PackedBlock<S>>(m, pack_keys, d);
    if (with_keys) transposed_key_parts_.make(keys_transposed_.data());
    key_parts_.make(keys_.data());
    if (tied_) return;
    const auto values = [&](int64_t first, int64_t count, T* to) {
      scaled_copy(static_cast<const S*>(memory.values.data) + first * dv, count * dv, T{1}, to);
    };
    set_mean(m, dv, values, values_mean_.data());
    const auto pack_values = [&](int64_t first, int64_t count, PackedBlock<S>& block) {
      values(first, count, block.wide.data());
      set_centred(count, dv, values_mean_.data(), block);
      block.rows.pack_columns(count, values_transposed_.data() + first * factors<S>(dv), 0, widest);
    };
    for_blocks<PackedBlock<S>>(m, pack_values, dv);
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
  // The mean [n] of m rows, which `rows` writes by blocks; of pairs alone. Their sums are added in order, whatever the
  // threads.
  template <class Rows>
  static void set_mean(int64_t m, int64_t n, const Rows& rows, T* mean) {
    if constexpr (kInPairs<S>) {
      Buffer<T> sums((m + kPrototypes - 1) / kPrototypes * n);
      const auto sum_block = [&](int64_t first, int64_t count, Buffer<T>& block) {
        rows(first, count, block.data());
        T* const sum = sums.data() + first / kPrototypes * n;
        std::memset(sum, 0, n * sizeof(T));
        for (int64_t j = 0; j < count; ++j) add_scaled(block.data() + j * n, n, T{1} / static_cast<T>(m), sum);
      };
      for_blocks<Buffer<T>>(m, sum_block, kPrototypes * n);
      std::memset(mean, 0, n * sizeof(T));
      for (int64_t first = 0; first < m; first += kPrototypes)
        add_scaled(sums.data() + first / kPrototypes * n, n, T{1}, mean);
    }
  }

  static void set_centred(int64_t count, int64_t n, const T* mean, PackedBlock<S>& block) {
    for (int64_t j = 0; j < count; ++j) {
      T* const row = block.wide.data() + j * n;
      if constexpr (kInPairs<S>) add_scaled(mean, n, T{-1}, row);
      block.rows.set(j, row, T{1});
    }
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
