// Retrieval in chunks of query rows. A chunk's scores stay in the second-level cache between the product that makes
// them and the product that reads them; the backward pass makes them again. The gradients are derived in
// anomem/reference/retrieve.py.
#pragma once

#include <memory>

#include "cpu/factors.h"
#include "cpu/panels.h"
#include "cpu/parallel.h"
#include "cpu/product.h"
#include "cpu/raw_scores.h"
#include "cpu/retrieve.h"
#include "cpu/retrieve_blocks.h"
#include "cpu/retrieve_sums.h"
#include "cpu/softmax.h"

namespace anomem::cpu::ANOMEM_ISA {

// The elements in which a row of weights reaches the product with the values.
template <class S>
using kept_source_t = std::conditional_t<kInPairs<S>, S, accumulator_t<S>>;

// Whole panels of a row: no further element is read.
template <class From, class S>
inline void keep_weights(const From* weights, int64_t m, S* to) {
  const int64_t width = round_up(m, Block<accumulator_t<S>>::kWidth);
  if constexpr (std::is_same_v<From, S>) std::memcpy(to, weights, width * sizeof(S));
  else scaled_copy(weights, width, From{1}, to);
}

// Shrinkage decides by the last bit of a weight, in both passes alike. Their chunks differ, so its scores come from
// products in which a row does not depend on the others.
inline bool decides_by_bits(const Shrinkage& shrinkage) { return shrinkage.threshold != 0; }

inline bool takes_raw_scores(const Memory& memory, const Shrinkage& shrinkage) {
  return memory.library && !decides_by_bits(shrinkage);
}

template <class S>
void compute(const RetrieveForward& a) {
  using T = accumulator_t<S>;
  const int64_t m = a.memory.prototypes, d = a.memory.features, dv = a.memory.value_features, n = a.query.count;
  const bool in_blocks = !a.shrinkage.entropy && a.kept.of_blocks;
  const int64_t rows = in_blocks ? rows_in_blocks(n) : chunk_rows(n, m, a.memory.library);
  const RawKeys<S> raw_keys(a.memory, takes_raw_scores(a.memory, a.shrinkage));
  const ReadPanels<S, S> panels(a.memory, a.memory.library, !in_blocks && n > 2 * rows,
                                !all_are_raw(raw_keys, a.query, a.memory));
  const int64_t score_stride = padded_stride<T>(m), out_stride = padded_stride<T>(dv);
  const T beta = static_cast<T>(a.memory.beta), threshold = static_cast<T>(a.shrinkage.threshold);
  const int64_t kept_in_full = in_blocks ? 0 : a.kept.rows;
  parallel_ranges((n + rows - 1) / rows, [&](int64_t begin, int64_t end) {
    const LibraryProducts library(a.memory.library, kInPairs<S>);
    ForwardBlocks<S> blocks(a, panels, in_blocks ? rows : 0);
    QueryRows<S> query(rows, d, a.memory.normalize);
    RawQueries<S> raw(rows, d, raw_keys, a.memory.normalize);
    std::unique_ptr<Buffer<T>> scores, retrieved;  // of chunks that are not read in blocks
    Buffer<T> scale(rows);
    for (int64_t first = begin * rows; first < n && first < end * rows; first += rows) {
      const int64_t count = n - first < rows ? n - first : rows;
      // Weights are made where they are kept, unless they are converted, some rows of the chunk are not kept or
      // products write rows past the last. The backward pass has other chunks: every row counts.
      const int64_t left = kept_in_full - first, kept_rows = left < count ? left : count;
      S* const kept = left > 0 ? static_cast<S*>(a.kept.data) + first * kept_stride(m) : nullptr;
      const bool in_place = kept_rows == count && (!a.memory.library || count == rows);
      const S* const source = static_cast<const S*>(a.query.data) + first * a.query.stride;
      query.load(source, a.query.stride, count);
      const bool is_raw = raw.take(source, a.query.stride, count, query);
      if (in_blocks && blocks.run(first, count, query, raw, is_raw)) continue;
      if (!scores) {
        scores = std::make_unique<Buffer<T>>(rows * score_stride);
        retrieved = std::make_unique<Buffer<T>>(rows * out_stride);
      }
      T* tile = scores->data();
      int64_t tile_stride = score_stride;
      if constexpr (std::is_same_v<S, T>)
        if (in_place) tile = kept, tile_stride = kept_stride(m);
      const int64_t height = a.memory.library ? rows : count;
      if (is_raw) raw.scores(count, 0, m, query, tile, tile_stride);
      else
        product(height, m, d, query.data(), query.stride(), 1, panels.keys_transposed(!decides_by_bits(a.shrinkage)),
                tile, tile_stride, false, a.memory.library);
      for (int64_t r = 0; r < count; ++r) {
        T* p = tile + r * tile_stride;
        if (first + rows + r < n) fetch_row(source + (rows + r) * a.query.stride, d);
        const RowSum<T> row =
            a.shrinkage.entropy && threshold == 0 ? exponentials<true>(p, m, beta) : exponentials(p, m, beta);
        static_cast<T*>(a.lse)[first + r] = row.lse;
        scale[r] = 1 / row.sum;
        if (threshold > 0) {
          scale_row(p, m, scale[r]);
          shrink_row(p, m, threshold, p);
          scale[r] = 1;
          if (a.shrinkage.entropy) static_cast<T*>(a.entropy)[first + r] = weights_entropy(p, m);
        } else if (a.shrinkage.entropy) {
          static_cast<T*>(a.entropy)[first + r] = std::log(row.sum) - row.weighted / row.sum;
        }
      }
      const bool pairs_in_place = kInPairs<S> && in_place;
      const LeftFactor<S> weights =
          in_rows<S>(tile, count, m, tile_stride, pairs_in_place ? reinterpret_cast<factor_t<S>*>(kept) : nullptr,
                     kept_stride(m) / 2);
      if (kept != nullptr && !pairs_in_place && tile == scores->data())
        for (int64_t r = 0; r < kept_rows; ++r)
          keep_weights(reinterpret_cast<const kept_source_t<S>*>(weights.data + r * weights.row_stride), m,
                       kept + r * kept_stride(m));
      S* const out = static_cast<S*>(a.out) + first * dv;
      T* read = retrieved->data();
      int64_t read_stride = out_stride;
      if constexpr (std::is_same_v<S, T>)
        if (height == count && dv == out_stride) read = out, read_stride = dv;  // whole panels
      product(height, dv, factors<S>(m), weights.data, weights.row_stride, weights.term_stride, panels.values(), read,
              read_stride, false, a.memory.library);
      for (int64_t r = 0; r < count; ++r) scaled_copy(read + r * read_stride, dv, scale[r], out + r * dv);
    }
  });
}

// Turns a product's scores into exp(beta s − lse) while they are in registers.
// - These are the softmax's weights up to the rounding of lse, which grows with lse. Each row is divided by its sum
//   later.
// - Rows with |lse| ≥ kLargest keep their scores. Such a row may have one weight of exactly 1, whose gradient must be
//   exactly 0. Rows with a NaN or infinite lse keep their scores too.
template <class T>
struct Exponentials {
  static constexpr T kLargest = 32;
  static bool keeps_scores(T lse) { return !(lse < kLargest && lse > -kLargest); }

