#include "kernels/cuda_compat.h"
#include "kernels/match_loss.h"
#include "kernels/pack.cuh"
#include "kernels/reduce.cuh"

namespace ddpp {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1056;  // 8 per multiprocessor of the largest GPU: enough bytes in flight

struct Partial {
  double numerator, denominator;
  int64_t kept;
};

// All comparisons with a NaN are false: a NaN is never pruned.
template <class T>
__device__ __forceinline__ bool is_pruned(T student, T target, T epsilon) {
  const T low = student < target ? student : target, high = student < target ? target : student;
  return (low < epsilon * high && high > epsilon * low)  // one sign and far apart, or two signs,
         || (low <= 0 && high >= 0 && low < high);       // also where epsilon * x underflows
}

template <class T>
__device__ __forceinline__ void add(T student, T target, T start, T epsilon, Partial& sum) {
  if (epsilon > 0 && is_pruned(student, target, epsilon)) return;
  const double far = student - target, span = start - target;
  sum.numerator += far * far;
  sum.denominator += span * span;
  sum.kept += 1;
}

// The first threads take what is left beyond the last whole pack.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const T* __restrict__ student, const T* __restrict__ target, const T* __restrict__ start,
               T epsilon, int64_t p, Partial* __restrict__ partials) {  // [p] x 3, partials [gridDim.x]
  using P = Pack<T, kWidth>;
  Partial sum{0, 0, 0};
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x, packs = p / kWidth;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < packs; i += step) {
    const P x = reinterpret_cast<const P*>(student)[i], y = reinterpret_cast<const P*>(target)[i],
            z = reinterpret_cast<const P*>(start)[i];
    for (int k = 0; k < kWidth; ++k) add(x.at[k], y.at[k], z.at[k], epsilon, sum);
  }
  const int64_t left = packs * kWidth + first;
  if (left < p) add(student[left], target[left], start[left], epsilon, sum);
  sum.numerator = block_sum(sum.numerator);
  sum.denominator = block_sum(sum.denominator);
  sum.kept = block_sum(sum.kept);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) finish_kernel(const Partial* __restrict__ partials, int count,
                                                          T* loss, int64_t* kept, double* denominator) {
  Partial sum{0, 0, 0};
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    sum.numerator += partials[i].numerator;
    sum.denominator += partials[i].denominator;
    sum.kept += partials[i].kept;
  }
  sum.numerator = block_sum(sum.numerator);
  sum.denominator = block_sum(sum.denominator);
  sum.kept = block_sum(sum.kept);
  if (threadIdx.x == 0) {
    const bool degenerate = sum.denominator == 0;
    denominator[0] = degenerate ? INFINITY : sum.denominator;
    kept[0] = degenerate ? 0 : sum.kept;
    loss[0] = static_cast<T>(sum.numerator / denominator[0]);
  }
}

template <class T>
__device__ __forceinline__ T gradient_of(T student, T target, T epsilon, T scale) {
  return epsilon > 0 && is_pruned(student, target, epsilon) ? T(0) : scale * (student - target);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(const T* __restrict__ grad, const double* __restrict__ denominator,
                    const T* __restrict__ student, const T* __restrict__ target, T epsilon, int64_t p,
                    T* __restrict__ gradient) {  // [p] x 3
  using P = Pack<T, kWidth>;
  const T scale = static_cast<T>(2 * static_cast<double>(grad[0]) / denominator[0]);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x, packs = p / kWidth;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < packs; i += step) {
    const P x = reinterpret_cast<const P*>(student)[i], y = reinterpret_cast<const P*>(target)[i];
    P g;
    for (int k = 0; k < kWidth; ++k) g.at[k] = gradient_of(x.at[k], y.at[k], epsilon, scale);
    reinterpret_cast<P*>(gradient)[i] = g;
  }
  const int64_t left = packs * kWidth + first;
  if (left < p) gradient[left] = gradient_of(student[left], target[left], epsilon, scale);
}

template <class T>
bool aligned(const T* a, const T* b, const T* c) {
  const auto bits =
      reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | reinterpret_cast<uintptr_t>(c);
  return bits % 16 == 0;
}

int blocks(int64_t packs) {
  const int64_t wanted = (packs + kThreads - 1) / kThreads;
  return static_cast<int>(wanted < 1 ? 1 : wanted < kMaxBlocks ? wanted : kMaxBlocks);
}

int64_t scratch_bytes(int64_t p) { return blocks(p) * static_cast<int64_t>(sizeof(Partial)); }

template <class T, int kWidth>
int forward_as(const T* student, const T* target, const T* start, double epsilon, int64_t p,
               Partial* partials, T* loss, int64_t* kept, double* denominator, const Queue& queue) {
  const int grid = blocks(p / kWidth);
  DDPP_LAUNCH((sum_kernel<T, kWidth>), grid, kThreads, 0, queue.stream, student, target, start,
              static_cast<T>(epsilon), p, partials);
  DDPP_LAUNCH(finish_kernel<T>, 1, kThreads, 0, queue.stream, partials, grid, loss, kept, denominator);
  return static_cast<int>(cudaGetLastError());
}

template <class T>
int forward(const T* student, const T* target, const T* start, double epsilon, int64_t p, void* scratch,
            T* loss, int64_t* kept, double* denominator, const Queue& queue) {
  const auto run = aligned(student, target, start) ? forward_as<T, 16 / sizeof(T)> : forward_as<T, 1>;
  return run(student, target, start, epsilon, p, static_cast<Partial*>(scratch), loss, kept, denominator,
             queue);
}

template <class T, int kWidth>
int backward_as(const T* grad, const double* denominator, const T* student, const T* target, double epsilon,
                int64_t p, T* gradient, const Queue& queue) {
  DDPP_LAUNCH((gradient_kernel<T, kWidth>), blocks(p / kWidth), kThreads, 0, queue.stream, grad, denominator,
              student, target, static_cast<T>(epsilon), p, gradient);
  return static_cast<int>(cudaGetLastError());
}

template <class T>
int backward(const T* grad, const double* denominator, const T* student, const T* target, double epsilon,
             int64_t p, T* gradient, const Queue& queue) {
  const auto run = aligned<T>(student, target, gradient) ? backward_as<T, 16 / sizeof(T)> : backward_as<T, 1>;
  return run(grad, denominator, student, target, epsilon, p, gradient, queue);
}

}  // namespace

template <class T>
const MatchLoss<T>& match_loss_cuda() {
  static const MatchLoss<T> launchers{scratch_bytes, forward<T>, backward<T>};
  return launchers;
}
template const MatchLoss<float>& match_loss_cuda();
template const MatchLoss<double>& match_loss_cuda();

}  // namespace ddpp
