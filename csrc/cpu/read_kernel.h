// The read of a filled memory: softmax over all prototypes or over the k largest scores, and what describes it.
//
// The k largest are found by candidates (candidates.h) and read row by row: there is no second product. The softmax
// over all prototypes works as in retrieve_kernel.h.
#pragma once

#include "cpu/candidates.h"
#include "cpu/deviation_map_kernel.h"
#include "cpu/parallel.h"
#include "cpu/read.h"
#include "cpu/softmax.h"

namespace anomem::cpu::ANOMEM_ISA {

// Where the results of one bank go.
template <class S>
struct ReadRows {
  using T = accumulator_t<S>;

  ReadRows(const Read& a, int64_t bank) : d(a.features), deviation(a.deviation) {
    const int64_t first = bank * a.query.count;
    out = static_cast<S*>(a.out) + first * d;
    residual = static_cast<T*>(a.residual) + first;
    cosine = static_cast<T*>(a.cosine) + first;
    entropy = static_cast<T*>(a.entropy) + first;
    lse = static_cast<T*>(a.lse) + first;
    distance = a.nearest ? static_cast<T*>(a.distance) + first : nullptr;
    index = a.nearest ? a.index + first : nullptr;
  }

  // The read scale · r of query q.
  void set_read(int64_t i, const T* q, const T* r, T scale) const {
    residual[i] = row_distance(q, r, d, scale, Distance::kEuclidean);
    cosine[i] = row_distance(q, r, d, scale, Distance::kCosine);
    S* to = out + i * d;
    if (!deviation) return scaled_copy(r, d, scale, to);
    for_vectors<T>(d, [&](int64_t p, int64_t count) {
      store_some(to + p, load_some(q + p, count) - load_some(r + p, count) * scale, count);
    });
  }

  void set_nearest(int64_t i, const Target<S>& nearest, int64_t r) const {
    distance[i] = nearest.keys(r)[0];
    index[i] = nearest.columns(r)[0];
  }

  int64_t d;
  bool deviation;
  S* out;
  T *residual, *cosine, *entropy, *lse, *distance;
  int64_t* index;
};

// Reads the k prototypes of a row's target: r ← Σ e_i m_i, e_i = exp(s_i − s_0). Returns Σ e_i. Where s_0 is infinite
// the weights are NaN and the lse is s_0, unless a score is NaN: such scores come last.
template <class S, class T = accumulator_t<S>>
inline RowSum<T> read_largest(const CandidatePanels<S>& panels, const T* keys, const int64_t* columns, int64_t k,
                              T* r) {
  const int64_t d = panels.features();
  T e[kMostCandidates];
  vec<T> sums{}, products{};
  for_vectors<T>(k, [&](int64_t i, int64_t count) {
    const vec<T> shifted = keys[0] - load_some(keys + i, count);  // a key is a score with its sign changed
    const vec<T> weight = keep_first<T>(exp_or_zero(shifted), count);
    store_some(e + i, weight, count);
    sums += weight;
    products += weight == vec<T>{} ? vec<T>{} : weight * shifted;
  });
  // Four vectors of r stay in registers while the prototypes pass.
  for (int64_t first = 0; first < d; first += 4 * kLanes<T>) {
    const int64_t left = d - first;
    if (left >= 4 * kLanes<T>) {
      vec<T> total[4] = {};
      for (int64_t i = 0; i < k; ++i) {
        const T* m = panels[columns[i]] + first;
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) total[v] = multiply_add(load(m + v * kLanes<T>), broadcast(e[i]), total[v]);
      }
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) store(r + first + v * kLanes<T>, total[v]);
      continue;
    }
    for_vectors<T>(left, [&](int64_t p, int64_t count) {
      vec<T> total{};
      for (int64_t i = 0; i < k; ++i)
        total = multiply_add(load_some(panels[columns[i]] + first + p, count), broadcast(e[i]), total);
      store_some(r + first + p, total, count);
    });
  }
  const T sum = sum_lanes<T>(sums), top = -keys[0], last = keys[k - 1];
  const bool special = !is_finite(top) && last == last;
  return {sum, special ? top : top + std::log(sum), sum_lanes<T>(products)};
}

