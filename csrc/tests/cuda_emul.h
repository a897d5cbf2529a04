// Runs CUDA kernels on the host, for tests on machines without a GPU.
//
// The threads of one block are fibers of one OS thread (blocks run one after
// another). A fiber runs until it meets a barrier or a warp collective, then the
// scheduler resumes the next one. The order of the fibers is settable, so a test
// can run a kernel under several schedules: a missing __syncthreads() shows up as
// a result that depends on the schedule. Barriers that can never complete (some
// threads left the block, or wait elsewhere) raise std::runtime_error.
//
// Covered: threadIdx/blockIdx/blockDim/gridDim, __shared__ (static and dynamic),
// __syncthreads, __syncwarp, __shfl_*_sync, __ballot/any/all_sync, atomics on
// global and shared memory, __ldg, __stwb of float4, double2 and uint2, __saturatef, basic math, asynchronous
// copies to shared memory, in groups. Not modelled: memory
// consistency between barriers, concurrent blocks, CUDA's types of half precision (kernels/bfloat16.h is our
// own), occupancy limits other than the block size.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __constant__ static
#define __shared__ static thread_local

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
inline const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaSuccess             ? "no error"
         : e == cudaErrorInvalidValue ? "invalid argument"
                                      : "invalid configuration argument";
}

constexpr unsigned kMaxGridRows = 16;  // in y; a GPU's 65535 would be too many blocks to test

namespace ddpp_emul {

enum class Schedule { kForward, kReverse, kShuffled };
inline thread_local Schedule schedule = Schedule::kForward;
inline thread_local unsigned shuffle_seed = 1;
inline thread_local cudaError_t last_error = cudaSuccess;

constexpr int kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kDefaultShared = 48 * 1024;         // dynamic shared memory without DDPP_ALLOW_SHARED
inline thread_local size_t max_shared = 227 * 1024;  // with it; a test may lower it to that of a smaller GPU
constexpr size_t kStack = 64 * 1024;

template <class T>
struct Identity {
  using type = T;
};
template <class T>
using Same = typename Identity<T>::type;  // takes no part in template argument deduction

enum class Wait { kNone, kBlock, kWarp, kDone };

// Where a fiber was left. The compiler's own setjmp costs no system call, unlike swapcontext, and no
// sanitizer intercepts it; the two calls must be in different functions that are not inlined.
struct Place {
  void* buffer[5];
};
#define DDPP_EMUL_SWITCH __attribute__((noinline, no_sanitize("address", "undefined")))

DDPP_EMUL_SWITCH inline void go_to(Place& place) { __builtin_longjmp(place.buffer, 1); }
DDPP_EMUL_SWITCH inline void leave_for(Place& here, Place& there) {
  if (__builtin_setjmp(here.buffer) == 0) go_to(there);
}

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  Place place;
  std::unique_ptr<char[]> stack;
  uint3 thread;
  int lane = 0, warp = 0;
  Wait wait = Wait::kNone;
  const char* where = "";  // which collective it waits in
  unsigned mask = 0;       // lanes named by that collective
  uint64_t value = 0;      // what it offers to the other lanes
  uint64_t epoch = 0;      // how many warp collectives it has joined
  // On their way to shared memory, where nothing is before the thread has waited; in groups that have ended.
  std::vector<Copy> copies;
  std::deque<std::vector<Copy>> groups;
};

struct Block {
  dim3 grid, block;
  uint3 index{0, 0, 0};
  std::vector<Fiber> fibers;
  std::vector<unsigned char> dynamic_shared;
  Place scheduler;
  void (*entry)(void*) = nullptr;
  void* entry_arg = nullptr;
  std::exception_ptr error;
};

inline thread_local uint64_t block_serial = 0;  // counts the blocks run so far
inline thread_local Block* g_block = nullptr;
inline thread_local Fiber* g_fiber = nullptr;

inline void yield(Wait wait, const char* where) {
  g_fiber->wait = wait;
  g_fiber->where = where;
  leave_for(g_fiber->place, g_block->scheduler);
}

// A fiber outlives its block: it waits at the top of this loop for the next one.
inline void fiber_main() {
  for (;;) {
    yield(Wait::kDone, "");
    try {
      g_block->entry(g_block->entry_arg);
    } catch (...) {
      g_block->error = std::current_exception();
    }
  }
}

DDPP_EMUL_SWITCH inline void enter(Place& here, ucontext_t& context) {
  if (__builtin_setjmp(here.buffer) == 0) setcontext(&context);
}