  T beta;
  const T* lse;   // [count]
  int64_t count;  // of rows; what follows is padding

  template <class>
  ANOMEM_INLINE void operator()(int64_t i, T* to, vec<T> score) const {
    if (i >= count) return;
    store(to, keeps_scores(lse[i]) ? score : exp_or_zero(multiply_add(score, broadcast(beta), broadcast(-lse[i]))));
  }
};

// The gradient of one row of scores. `e` holds the softmax up to its sum. `g` holds dP = dO Vᵀ and becomes dS (without
// beta). Returns 1 / Σ e.
template <class W, class T>
inline T score_gradient(const W* e, T* g, int64_t m, T dlse) {
  constexpr int64_t step = kLanes<T>;
  vec<T> sums{}, products{}, more_sums{}, more_products{};
  const auto add = [&](int64_t j, int64_t count, vec<T>& sum, vec<T>& product) {
    const vec<T> weight = count < step ? keep_first<T>(load(e + j), count) : load(e + j);
    sum += weight;
    product = multiply_add(weight, load(g + j), product);
  };
  int64_t j = 0;
  for (; j + 2 * step <= m; j += 2 * step) {
    add(j, step, sums, products);
    add(j + step, step, more_sums, more_products);
  }
  for (; j < m; j += step) add(j, m - j < step ? m - j : step, sums, products);
  const T scale = 1 / sum_lanes<T>(sums + more_sums);
  const vec<T> mean_gradient = broadcast(sum_lanes<T>(products + more_products) * scale);
  for_vectors<T>(m,
                 [&](int64_t i, int64_t) { store(g + i, load(e + i) * scale * (load(g + i) - mean_gradient + dlse)); });
  return scale;
}

// The same where the weights are shrunk or their entropy is an output: `p` holds the softmax and becomes the weights
// that read the values.
template <class T>
inline void shrunk_gradient(T* p, T* g, int64_t m, T threshold, T dlse, T dentropy, T* softmax) {
  // Whole vectors: the zeros behind the last weight too, which the second loop and pairs of bfloat16 read.
  for_vectors<T>(m, [&](int64_t j, int64_t) { store(softmax + j, load(p + j)); });
  const T total = threshold > 0 ? shrink_row(softmax, m, threshold, p) : T{1};
  if (dentropy != 0) entropy_backward(p, m, dentropy, g);
  if (threshold > 0) shrink_backward(softmax, p, m, threshold, total, g);
  const vec<T> mean_gradient = broadcast(dot_product(softmax, g, m));
  for_vectors<T>(m,
                 [&](int64_t j, int64_t) { store(g + j, load(softmax + j) * (load(g + j) - mean_gradient + dlse)); });
}

constexpr int64_t kSummed = 16;  // prototypes per work item of the sum over slots

// The sums over slots, in order, of the rows first … first + count of a memory's gradient: sum [count, n]. A slot holds
// [M, stride] or, transposed, [n, stride].
template <class T>
inline void add_slots(const T* partial, int64_t slots, int64_t slot_size, int64_t stride, bool transposed,
                      int64_t first, int64_t count, int64_t n, T* sum) {
  if (!transposed) {
    for (int64_t r = 0; r < count; ++r)
      for_vectors<T>(n, [&](int64_t j, int64_t lanes) {
        vec<T> total{};
        for (int64_t slot = 0; slot < slots; ++slot)
          total += load_some(partial + slot * slot_size + (first + r) * stride + j, lanes);
        store_some(sum + r * n + j, total, lanes);
      });
    return;
  }
  for (int64_t j = 0; j < n; ++j)
    for (int64_t begin = 0; begin < count; begin += kLanes<T>) {
      vec<T> total{};  // a row is padded to whole vectors
      for (int64_t slot = 0; slot < slots; ++slot)
        total += load(partial + slot * slot_size + j * stride + first + begin);
      for (int64_t r = begin; r < count && r < begin + kLanes<T>; ++r) sum[r * n + j] = total[r - begin];
    }
}

// Memory for what a chunk of `rows` queries adds to the gradient of the memory: two products of two factors.
template <class S>
struct Tiles {
  using T = accumulator_t<S>;

