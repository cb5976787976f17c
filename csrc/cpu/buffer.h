// Scratch memory of a kernel: aligned to a cache line, not initialised, freed at the end of its scope.
#pragma once

#include "cpu/simd.h"

namespace anomem::cpu::ANOMEM_ISA {

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, round_up(count * int64_t(sizeof(T)) + 64, 64)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
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
