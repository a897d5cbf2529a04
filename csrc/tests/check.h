// What the C++ tests share. A test program runs as `test_<op> cpu` (DDPP_CPU_ISA names the instruction set),
// as `test_<op> emulated forward|reverse|shuffled` (the CUDA kernels, under that schedule of their threads),
// or, compiled with DDPP_ON_DEVICE, as `test_<op>_device` (the CUDA kernels on a GPU).
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

#include "kernels/isa.h"
#include "kernels/queue.h"

#if defined(DDPP_ON_DEVICE)
#include <cuda_runtime_api.h>
#else
#include "cuda_emul.h"
#endif

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::printf("%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                             \
    }                                                                           \
  } while (0)

namespace ddpp::test {

#if defined(DDPP_ON_DEVICE)
// Memory that the GPU and the host share.
inline void* allocate(size_t bytes) {
  void* memory = nullptr;
  CHECK(cudaMallocManaged(&memory, std::max(bytes, size_t{1})) == cudaSuccess);
  return memory;
}
inline void release(void* memory) { cudaFree(memory); }
#else
inline void* allocate(size_t bytes) { return ::operator new(bytes); }
inline void release(void* memory) { ::operator delete(memory); }
#endif

// An array of exactly n elements in memory of its own, so that a sanitizer sees any access beyond it; `shift`
// moves it off the alignment that the allocator gives. Full of NaN (integers: -1), so that unwritten elements
// show.
template <class T>
class Array {
 public:
  explicit Array(int64_t n, int64_t shift = 0)
      : size_(n), shift_(shift), memory_(static_cast<T*>(allocate((n + shift) * sizeof(T))), release) {
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
  std::unique_ptr<T, void (*)(void*)> memory_;
};

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
  bool cuda = false;          // the CUDA kernels, emulated or on a GPU
  std::vector<Queue> queues;  // results must be the same bits on all of them
};

// Reads the command line; ends the program with 77 (skipped) where this CPU lacks the instruction set.
inline Setting setting(int argc, char** argv) {
  Setting result;
#if defined(DDPP_ON_DEVICE)
  (void)argc, (void)argv;
  setenv("CUDA_LAUNCH_BLOCKING", "1", 1);  // a launch returns when the host may read what it wrote
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("this machine has no GPU\n");
    std::exit(77);
  }
  result.cuda = true;
  result.queues = {Queue{}, Queue{}};
  return result;
#else
  const std::string mode = argc > 1 ? argv[1] : "cpu", schedule = argc > 2 ? argv[2] : "forward";
  if (mode == "cpu") {
    const char* wanted = std::getenv("DDPP_CPU_ISA");
    if (wanted && std::strcmp(wanted, isa_name(active_isa())) != 0) {
      std::printf("this CPU does not run %s\n", wanted);
      std::exit(77);
    }
    result.queues = {kThisThread, Queue{nullptr, threaded_for}};
    return result;
  }
  CHECK(mode == "emulated");
#if defined(__SANITIZE_THREAD__)
  std::printf(
      "emulated kernels run on one thread and switch stacks, which ThreadSanitizer does not follow\n");
  std::exit(77);
#endif
  CHECK(schedule == "forward" || schedule == "reverse" || schedule == "shuffled");
  result.cuda = true;
  result.queues = {Queue{}};
  ddpp_emul::schedule = schedule == "forward"   ? ddpp_emul::Schedule::kForward
                        : schedule == "reverse" ? ddpp_emul::Schedule::kReverse
                                                : ddpp_emul::Schedule::kShuffled;
  return result;
#endif
}

}  // namespace ddpp::test