inline void start_fiber(Block& b, Fiber& f) {
  f.stack.reset(new char[kStack]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = f.stack.get();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, reinterpret_cast<void (*)()>(fiber_main), 0);
  g_fiber = &f;
  enter(b.scheduler, context);
}

inline void sync_block(const char* where) { yield(Wait::kBlock, where); }

// Every lane in mask leaves its value, waits for the others, then reads.
inline void sync_warp(unsigned mask, uint64_t value, const char* where) {
  if (!(mask >> g_fiber->lane & 1u))
    throw std::runtime_error(std::string(where) + ": calling lane is not in its own mask");
  g_fiber->mask = mask;
  g_fiber->value = value;
  yield(Wait::kWarp, where);
}

inline Fiber* lane_of(int warp, int lane) {
  size_t id = size_t(warp) * kWarp + size_t(lane);
  return id < g_block->fibers.size() ? &g_block->fibers[id] : nullptr;
}

// Lets go the collectives of one warp whose named lanes have all arrived.
inline bool release_warp(Block& b, size_t base) {
  bool released = false;
  const size_t end = std::min(base + kWarp, b.fibers.size());
  for (size_t i = base; i < end; ++i) {
    Fiber& f = b.fibers[i];
    if (f.wait != Wait::kWarp) continue;
    bool ready = true;
    for (size_t j = base; j < end && ready; ++j) {
      Fiber& g = b.fibers[j];
      if (!(f.mask >> g.lane & 1u) || g.wait == Wait::kDone) continue;
      ready = g.wait == Wait::kWarp && g.mask == f.mask && g.where == f.where && g.epoch == f.epoch;
    }
    if (!ready) continue;
    const unsigned mask = f.mask;
    for (size_t j = base; j < end; ++j) {
      Fiber& g = b.fibers[j];
      if ((mask >> g.lane & 1u) && g.wait == Wait::kWarp) {
        g.wait = Wait::kNone;
        ++g.epoch;
        released = true;
      }
    }
  }
  return released;
}

inline bool release_block(Block& b) {
  bool any = false, exited = false;
  const char* where = nullptr;
  for (Fiber& f : b.fibers) {
    if (f.wait == Wait::kDone) {
      exited = true;
      continue;
    }
    if (f.wait != Wait::kBlock) return false;
    if (where && where != f.where)
      throw std::runtime_error("threads of one block wait at different __syncthreads()");
    where = f.where;
    any = true;
  }
  if (any && exited)
    throw std::runtime_error("__syncthreads() after some threads of the block have returned");
  for (Fiber& f : b.fibers) f.wait = Wait::kNone;
  return any;
}

inline void run_block(Block& b, void (*entry)(void*), void* arg) {
  b.entry = entry;
  b.entry_arg = arg;
  b.error = nullptr;
  const unsigned n = b.block.x * b.block.y * b.block.z;
  g_block = &b;
  if (b.fibers.size() != n) {
    b.fibers = std::vector<Fiber>(n);
    for (Fiber& f : b.fibers) start_fiber(b, f);
  }
  std::fill(b.dynamic_shared.begin(), b.dynamic_shared.end(), 0xFF);  // NaN: reads before writes show
  for (unsigned i = 0; i < n; ++i) {
    Fiber& f = b.fibers[i];
    f.thread = {i % b.block.x, i / b.block.x % b.block.y, i / b.block.x / b.block.y};
    f.lane = int(i % kWarp);
    f.warp = int(i / kWarp);
    f.wait = Wait::kNone;
    f.epoch = 0;
    f.copies.clear();
    f.groups.clear();
  }
  // One warp runs as far as it can get before the next one starts: the schedule
  // that most often shows a missing barrier.
  const unsigned warps = (n + kWarp - 1) / kWarp;
  std::vector<unsigned> warp_order(warps);
  for (unsigned w = 0; w < warps; ++w) warp_order[w] = schedule == Schedule::kReverse ? warps - 1 - w : w;
  uint64_t rng = shuffle_seed * 0x9E3779B97F4A7C15ull + 1;
  auto shuffle_order = [&rng](std::vector<unsigned>& v) {
    for (size_t i = v.size(); i > 1; --i) {
      rng = rng * 6364136223846793005ull + 1442695040888963407ull;
      std::swap(v[i - 1], v[(rng >> 33) % i]);
    }
  };
  ++block_serial;
  for (;;) {
    if (schedule == Schedule::kShuffled) shuffle_order(warp_order);
    for (unsigned w : warp_order) {
      const unsigned base = w * kWarp, lanes = std::min(n - base, unsigned(kWarp));
      do {
        for (unsigned k = 0; k < lanes; ++k) {
          Fiber& f = b.fibers[base + (schedule == Schedule::kReverse ? lanes - 1 - k : k)];
          if (f.wait != Wait::kNone) continue;
          g_fiber = &f;
          leave_for(b.scheduler, f.place);
          if (b.error) std::rethrow_exception(b.error);
        }
      } while (release_warp(b, base));
    }
    if (std::all_of(b.fibers.begin(), b.fibers.end(), [](Fiber& f) { return f.wait == Wait::kDone; })) break;
    if (!release_block(b)) {
      std::string text = "deadlock:";
      for (Fiber& f : b.fibers)
        if (f.wait == Wait::kWarp || f.wait == Wait::kBlock) {
          text += " thread " + std::to_string(f.thread.x) + " waits in " + f.where;
          break;
        }
      throw std::runtime_error(text);
    }
  }
  g_block = nullptr;
}