  T *weights, *gradient;  // [rows, score_stride], beside each other
  ChunkColumns<S> columns;

  // `to`: plan.tiles elements.
  Tiles(T* to, const BackwardPlan& plan, const Memory& memory)
      : weights(to),
        gradient(weights + plan.rows * padded_stride<T>(memory.prototypes)),
        columns(gradient + plan.rows * padded_stride<T>(memory.prototypes), memory, plan.rows) {}
};

// The factors of those products. `weights` are those of the softmax up to their sums, by which dO is divided.
template <class S>
struct Summands {
  LeftFactor<S> weights, gradient;  // summed over their rows
  ChunkColumns<S> columns;          // with the library's products only
};

// Scratch of a thread of the backward pass, and its work on one chunk.
template <class S>
class BackwardChunk {
 public:
  using T = accumulator_t<S>;

  BackwardChunk(const RetrieveBackward& a, const GradientPanels<S>& panels, const RawKeys<S>& raw_keys, int64_t rows)
      : a_(a),
        panels_(panels),
        rows_(rows),
        m_(a.memory.prototypes),
        d_(a.memory.features),
        dv_(a.memory.value_features),
        score_stride_(padded_stride<T>(m_)),
        key_stride_(padded_stride<T>(d_)),
        query_(rows, d_, a.memory.normalize),
        raw_(rows, d_, raw_keys, a.memory.normalize),
        scaled_query_(as_they_are() ? 0 : rows, d_),
        dout_(rows, dv_),
        dout_scale_(rows),
        dquery_(rows * key_stride_),
        scores_(keeps_scores() ? rows * score_stride_ : 0),
        packed_(a.memory.library ? 0 : packed_size<T>(factors<S>(rows), d_ > dv_ ? d_ : dv_)),
        neighbours_(kInPairs<S> ? rows * score_stride_ / 2 : 0),
        softmax_(a.shrinkage.entropy ? score_stride_ : 0) {}

