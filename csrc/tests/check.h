// What the C++ tests share. A test program runs as `test_<op> cpu` (DDPP_CPU_ISA names the instruction set)
// or as `test_<op> emulated forward|reverse|shuffled` (the CUDA kernels, under that schedule of their
// threads).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cuda_emul.h"
#include "kernels/isa.h"
#include "kernels/queue.h"

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::printf("%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                             \
    }                                                                           \
  } while (0)

namespace ddpp::test {

// An array of exactly n elements on the heap, so that AddressSanitizer sees any access beyond it; `shift`
// moves it off the alignment that the allocator gives. Full of NaN (integers: -1), so that unwritten elements
// show.
template <class T>
class Array {
 public:
  explicit Array(int64_t n, int64_t shift = 0) : size_(n), shift_(shift), memory_(new T[n + shift]) {
    std::memset(static_cast<void*>(memory_.get()), 0xFF, (n + shift) * sizeof(T));
  }
  T* data() { return memory_.get() + shift_; }
  const T* data() const { return memory_.get() + shift_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }
  bool same_bits(const Array& other) const {
    return size_ == other.size_ && (size_ == 0 || !std::memcmp(data(), other.data(), size_ * sizeof(T)));
  }

 private:
  int64_t size_, shift_;
  std::unique_ptr<T[]> memory_;
};

inline void serial_for(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*),
                       void* state) {
  if (begin < end) body(begin, end, state);
}

// Three threads at once, for ThreadSanitizer and for sums that must not depend on the threads.
inline void threaded_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                         void* state) {
  const int64_t step = std::max(grain, (end - begin + 2) / 3);
  std::vector<std::thread> threads;
  for (int64_t at = begin; at < end; at += step)
    threads.emplace_back([=] { body(at, std::min(end, at + step), state); });
  for (auto& thread : threads) thread.join();
}

struct Setting {
  bool emulated = false;
  std::vector<Queue> queues;  // results must be the same bits on all of them
};

// Reads the command line; ends the program with 77 (skipped) where this CPU lacks the instruction set.
inline Setting setting(int argc, char** argv) {
  Setting result;
  const std::string mode = argc > 1 ? argv[1] : "cpu", schedule = argc > 2 ? argv[2] : "forward";
  if (mode == "cpu") {
    const char* wanted = std::getenv("DDPP_CPU_ISA");
    if (wanted && std::strcmp(wanted, isa_name(active_isa())) != 0) {
      std::printf("this CPU does not run %s\n", wanted);
      std::exit(77);
    }
    result.queues = {Queue{nullptr, serial_for}, Queue{nullptr, threaded_for}};
    return result;
  }
  CHECK(mode == "emulated");
#if defined(__SANITIZE_THREAD__)
  std::printf(
      "emulated kernels run on one thread and switch stacks, which ThreadSanitizer does not follow\n");
  std::exit(77);
#endif
  CHECK(schedule == "forward" || schedule == "reverse" || schedule == "shuffled");
  result.emulated = true;
  result.queues = {Queue{}};
  ddpp_emul::schedule = schedule == "forward"   ? ddpp_emul::Schedule::kForward
                        : schedule == "reverse" ? ddpp_emul::Schedule::kReverse
                                                : ddpp_emul::Schedule::kShuffled;
  return result;
}

}  // namespace ddpp::test