template <class S>
void read_of_largest(const Read& a, int64_t bank, const CandidatePanels<S>& panels,
                     const Offsets<accumulator_t<S>>& bias, const Offsets<accumulator_t<S>>& lengths) {
  using T = accumulator_t<S>;
  const int64_t d = a.features, n = a.query.count;
  const ReadRows<S> rows(a, bank);
  parallel_ranges((n + kCandidateRows - 1) / kCandidateRows, [&](int64_t begin, int64_t end) {
    QueryRows<S> query(kCandidateRows, d, a.normalize);
    CandidateSearch<S> search(panels);
    Target<S> largest(a.top_k, &bias, false), nearest(1, &lengths, true);
    Target<S>* const targets[] = {&largest, &nearest};
    Buffer<T> read(d);
    for (int64_t first = begin * kCandidateRows; first < n && first < end * kCandidateRows; first += kCandidateRows) {
      const int64_t count = n - first < kCandidateRows ? n - first : kCandidateRows;
      query.load(a.query.of_bank<S>(bank) + first * a.query.stride, a.query.stride, count);
      search.find(query, count, targets, a.nearest ? 2 : 1);
      for (int64_t r = 0; r < count; ++r) {
        const RowSum<T> row = read_largest(panels, largest.keys(r), largest.columns(r), a.top_k, read.data());
        rows.lse[first + r] = row.lse;
        rows.entropy[first + r] = std::log(row.sum) - row.weighted / row.sum;
        rows.set_read(first + r, query[r], read.data(), 1 / row.sum);
        if (a.nearest) rows.set_nearest(first + r, nearest, r);
      }
    }
  });
}

template <class S>
void read_of_all(const Read& a, int64_t bank, const Memory& memory, const CandidatePanels<S>* candidates,
                 const Offsets<accumulator_t<S>>* lengths) {
  using T = accumulator_t<S>;
  const int64_t d = a.features, n = a.query.count, m = a.prototypes;
  const ReadRows<S> rows(a, bank);
  const ReadPanels<S> panels(memory, false);  // values are not rounded: the residual is a small difference
  const T* bias = a.bias.given ? static_cast<const T*>(a.bias.data) + bank * m : nullptr;
  const int64_t chunk = kCandidateRows, score_stride = padded_stride<T>(round_up(m, kGroups));
  const int64_t read_stride = padded_stride<T>(d);
  parallel_ranges((n + chunk - 1) / chunk, [&](int64_t begin, int64_t end) {
    QueryRows<S> query(chunk, d, a.normalize);
    Buffer<T> scores(chunk * score_stride), read(chunk * read_stride), scale(chunk);
    Buffer<int32_t> found(kMostFound<T>);
    for (int64_t first = begin * chunk; first < n && first < end * chunk; first += chunk) {
      const int64_t count = n - first < chunk ? n - first : chunk;
      query.load(a.query.of_bank<S>(bank) + first * a.query.stride, a.query.stride, count);
      product(count, m, d, query.data(), query.stride(), 1, panels.keys_transposed(), scores.data(), score_stride,
              false);
      if (a.nearest) {
        Target<S> nearest(1, lengths, true);
        for (int64_t r = 0; r < count; ++r) {
          nearest.begin(r);
          find_in(*candidates, nearest, r, query[r], scores.data() + r * score_stride, found.data());
          rows.set_nearest(first + r, nearest, r);
        }
      }
      for (int64_t r = 0; r < count; ++r) {
        T* p = scores.data() + r * score_stride;
        const RowSum<T> row = exponentials<true>(p, m, static_cast<T>(a.beta), bias);
        rows.lse[first + r] = row.lse;
        rows.entropy[first + r] = std::log(row.sum) - row.weighted / row.sum;
        scale[r] = 1 / row.sum;
      }
      product(count, d, m, scores.data(), score_stride, 1, panels.values(), read.data(), read_stride, false);
      for (int64_t r = 0; r < count; ++r) rows.set_read(first + r, query[r], read.data() + r * read_stride, scale[r]);
    }
  });
}

template <class S>
void compute(const Read& a) {
  using T = accumulator_t<S>;
  const int64_t d = a.features, m = a.prototypes;
  for (int64_t bank = 0; bank < a.banks; ++bank) {
    const S* keys = static_cast<const S*>(a.keys) + bank * m * d;
    if (a.top_k == 0 && !a.nearest) {
      read_of_all<S>(a, bank, {keys, {false, nullptr}, m, d, d, a.normalize, a.beta}, nullptr, nullptr);
      continue;
    }
    const CandidatePanels<S> panels(keys, d, m, d, a.normalize);
    Offsets<T> bias(panels, static_cast<T>(a.beta));
    Offsets<T> lengths(panels, T{1});
    lengths.set_lengths(panels);
    if (a.top_k == 0) {
      read_of_all<S>(a, bank, {keys, {false, nullptr}, m, d, d, a.normalize, a.beta}, &panels, &lengths);
      continue;
    }
    for (int64_t j = 0; j < m; ++j) bias.set(j, a.bias.given ? static_cast<const T*>(a.bias.data)[bank * m + j] : T{0});
    read_of_largest<S>(a, bank, panels, bias, lengths);
  }
}

}  // namespace anomem::cpu::ANOMEM_ISA