  // Writes dquery of the chunk. What it adds to dkeys and dvalues is left in `tiles`, which the summands point to.
  Summands<S> run(int64_t first, int64_t count, const Tiles<S>& tiles, double* dbeta) {
    const T beta = static_cast<T>(a_.memory.beta);
    const T* lse = static_cast<const T*>(a_.lse) + first;
    const T* dlse = static_cast<const T*>(a_.dlse.data);
    const T* dentropy = static_cast<const T*>(a_.dentropy.data);
    const S* const source = static_cast<const S*>(a_.query.data) + first * a_.query.stride;
    query_.load(source, a_.query.stride, count);
    const bool in_place = as_they_are() && count == rows_;
    if (!in_place) dout_.clear(count, rows_);
    for (int64_t r = 0; r < count; ++r) {
      set_dout(first, r, T{1}, !in_place);
      if (!as_they_are()) scaled_query_.set(r, query_[r], beta);
    }
    const bool library = a_.memory.library;
    const S* const kept =
        first + count <= a_.kept.rows ? static_cast<const S*>(a_.kept.data) + first * kept_stride(m_) : nullptr;
    const bool reads_kept = kReadsKept && kept != nullptr && (!std::is_same_v<S, T> || !library || count == rows_);
    const int64_t height = library ? rows_ : count;
    const Exponentials<T> exponential{beta, lse, count};
    const bool kept_alone = kept != nullptr && !keeps_scores();
    const bool raw = !kept_alone && raw_.take(source, a_.query.stride, count, query_);
    const auto score = [&](T* to, const auto& finish) {
      if (raw) {
        raw_.scores(count, 0, m_, query_, to, score_stride_);
        if constexpr (!std::is_same_v<std::decay_t<decltype(finish)>, Overwrite>)
          for (int64_t r = 0; r < count; ++r)
            for (int64_t j = 0; j < m_; j += kLanes<T>) {
              T* at = to + r * score_stride_ + j;
              finish.template operator()<T>(r, at, load(at));
            }
        return;
      }
      product_with(height, m_, d_, query_.data(), query_.stride(), 1,
                   panels_.keys_transposed(!decides_by_bits(a_.shrinkage)), to, score_stride_, finish, library);
    };
    if (keeps_scores()) score(scores_.data(), Overwrite());
    else if (kept == nullptr) score(tiles.weights, exponential);
    const factor_t<S>* const dout = in_place ? reinterpret_cast<const factor_t<S>*>(dout_row(first)) : dout_.data();
    product(height, m_, factors<S>(dv_), dout, dout_.stride(), 1, panels_.values_transposed(), tiles.gradient,
            score_stride_, false, library);
    for (int64_t r = 0; r < count; ++r) {
      T *const p = tiles.weights + r * score_stride_, *const g = tiles.gradient + r * score_stride_;
      const T row_dlse = a_.dlse.given ? dlse[first + r] : T{0};
      if (const int64_t next = first + rows_ + r; next < a_.query.count) {
        fetch_row(source + (rows_ + r) * a_.query.stride, d_);
        fetch_row(dout_row(next), dv_);
        if (next < a_.kept.rows) fetch_row(static_cast<const S*>(a_.kept.data) + next * kept_stride(m_), m_);
      }
      if (a_.shrinkage.entropy) {
        // As in the forward pass, to the last bit: a weight near the threshold must not change its side.
        std::memcpy(p, scores_.data() + r * score_stride_, score_stride_ * sizeof(T));
        scale_row(p, m_, 1 / exponentials(p, m_, beta).sum);
        shrunk_gradient(p, g, m_, static_cast<T>(a_.shrinkage.threshold), row_dlse,
                        a_.dentropy.given ? dentropy[first + r] : T{0}, softmax_.data());
      } else if (reads_kept) {
        set_dout(first, r, score_gradient(kept + r * kept_stride(m_), g, m_, row_dlse), !as_they_are());
      } else {
        if (kept != nullptr) {
          scaled_copy(kept + r * kept_stride(m_), round_up(m_, Block<T>::kWidth), T{1}, p);
        } else {
          if (keeps_scores())
            for_vectors<T>(m_, [&](int64_t j, int64_t) {
              exponential.template operator()<T>(r, p + j, load(scores_.data() + r * score_stride_ + j));
            });
          if (Exponentials<T>::keeps_scores(lse[r])) exponentials(p, m_, beta);
        }
        set_dout(first, r, score_gradient(p, g, m_, row_dlse), !as_they_are());
      }
      if (dbeta != nullptr) *dbeta += dot_product(scores_.data() + r * score_stride_, g, m_);
    }
    const LeftFactor<S> across = in_rows<S>(tiles.gradient, count, m_, score_stride_, neighbours_.data());
    product(height, d_, factors<S>(m_), across.data, across.row_stride, across.term_stride, panels_.keys(),
            dquery_.data(), key_stride_, false, library);
    for (int64_t r = 0; r < count; ++r) {
      T* row = dquery_.data() + r * key_stride_;
      // The packed keys lack their mean. A row of dS sums to dlse, so the mean's part of dQ is dlse · mean.
      if (kInPairs<S> && a_.dlse.given) add_scaled(panels_.keys_mean(), d_, dlse[first + r], row);
      normalize_row_backward(row, query_[r], query_.factor(r), beta, d_, a_.memory.normalize,
                             static_cast<S*>(a_.dquery) + (first + r) * d_);
    }
    if (as_they_are()) {
      if constexpr (std::is_same_v<S, T>) {
        transpose_scaled(dout_row(first), dv_, count, dv_, rows_, tiles.columns.dout, tiles.columns.stride,
                         [&](int64_t r, vec<T> x) ANOMEM_ALWAYS { return x * dout_scale_[r]; });
        transpose_scaled(query_.data(), query_.stride(), count, d_, rows_, tiles.columns.query, tiles.columns.stride,
                         [&](int64_t, vec<T> x) ANOMEM_ALWAYS { return x * beta; });
      }
    } else if (library) {
      dout_.transpose(count, rows_, tiles.columns.dout, tiles.columns.stride);
      scaled_query_.transpose(count, rows_, tiles.columns.query, tiles.columns.stride);
    }
    return {columns_of_weights(tiles.weights, reads_kept ? kept : nullptr, count), columns(tiles.gradient, count),
            tiles.columns};
  }