// The dynamic shared memory each kernel was allowed, by its address.
inline std::map<const void*, size_t>& allowed_shared() {
  static thread_local std::map<const void*, size_t> bytes;
  return bytes;
}

template <class... P>
cudaError_t allow_shared(void (*kernel)(P...), size_t bytes) {
  if (bytes > max_shared) return last_error = cudaErrorInvalidValue;
  allowed_shared()[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A&&... args) {
  const auto allowed = allowed_shared().find(reinterpret_cast<const void*>(kernel));
  const size_t shared_limit =
      allowed == allowed_shared().end() ? kDefaultShared : std::max(allowed->second, kDefaultShared);
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.x > 2147483647u || grid.y > kMaxGridRows || grid.z > 65535 ||
      shared_bytes > std::min(shared_limit, max_shared)) {
    last_error = cudaErrorInvalidConfiguration;  // as cudaGetLastError() reports it on a GPU
    return;
  }
  std::tuple<P...> call(static_cast<P>(args)...);
  struct Closure {
    void (*kernel)(P...);
    std::tuple<P...>* call;
  } closure{kernel, &call};
  auto entry = +[](void* p) {
    auto* c = static_cast<Closure*>(p);
    std::apply(c->kernel, *c->call);
  };
  static thread_local Block b;  // keeps its fibers from launch to launch
  b.grid = grid;
  b.block = block;
  b.dynamic_shared.assign(shared_bytes + 16, 0);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        b.index = {x, y, z};
        try {
          run_block(b, entry, &closure);
        } catch (...) {
          b.fibers.clear();  // they stand in the middle of the kernel
          g_block = nullptr;
          throw;
        }
      }
}

template <class T>
uint64_t pack(T v) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof(T));
  return bits;
}
template <class T>
T unpack(uint64_t bits) {
  T v;
  std::memcpy(&v, &bits, sizeof(T));
  return v;
}

template <class T>
T shuffle(unsigned mask, T value, int source, const char* where) {
  sync_warp(mask, pack(value), where);
  Fiber* other = lane_of(g_fiber->warp, source);
  if (!other || other->wait == Wait::kDone || !(mask >> source & 1u))
    throw std::runtime_error(std::string(where) + ": reads lane " + std::to_string(source) +
                             ", which takes no part");
  T result = unpack<T>(other->value);
  sync_warp(mask, g_fiber->value, where);  // all have read
  return result;
}

}  // namespace ddpp_emul

#define threadIdx (::ddpp_emul::g_fiber->thread)
#define blockIdx (::ddpp_emul::g_block->index)
#define blockDim (::ddpp_emul::g_block->block)
#define gridDim (::ddpp_emul::g_block->grid)

#define DDPP_EMUL_STR2(x) #x
#define DDPP_EMUL_STR(x) DDPP_EMUL_STR2(x)
#define DDPP_EMUL_HERE __FILE__ ":" DDPP_EMUL_STR(__LINE__)
#define __syncthreads() ::ddpp_emul::sync_block(DDPP_EMUL_HERE " __syncthreads")

inline void __syncwarp(unsigned mask = 0xffffffffu) { ddpp_emul::sync_warp(mask, 0, "__syncwarp"); }

