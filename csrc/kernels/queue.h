// Where a launcher puts its work. Kernels know neither torch nor a thread pool of their own.
#pragma once

#include <cstdint>

namespace ddpp {

// Calls body(begin, end, state) on parts of [begin, end) of at least `grain` items, on any threads, and
// waits.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain,
                             void (*body)(int64_t begin, int64_t end, void* state), void* state);

struct Queue {
  void* stream = nullptr;              // cudaStream_t, for CUDA kernels
  ParallelFor parallel_for = nullptr;  // for CPU kernels
};

// body(begin, end) over [0, count). It must not throw.
template <class Body>
void parallel_for(const Queue& queue, int64_t count, int64_t grain, const Body& body) {
  queue.parallel_for(
      0, count, grain,
      [](int64_t begin, int64_t end, void* state) { (*static_cast<const Body*>(state))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// All work at once, where it is asked for.
inline const Queue kThisThread{
    nullptr, [](int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* state) {
      if (begin < end) body(begin, end, state);
    }};

}  // namespace ddpp