  // Adds what `run` left to the sums of dkeys and dvalues, which BackwardPlan lays out; for a tied memory they are the
  // same. The last chunk that ran: its rows are packed here.
  void add(const Summands<S>& chunk, int64_t count, bool fresh, T* dkeys, T* dvalues) {
    if (a_.memory.library) return add_transposed(a_.memory, chunk, rows_, 0, m_, fresh, dkeys, dvalues);
    // dvalues [M, padded dv] += Pᵀ dO, dkeys [M, padded d] += dSᵀ Q.
    const int64_t terms = factors<S>(count);
    dout_.pack_rows(count, packed_.data());
    product(m_, dv_, terms, chunk.weights.data, chunk.weights.row_stride, chunk.weights.term_stride, packed_.data(),
            dvalues, padded_stride<T>(dv_), !fresh);
    scaled_query_.pack_rows(count, packed_.data());
    product(m_, d_, terms, chunk.gradient.data, chunk.gradient.row_stride, chunk.gradient.term_stride, packed_.data(),
            dkeys, key_stride_, !fresh || a_.memory.tied());
  }

  // The same by the library, in `width` columns from `first` on: the tiles are right factors as they lie.
  static void add_transposed(const Memory& memory, const Summands<S>& chunk, int64_t rows, int64_t first, int64_t width,
                             bool fresh, T* dkeys, T* dvalues) {
    const auto from_first = [&](LeftFactor<S> tile) {
      tile.data += first;
      return tile;
    };
    add_to_memory<S>(memory, rows, width, chunk.columns, from_first(chunk.weights), from_first(chunk.gradient), fresh,
                     dkeys + first, dvalues + first);
  }