template <class T>
T __shfl_sync(unsigned mask, T v, int lane, int width = 32) {
  int base = ddpp_emul::g_fiber->lane / width * width;
  return ddpp_emul::shuffle(mask, v, base + (lane & (width - 1)), "__shfl_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  int lane = ddpp_emul::g_fiber->lane, source = lane + int(delta);
  if (source / width != lane / width) source = lane;
  return ddpp_emul::shuffle(mask, v, source, "__shfl_down_sync");
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  int lane = ddpp_emul::g_fiber->lane, source = lane - int(delta);
  if (source < lane / width * width) source = lane;
  return ddpp_emul::shuffle(mask, v, source, "__shfl_up_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32) {
  int lane = ddpp_emul::g_fiber->lane, source = lane ^ bits;
  if (source / width > lane / width) source = lane;
  return ddpp_emul::shuffle(mask, v, source, "__shfl_xor_sync");
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  using namespace ddpp_emul;
  sync_warp(mask, uint64_t(predicate != 0), "__ballot_sync");
  unsigned bits = 0;
  for (int i = 0; i < kWarp; ++i) {
    Fiber* f = lane_of(g_fiber->warp, i);
    if (f && f->wait != Wait::kDone && (mask >> i & 1u) && f->value) bits |= 1u << i;
  }
  sync_warp(mask, g_fiber->value, "__ballot_sync");
  return bits;
}
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, !p) == 0; }

// Fibers of one OS thread: a plain read-modify-write is atomic.
template <class T>
T atomicAdd(T* p, ddpp_emul::Same<T> v) {
  T old = *p;
  *p = old + v;
  return old;
}
template <class T>
T atomicMax(T* p, ddpp_emul::Same<T> v) {
  T old = *p;
  *p = std::max(old, v);
  return old;
}
template <class T>
T atomicMin(T* p, ddpp_emul::Same<T> v) {
  T old = *p;
  *p = std::min(old, v);
  return old;
}
template <class T>
T atomicExch(T* p, ddpp_emul::Same<T> v) {
  T old = *p;
  *p = v;
  return old;
}
template <class T>
T atomicCAS(T* p, ddpp_emul::Same<T> c, ddpp_emul::Same<T> v) {
  T old = *p;
  if (old == c) *p = v;
  return old;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
void __stwb(T* p, T v) {
  *p = v;
}
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline void __threadfence() {}
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  const auto bits = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if ((bytes != 4 && bytes != 8 && bytes != 16) || bits % bytes != 0)
    throw std::runtime_error("asynchronous copy not of 4, 8 or 16 aligned bytes");
  ddpp_emul::g_fiber->copies.push_back({to, from, bytes});
}
inline void __pipeline_commit() {
  ddpp_emul::Fiber& fiber = *ddpp_emul::g_fiber;
  fiber.groups.push_back(std::move(fiber.copies));
  fiber.copies.clear();
}
inline void __pipeline_wait_prior(size_t but) {
  auto& groups = ddpp_emul::g_fiber->groups;
  for (; groups.size() > but; groups.pop_front())
    for (const auto& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __saturatef(float x) { return x > 0 ? std::min(x, 1.0f) : 0.0f; }  // of NaN too
using std::max;
using std::min;

inline cudaError_t cudaGetLastError() {
  cudaError_t e = ddpp_emul::last_error;
  ddpp_emul::last_error = cudaSuccess;
  return e;
}

#define DDPP_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), ::ddpp_emul::launch((kernel), (grid), (block), (shared_bytes), __VA_ARGS__))
// The first thread of each block to get here fills the array with NaN bits, so a
// read before a write cannot pass by luck on what the last block left behind.
#define DDPP_SHARED(type, name, count)                         \
  static thread_local type name[count];                        \
  static thread_local uint64_t name##_serial = 0;              \
  if (name##_serial != ::ddpp_emul::block_serial) {            \
    std::memset(static_cast<void*>(name), 0xFF, sizeof(name)); \
    name##_serial = ::ddpp_emul::block_serial;                 \
  }
#define DDPP_DYNAMIC_SHARED(type, name) \
  type* name = reinterpret_cast<type*>( \
      (reinterpret_cast<uintptr_t>(::ddpp_emul::g_block->dynamic_shared.data()) + 15) & ~uintptr_t(15))
#define DDPP_UNROLL(times)
#define DDPP_ALLOW_SHARED(kernel, shared_bytes) (::ddpp_emul::allow_shared((kernel), (shared_bytes)))

inline int64_t max_shared_bytes() { return static_cast<int64_t>(ddpp_emul::max_shared); }
inline int multiprocessors() { return 4; }
