// The nearest prototypes of rows, and greedy k-center, by candidates (candidates.h).
#pragma once

#include "cpu/candidates.h"
#include "cpu/nearest.h"
#include "cpu/parallel.h"

namespace anomem::cpu::ANOMEM_ISA {

template <class S>
void compute(const Nearest& a) {
  using T = accumulator_t<S>;
  const int64_t d = a.features, n = a.x.count, k = a.k;
  for (int64_t bank = 0; bank < a.banks; ++bank) {
    const S* prototypes = static_cast<const S*>(a.prototypes) + bank * a.count * d;
    const CandidatePanels<S> panels(prototypes, d, a.count, d, Normalize::kNone);
    Offsets<T> offsets(panels, T{1});
    offsets.set_lengths(panels);
    T* const distance = static_cast<T*>(a.distance) + bank * n * k;
    int64_t* const index = a.index + bank * n * k;
    parallel_ranges((n + kCandidateRows - 1) / kCandidateRows, [&](int64_t begin, int64_t end) {
      QueryRows<S> x(kCandidateRows, d, Normalize::kNone);
      CandidateSearch<S> search(panels);
      Target<S> nearest(k, &offsets, true);
      Target<S>* const targets[] = {&nearest};
      for (int64_t first = begin * kCandidateRows; first < n && first < end * kCandidateRows; first += kCandidateRows) {
        const int64_t count = n - first < kCandidateRows ? n - first : kCandidateRows;
        x.load(a.x.of_bank<S>(bank) + first * a.x.stride, a.x.stride, count);
        search.find(x, count, targets, 1);
        std::memcpy(distance + first * k, nearest.keys(0), count * k * sizeof(T));
        std::memcpy(index + first * k, nearest.columns(0), count * k * sizeof(int64_t));
      }
    });
  }
}

// Greedy k-center (Gonzalez 1985): each next centre is the row farthest from all before it, the first of equals.
//
// One pass over all rows for each centre would be bound by memory. Instead a pool of the farthest rows is followed.
// Distances only fall, so the farthest row of all is in the pool as long as the pool's largest distance exceeds every
// distance outside at the last pass. Then all centres since that pass are applied to all rows at once.
template <class S>
class GreedyCenters {
 public:
  using T = accumulator_t<S>;

  explicit GreedyCenters(const KCenter& a)
      : a_(a),
        n_(a.x.count),
        d_(a.features),
        pool_size_(n_ / 32 < 256    ? 256
                   : n_ / 32 > 4096 ? 4096
                                    : n_ / 32),
        distance_(n_) {
    for (int64_t i = 0; i < n_; ++i) distance_[i] = T{INFINITY};
  }

  void choose() {
    a_.index[0] = a_.first;
    for (int64_t applied = 0, chosen = 1; chosen < a_.count;) {
      if (chosen - applied < kFew) apply_few(a_.index + applied, chosen - applied);
      else apply_many(a_.index + applied, chosen - applied);
      applied = chosen;
      int64_t farthest = 0;
      for (int64_t i = 1; i < n_; ++i) farthest = distance_[i] > distance_[farthest] ? i : farthest;
      a_.index[chosen++] = farthest;
      if (chosen < a_.count) chosen += follow_pool(a_.index + chosen, a_.count - chosen, distance_[farthest]);
      if (chosen - applied < 32 && pool_size_ < n_ / 4) pool_size_ *= 2;
    }
  }

 private:
  static constexpr int64_t kFew = 4;

  const S* row(int64_t i) const { return static_cast<const S*>(a_.x.data) + i * a_.x.stride; }

  // A row with a NaN is never farther than another that is not chosen.
  static T or_near(T distance) { return distance == distance ? distance : T{-0.5}; }

  void lower(int64_t i, T distance) {
    if (or_near(distance) < distance_[i]) distance_[i] = or_near(distance);
  }

  // A centre is chosen once.
  void exclude(const int64_t* centres, int64_t count) {
    for (int64_t c = 0; c < count; ++c) distance_[centres[c]] = -1;
  }