 private:
  // Whether weights are read where they are kept: where products take them as they are, or after a change of layout.
  static constexpr bool kReadsKept = std::is_same_v<S, T> || kInPairs<S>;

  // Whether the library's products read rows of the upstream gradient and of queries as they are: float32.
  bool as_they_are() const { return kInLibrary<S> && std::is_same_v<S, T> && a_.memory.library; }

  const S* dout_row(int64_t i) const { return static_cast<const S*>(a_.dout) + i * dv_; }

  void set_dout(int64_t first, int64_t r, T scale, bool copied) {
    dout_scale_[r] = scale;
    if (copied) dout_.set(r, dout_row(first + r), scale);
  }

  // A tile as a factor that is summed over its rows; the library's products sum all rows of a chunk.
  LeftFactor<S> columns(T* tile, int64_t count) const {
    if (!a_.memory.library) return in_columns<S>(tile, count, m_, score_stride_);
    std::memset(tile + count * score_stride_, 0, (rows_ - count) * score_stride_ * sizeof(T));
    return in_columns<S>(tile, rows_, m_, score_stride_);
  }

  LeftFactor<S> columns_of_weights(T* tile, const S* kept, int64_t count) const {
    if (kept == nullptr) return columns(tile, count);
    if constexpr (std::is_same_v<S, T>) return {kept, 1, kept_stride(m_)};
#if ANOMEM_BFLOAT16_PAIRS
    if constexpr (kInPairs<S>) {
      const int64_t paired = round_up(count, 2);
      if (paired < rows_) std::memset(tile + paired * score_stride_, 0, (rows_ - paired) * score_stride_ * sizeof(T));
      return in_columns(kept, kept_stride(m_), count, m_, tile, score_stride_);
    }
#endif
    return {};
  }

  // Whether scores are needed beside the weights.
  bool keeps_scores() const { return a_.dbeta != nullptr || a_.shrinkage.entropy; }

