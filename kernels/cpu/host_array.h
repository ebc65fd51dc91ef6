// HostArray: uninitialised-on-demand host memory, zero-filled by the system, aligned to 64 bytes; large ones
// ask for huge pages, which the K/V planes need to be read at memory speed. Owner; not thread-safe to resize.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>
#include <utility>

namespace kvlapse {

template <typename T>
class HostArray {
 public:
  HostArray() = default;
  explicit HostArray(size_t n) : n_(n) {
    if (n == 0) return;
    void* p = mmap(nullptr, n * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    madvise(p, n * sizeof(T), MADV_HUGEPAGE);  // a wish; small pages are as right
    data_ = static_cast<T*>(p);
  }
  ~HostArray() {
    if (data_) munmap(data_, n_ * sizeof(T));
  }
  HostArray(HostArray&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), n_(std::exchange(other.n_, 0)) {}
  HostArray& operator=(HostArray&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(n_, other.n_);
    return *this;
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return n_; }
  T& operator[](size_t i) { return data_[i]; }

 private:
  T* data_ = nullptr;
  size_t n_ = 0;
};

}  // namespace kvlapse