  // Lowers all distances to those from the centres.
  void apply_few(const int64_t* centres, int64_t count) {
    Buffer<T> rows(count * d_);
    for (int64_t c = 0; c < count; ++c) scaled_copy(row(centres[c]), d_, T{1}, rows.data() + c * d_);
    parallel_ranges(n_, [&](int64_t begin, int64_t end) {
      Buffer<T> x(d_);
      for (int64_t i = begin; i < end; ++i) {
        scaled_copy(row(i), d_, T{1}, x.data());
        for (int64_t c = 0; c < count; ++c) lower(i, squared_distance(x.data(), rows.data() + c * d_, d_));
      }
    });
    exclude(centres, count);
  }

  void apply_many(const int64_t* centres, int64_t count) {
    Buffer<S> rows(count * d_);
    for (int64_t c = 0; c < count; ++c) std::memcpy(rows.data() + c * d_, row(centres[c]), d_ * sizeof(S));
    const CandidatePanels<S> panels(rows.data(), d_, count, d_, Normalize::kNone);
    Offsets<T> offsets(panels, T{1});
    offsets.set_lengths(panels);
    parallel_ranges((n_ + kCandidateRows - 1) / kCandidateRows, [&](int64_t begin, int64_t end) {
      QueryRows<S> x(kCandidateRows, d_, Normalize::kNone);
      CandidateSearch<S> search(panels);
      Target<S> nearest(1, &offsets, true);
      Target<S>* const targets[] = {&nearest};
      for (int64_t first = begin * kCandidateRows; first < n_ && first < end * kCandidateRows;
           first += kCandidateRows) {
        const int64_t here = n_ - first < kCandidateRows ? n_ - first : kCandidateRows;
        x.load(row(first), a_.x.stride, here);
        search.find(x, here, targets, 1, distance_.data() + first);
        for (int64_t r = 0; r < here; ++r)
          if (nearest.found(r) > 0) lower(first + r, nearest.keys(r)[0]);
      }
    });
    exclude(centres, count);
  }

  // Chooses centres among the farthest rows as long as the next one is certain. The last centre is not yet applied.
  int64_t follow_pool(int64_t* chosen, int64_t most, T largest) {
    const T floor = floor_of_pool(largest);
    const int64_t size = farther_than(floor);
    Buffer<T> rows(size * d_), distance(size);
    Buffer<int64_t> index(size);
    for (int64_t i = 0, p = 0; i < n_; ++i)
      if (distance_[i] > floor) {
        scaled_copy(row(i), d_, T{1}, rows.data() + p * d_);
        distance[p] = distance_[i];
        index[p++] = i;
      }
    Buffer<T> centre(d_);
    scaled_copy(row(chosen[-1]), d_, T{1}, centre.data());
    int64_t last = chosen[-1];
    for (int64_t found = 0; found < most; ++found) {
      int64_t farthest = -1;
      for (int64_t p = 0; p < size; ++p) {
        if (!(distance[p] > floor)) continue;  // it cannot be the next any more
        const T from_last = or_near(squared_distance(rows.data() + p * d_, centre.data(), d_));
        if (from_last < distance[p]) distance[p] = from_last;
        if (index[p] == last) distance[p] = -1;
        if (distance[p] > floor && (farthest < 0 || distance[p] > distance[farthest])) farthest = p;
      }
      if (farthest < 0) return found;
      chosen[found] = last = index[farthest];
      std::memcpy(centre.data(), rows.data() + farthest * d_, d_ * sizeof(T));
    }
    return most;
  }

  // A distance that about pool_size_ rows, and no more, exceed: by bisection.
  T floor_of_pool(T largest) const {
    T low = -1, high = largest;
    for (int step = 0; step < 24; ++step) {
      const T middle = low + (high - low) / 2;
      if (farther_than(middle) > pool_size_) low = middle;
      else high = middle;
    }
    return high;
  }

  int64_t farther_than(T bound) const {
    int64_t count = 0;
    for (int64_t i = 0; i < n_; ++i) count += distance_[i] > bound;
    return count;
  }

  const KCenter& a_;
  int64_t n_, d_, pool_size_;
  Buffer<T> distance_;
};

template <class S>
void compute(const KCenter& a) {
  GreedyCenters<S>(a).choose();
}

}  // namespace anomem::cpu::ANOMEM_ISA