  const RetrieveBackward& a_;
  const GradientPanels<S>& panels_;
  int64_t rows_, m_, d_, dv_, score_stride_, key_stride_;
  QueryRows<S> query_;
  RawQueries<S> raw_;
  FactorRows<S> scaled_query_, dout_;
  Buffer<T> dout_scale_, dquery_, scores_;
  Buffer<factor_t<S>> packed_, neighbours_;
  Buffer<T> softmax_;
};

template <class S>
void compute(const RetrieveBackward& a) {
  using T = accumulator_t<S>;
  const int64_t m = a.memory.prototypes, d = a.memory.features, dv = a.memory.value_features, n = a.query.count;
  const bool tied = a.memory.tied();
  const bool in_blocks = a.kept.of_blocks && a.kept.rows > 0;
  const BackwardPlan plan(a.type, a.memory, n, in_blocks);
  const int64_t rows = plan.rows, chunks = plan.chunks, slots = plan.slots;
  T *const dkeys = static_cast<T*>(a.workspace), *const dvalues = tied ? dkeys : dkeys + slots * plan.key_sums;
  const int64_t parts = plan.group > 0 ? chunks : slots;
  Buffer<double> dbeta(parts);
  for (int64_t part = 0; part < parts; ++part) dbeta[part] = 0;
  const auto count_of = [&](int64_t chunk) { return n - chunk * rows < rows ? n - chunk * rows : rows; };
  const auto dbeta_of = [&](int64_t part) { return a.dbeta != nullptr ? &dbeta[part] : nullptr; };
  RetrieveBackward whole = a;  // of chunks that are not read in blocks
  if (in_blocks) whole.kept = {};
  {
    // Where all weights are kept no scores are made.
    const bool weights_alone = kInPairs<S> && !in_blocks && a.kept.rows >= n;
    const RawKeys<S> raw_keys(a.memory, takes_raw_scores(a.memory, a.shrinkage) && !weights_alone);
    const GradientPanels<S> panels(a.memory, !in_blocks && n > 2 * rows,
                                   !weights_alone && !all_are_raw(raw_keys, a.query, a.memory));
    if (plan.group > 0) {
      T* const memory = dvalues + (tied ? plan.key_sums : plan.value_sums);
      Buffer<Summands<S>> summands(plan.group);
      for (int64_t begin = 0; begin < chunks; begin += plan.group) {
        const int64_t some = chunks - begin < plan.group ? chunks - begin : plan.group;
        parallel_ranges(some, [&](int64_t first, int64_t last) {
          const LibraryProducts library(true, kInPairs<S>);
          BackwardChunk<S> work(a, panels, raw_keys, rows);
          for (int64_t i = first; i < last; ++i) {
            const Tiles<S> tiles(memory + i * plan.tiles, plan, a.memory);
            summands[i] = work.run((begin + i) * rows, count_of(begin + i), tiles, dbeta_of(begin + i));
          }
        });
        // In tiles wide panels, since each splits its left factors anew.
        const bool wide = kSplits && std::is_same_v<S, float> && splits_products();
        const int64_t panel = wide ? 4 * kLibraryPanel : kLibraryPanel;
        parallel_ranges((m + panel - 1) / panel, [&](int64_t first, int64_t last) {
          const LibraryProducts library(true, kInPairs<S>);
          for (int64_t column = first * panel; column < m && column < last * panel; column += panel)
            for (int64_t i = 0; i < some; ++i)
              BackwardChunk<S>::add_transposed(a.memory, summands[i], rows, column, at_most(panel, m - column),
                                               begin + i == 0, dkeys, dvalues);
        });
      }
    } else {
      parallel_ranges(slots, [&](int64_t first_slot, int64_t last_slot) {
        const LibraryProducts library(a.memory.library, kInPairs<S>);
        // Large, and of chunks that are not read in blocks: one for all slots of a thread.
        std::unique_ptr<BackwardChunk<S>> work;
        std::unique_ptr<Buffer<T>> memory;
        BackwardBlocks<S> blocks(a, panels, raw_keys, in_blocks ? rows : 0);
        for (int64_t slot = first_slot; slot < last_slot; ++slot) {
          T *const keys = dkeys + slot * plan.key_sums, *const values = tied ? keys : dvalues + slot * plan.value_sums;
          const int64_t begin = slot * chunks / slots, end = (slot + 1) * chunks / slots;
          for (int64_t chunk = begin; chunk < end; ++chunk) {
            if (in_blocks && blocks.run(chunk * rows, count_of(chunk), chunk == begin, keys, values)) continue;
            if (!work) {
              work = std::make_unique<BackwardChunk<S>>(whole, panels, raw_keys, rows);
              memory = std::make_unique<Buffer<T>>(plan.tiles);
            }
            const Tiles<S> tiles(memory->data(), plan, a.memory);
            const Summands<S> summands = work->run(chunk * rows, count_of(chunk), tiles, dbeta_of(slot));
            work->add(summands, count_of(chunk), chunk == begin, keys, values);
          }
        }
      });
    }
  }
  if (a.dbeta != nullptr) {
    *a.dbeta = 0;
    for (int64_t part = 0; part < parts; ++part) *a.dbeta += dbeta[part];
  }
  parallel((m + kSummed - 1) / kSummed, [&](int64_t item) {
    const int64_t first = item * kSummed, count = m - first < kSummed ? m - first : kSummed;
    const int64_t width = d > dv ? d : dv;
    Buffer<T> key(d), sums(kSummed * width);
    add_slots(dkeys, slots, plan.key_sums, plan.key_stride, a.memory.library, first, count, d, sums.data());
    for (int64_t row = first; row < first + count; ++row) {
      T* sum = sums.data() + (row - first) * d;
      const T factor = normalize_row(static_cast<const S*>(a.memory.keys) + row * d, d, a.memory.normalize, key.data());
      normalize_row_backward(sum, key.data(), factor, T{1}, d, a.memory.normalize, static_cast<S*>(a.dkeys) + row * d);
    }
    if (tied) return;
    add_slots(dvalues, slots, plan.value_sums, plan.value_stride, a.memory.library, first, count, dv, sums.data());
    scaled_copy(sums.data(), count * dv, T{1}, static_cast<S*>(a.dvalues) + first * dv);
  });
}

}  // namespace anomem::cpu::ANOMEM_ISA
