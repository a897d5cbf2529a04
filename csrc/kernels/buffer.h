// Memory of the CPU's kernels.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>

namespace ddpp {

// Zeros, from the beginning of a cache line on: what is stored there by whole registers is read by them
// without waiting for the cache.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t values) : lines_(new Line[(values + kLine - 1) / kLine]()), size_(values) {}
  T* get() const { return lines_ ? lines_[0].values : nullptr; }
  int64_t size() const { return size_; }
  void swap(Buffer& other) {
    lines_.swap(other.lines_);
    std::swap(size_, other.size_);
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);
  struct alignas(64) Line {
    T values[kLine];
  };
  std::unique_ptr<Line[]> lines_;
  int64_t size_ = 0;
};

}  // namespace ddpp
