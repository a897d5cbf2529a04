// One block works on a group of channels of one image: thread (lane, stripe) on `lane`'s pack of channels (16
// bytes to calculate with) at every stripe-th 2x2 window. Each plane is read once from device memory: at the
// beginning each thread asks for all its pixels, which are copied to shared memory past the registers, so
// that as much as fits there is on its way at once. Where planes are too large for that, or their sides odd,
// every sweep reads them through the caches.
//
// Device memory traffic in values per value of y (P = 1/4 for a pooled plane):
//   forward 1 + P, backward 2 + P, dual 2 + 2 P, dual_backward 4 + 2 P.
// For y of (100, 128, 32, 32) in float32 that is 66, 118, 131 and 236 MB, in bfloat16 half of it.
#include "kernels/norm_pool.h"

#include <type_traits>

#include "kernels/cuda_compat.h"
#include "kernels/pack.cuh"
#include "kernels/reduce.cuh"

#define DDPP_INLINE __device__ __forceinline__

namespace ddpp {
namespace {

// Threads of a block; the dual kernels take many where a multiprocessor has room for the planes of one block
// only.
constexpr int kFew = 256, kMany = 512;
// Threads that fit on a multiprocessor together, by registers: as many as need no spills.
template <class T>
constexpr int kForwardThreads = sizeof(T) == 4 ? 1024 : 512;
template <class S, bool kStaged>
constexpr int kBackwardThreads = std::is_same_v<S, float> && kStaged ? 768 : 512;
template <class S, bool kStaged>
constexpr int kDualThreads = kBackwardThreads<S, kStaged>;
constexpr int kDualBackwardThreads = 512;
// Bytes of shared memory for planes: at least two blocks on a multiprocessor of the largest GPUs, or one.
constexpr int64_t kMaxStaged = 96 * 1024, kMaxDualStaged = 200 * 1024;
constexpr int64_t kDefaultShared = 48 * 1024;  // that need no permission
constexpr int64_t kSector = 32, kLine = 128;   // bytes that device memory gives at once, that caches look up
constexpr int kEnoughBlocks = 2;               // of a multiprocessor
// Packs of a window in shared memory: four of each plane, one of each pooled plane.
constexpr int kForwardKept = 4, kBackwardKept = 4 + 1, kDualKept = 2 * 4, kDualBackwardKept = 2 * (4 + 1);

template <class T, int kWidth, class F>
DDPP_INLINE Pack<T, kWidth> each(const F& f) {
  Pack<T, kWidth> result;
  for (int k = 0; k < kWidth; ++k) result.at[k] = f(k);
  return result;
}

template <class T, int kWidth>
DDPP_INLINE Pack<T, kWidth> operator+(const Pack<T, kWidth>& a, const Pack<T, kWidth>& b) {
  return each<T, kWidth>([&](int k) { return a.at[k] + b.at[k]; });
}
template <class T, int kWidth>
DDPP_INLINE Pack<T, kWidth> operator-(const Pack<T, kWidth>& a, const Pack<T, kWidth>& b) {
  return each<T, kWidth>([&](int k) { return a.at[k] - b.at[k]; });
}
template <class T, int kWidth>
DDPP_INLINE Pack<T, kWidth> operator*(const Pack<T, kWidth>& a, const Pack<T, kWidth>& b) {
  return each<T, kWidth>([&](int k) { return a.at[k] * b.at[k]; });
}
template <class T, int kWidth>
DDPP_INLINE Pack<T, kWidth> operator*(const Pack<T, kWidth>& a, T b) {
  return each<T, kWidth>([&](int k) { return a.at[k] * b; });
}
// x where z > 0 or z is NaN, 0 elsewhere
template <class T, int kWidth>
DDPP_INLINE Pack<T, kWidth> where_active(const Pack<T, kWidth>& z, const Pack<T, kWidth>& x) {
  return each<T, kWidth>([&](int k) { return z.at[k] <= 0 ? T(0) : x.at[k]; });
}
DDPP_INLINE float reciprocal_root(float x) { return rsqrtf(x); }
DDPP_INLINE double reciprocal_root(double x) { return 1 / sqrt(x); }
template <class T, int kWidth>
DDPP_INLINE Pack<T, kWidth> reciprocal_deviation(const Pack<T, kWidth>& variance, T eps) {
  return each<T, kWidth>(
      [&](int k) { return reciprocal_root((variance.at[k] < 0 ? 0 : variance.at[k]) + eps); });
}

// A pack as it is stored. The compiler would take a load of four Bfloat16 apart into loads of single values.
template <class S, int kWidth>
using Stored = std::conditional_t<std::is_same_v<S, Bfloat16> && kWidth == 4, uint2, Pack<S, kWidth>>;

template <class T, int kWidth>
DDPP_INLINE Pack<T, kWidth> unpacked(const Pack<T, kWidth>& x) {
  return x;
}
DDPP_INLINE Pack<float, 1> unpacked(const Pack<Bfloat16, 1>& x) { return {{x.at[0]}}; }
DDPP_INLINE Pack<float, 4> unpacked(const uint2& x) {
  return {{lower_bfloat16(x.x), upper_bfloat16(x.x), lower_bfloat16(x.y), upper_bfloat16(x.y)}};
}

DDPP_INLINE void store_whole(Bfloat16* to, const Pack<float, 4>& x) {
  __stwb(reinterpret_cast<uint2*>(to),
         make_uint2(bfloat16_pair(x.at[0], x.at[1]), bfloat16_pair(x.at[2], x.at[3])));
}

#include "kernels/norm_pool_terms.inl"

// How a batch is cut into blocks.
struct Layout {
  int64_t n, channels, row;  // images; values from a pixel to the next and to the one below
  int height, width;
  int tall, wide;        // windows, of an odd last row or column too
  int lane_bits, lanes;  // packs of a block, a power of two up to a warp
  int down, right;       // from a thread's window to its next one
  int64_t row_size;      // of a row of statistics
  double part;           // what a pixel is of its plane
};

// A thread's place; it keeps kKept packs of each window in shared memory. Threads beyond the last channel or
// image do nothing, but reach every barrier. kEven: no window is partly outside.
template <class T, int kWidth, int kKept, bool kEven>
struct Place {
  using V = Pack<T, kWidth>;

  explicit DDPP_INLINE Place(const Layout& layout) : layout(layout) {
    const int64_t n = int64_t{blockIdx.z} * gridDim.y + blockIdx.y;
    lane = static_cast<int>(threadIdx.x) & (layout.lanes - 1);
    stripe = static_cast<int>(threadIdx.x) >> layout.lane_bits;
    first_y = static_cast<int>(static_cast<unsigned>(stripe) / static_cast<unsigned>(layout.wide));
    first_x = stripe - first_y * layout.wide;
    channel = (static_cast<int64_t>(blockIdx.x) * layout.lanes + lane) * kWidth;
    active = channel < layout.channels && n < layout.n;
    plane = n * layout.height * layout.row + channel;
    pooled = n * (layout.height / 2) * (layout.width / 2) * layout.channels + channel;
    statistic = n * layout.channels + channel;
  }
  DDPP_INLINE T part() const { return static_cast<T>(layout.part); }
  template <class S>
  static DDPP_INLINE V load(const S* from) {
    return unpacked(*reinterpret_cast<const Stored<S, kWidth>*>(from));
  }
  template <class S>
  static DDPP_INLINE void store(S* to, const V& x) {
    store_whole(to, x);
  }
  DDPP_INLINE V of_channel(const T* from) const { return active ? load(from + channel) : V{}; }
  DDPP_INLINE V saved(const T* statistics, int row) const {
    return active ? load(statistics + row * layout.row_size + statistic) : V{};
  }
  DDPP_INLINE void save(T* statistics, int row, const V& x) const {  // one thread for each pack
    if (active && stripe == 0) store(statistics + row * layout.row_size + statistic, x);
  }

  // window(at, pooled, slot) at each of this thread's windows: the offsets of its first and of its pooled
  // pixel (-1: partly outside, not pooled), and the place of its first pack among those of the thread.
  template <class F>
  DDPP_INLINE void windows(const F& window) const {
    if (!active) return;
    for (int y = first_y, x = first_x, slot = 0; y < layout.tall; slot += kKept) {
      const Window at{plane + 2 * (y * layout.row + x * layout.channels), kEven || 2 * x + 1 < layout.width,
                      kEven || 2 * y + 1 < layout.height, slot};
      const bool whole = at.right && at.below;
      window(at, whole ? pooled + (y * (layout.width / 2) + x) * layout.channels : int64_t{-1});
      y += layout.down;
      x += layout.right;
      if (x >= layout.wide) x -= layout.wide, ++y;
    }
  }

  struct Window {
    int64_t at;
    bool right, below;  // whether it has pixels there
    int slot;
  };
  // pixel(offset, slot) at the pixels of a window
  template <class F>
  DDPP_INLINE void in_window(const Window& window, const F& pixel) const {
    pixel(window.at, window.slot);
    if (window.right) pixel(window.at + layout.channels, window.slot + 1);
    if (window.below) pixel(window.at + layout.row, window.slot + 2);
    if (window.right && window.below) pixel(window.at + layout.row + layout.channels, window.slot + 3);
  }
  template <class F>
  DDPP_INLINE void pixels(const F& pixel) const {
    windows([&](const Window& window, int64_t) { in_window(window, pixel); });
  }

  const Layout layout;
  int lane, stripe, first_y, first_x;
  int64_t channel, plane, pooled, statistic;
  bool active;
};

// Planes, or pooled planes, that are read several times: where this thread keeps its pixels, once it has
// fetched them and waited; no barrier is needed. Or through the caches.
template <class S, int kWidth, bool kStaged, int kThreads>
struct Plane {
  using X = Stored<S, kWidth>;
  using V = Pack<Arithmetic<S>, kWidth>;
  DDPP_INLINE void fetch(int64_t at, int slot) const {
    if (kStaged) copy_async(stage + slot * kThreads + threadIdx.x, of_device(at));
  }
  DDPP_INLINE V operator()(int64_t at, int slot) const {
    const X x = kStaged ? stage[slot * kThreads + threadIdx.x] : *of_device(at);
    return unpacked(x);
  }
  DDPP_INLINE const X* of_device(int64_t at) const { return reinterpret_cast<const X*>(from + at); }
  const S* from;
  X* stage;
};

// Which of a thread's windows have arrived: those that it has fetched do so one after the other, so that what
// is there is worked on while the others are on their way.
template <bool kStaged>
struct Arrivals {
  DDPP_INLINE void fetched() {
    if (kStaged) end_copies(), ++coming;
  }
  DDPP_INLINE void wait() {
    if (kStaged) wait_for_copies(--coming);
  }
  int coming = 0;
};

// Replaces each of the sums by the sum over the block's threads of the same lane.
template <int kThreads, int kSums, class T, int kWidth, int kKept, bool kEven>
DDPP_INLINE void sum_stripes(Pack<T, kWidth> (&sums)[kSums], const Place<T, kWidth, kKept, kEven>& place,
                             Pack<T, kWidth>* scratch) {
  constexpr int kWarps = kThreads / kWarpSize;
  const int lanes = place.layout.lanes, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  for (int s = 0; s < kSums; ++s) {
    for (int offset = kWarpSize / 2; offset >= lanes; offset /= 2)
      sums[s] =
          sums[s] + each<T, kWidth>([&](int k) { return __shfl_xor_sync(kFullWarp, sums[s].at[k], offset); });
    if (static_cast<int>(threadIdx.x) % kWarpSize < lanes)
      scratch[(s * kWarps + warp) * lanes + place.lane] = sums[s];
  }
  __syncthreads();
  for (int s = 0; s < kSums; ++s) {
    sums[s] = scratch[s * kWarps * lanes + place.lane];
    for (int w = 1; w < kWarps; ++w) sums[s] = sums[s] + scratch[(s * kWarps + w) * lanes + place.lane];
  }
  __syncthreads();  // scratch may be used again
}

template <class T, int kWidth, int kKept, bool kEven>
DDPP_INLINE Norm<Pack<T, kWidth>> saved_norm(const Place<T, kWidth, kKept, kEven>& place, const T* statistics,
                                             const T* scale, const T* shift) {
  return {place.saved(statistics, kMean), place.saved(statistics, kRest), place.saved(statistics, kRstd),
          place.of_channel(scale), place.of_channel(shift)};
}

// Shared memory for planes, behind the scratch of so many sums.
template <class S, int kThreads, class T, int kWidth>
DDPP_INLINE Stored<S, kWidth>* behind_sums(Pack<T, kWidth>* shared, const Layout& layout, int sums) {
  return reinterpret_cast<Stored<S, kWidth>*>(shared + kThreads / kWarpSize * layout.lanes * sums);
}

template <class S, int kWidth, bool kStaged, class T = Arithmetic<S>>
__global__ void __launch_bounds__(kFew, kForwardThreads<T> / kFew)
    forward_kernel(const S* __restrict__ y, const T* __restrict__ scale, const T* __restrict__ shift, T eps,
                   Layout layout, S* __restrict__ out, T* __restrict__ statistics) {
  using V = Pack<T, kWidth>;
  DDPP_DYNAMIC_SHARED(V, shared);
  const Place<T, kWidth, kForwardKept, kStaged> place(layout);
  const Plane<S, kWidth, kStaged, kFew> planes{y, behind_sums<S, kFew>(shared, layout, 2)};
  Arrivals<kStaged> arrivals;
  place.windows([&](const auto& window, int64_t) {
    place.in_window(window, [&](int64_t at, int slot) { planes.fetch(at, slot); });
    arrivals.fetched();
  });
  const V start =
      place.active ? place.load(y + place.plane) : V{};  // makes the mean of a constant plane exact
  V first[1] = {};
  place.windows([&](const auto& window, int64_t) {
    arrivals.wait();
    place.in_window(window, [&](int64_t at, int slot) { first[0] = first[0] + (planes(at, slot) - start); });
  });
  sum_stripes<kFew>(first, place, shared);
  const V mean = start + first[0] * place.part();
  V sums[2] = {};
  place.pixels([&](int64_t at, int slot) {
    const V d = planes(at, slot) - mean;
    sums[0] = sums[0] + d;
    sums[1] = sums[1] + d * d;
  });
  sum_stripes<kFew>(sums, place, shared);
  const V rest = sums[0] * place.part();
  const V rstd = reciprocal_deviation(sums[1] * place.part() - rest * rest, eps);
  place.save(statistics, kMean, mean);
  place.save(statistics, kRest, rest);
  place.save(statistics, kRstd, rstd);
  const Norm<V> norm(mean, rest, rstd, place.of_channel(scale), place.of_channel(shift));
  place.windows([&](const auto& window, int64_t pooled) {
    if (pooled < 0) return;
    V pool{};
    place.in_window(window, [&](int64_t at, int slot) {
      const V z = norm(norm.deviation(planes(at, slot)));
      pool = pool + where_active(z, z);
    });
    place.store(out + pooled, pool * T(0.25));
  });
}

template <class S, int kWidth, bool kStaged, class T = Arithmetic<S>>
__global__ void __launch_bounds__(kFew, kBackwardThreads<S, kStaged> / kFew)
    backward_kernel(const S* __restrict__ grad_out, const S* y, const T* __restrict__ scale,
                    const T* __restrict__ shift, const T* __restrict__ statistics, Layout layout, S* grad_y,
                    T* __restrict__ grad_scale, T* __restrict__ grad_shift) {
  using V = Pack<T, kWidth>;
  DDPP_DYNAMIC_SHARED(V, shared);
  const Place<T, kWidth, kBackwardKept, kStaged> place(layout);
  auto* const stage = behind_sums<S, kFew>(shared, layout, 2);
  const Plane<S, kWidth, kStaged, kFew> planes{y, stage}, grads{grad_out, stage + 4 * kFew};
  Arrivals<kStaged> arrivals;
  place.windows([&](const auto& window, int64_t pooled) {
    if (pooled >= 0) grads.fetch(pooled, window.slot);
    place.in_window(window, [&](int64_t at, int slot) { planes.fetch(at, slot); });
    arrivals.fetched();
  });
  const auto norm = saved_norm(place, statistics, scale, shift);
  V sums[2] = {};  // of the gradient behind ReLU, and of its product with the deviation
  place.windows([&](const auto& window, int64_t pooled) {
    arrivals.wait();
    const V grad = pooled < 0 ? V{} : grads(pooled, window.slot) * T(0.25);
    place.in_window(window, [&](int64_t at, int slot) {
      const V d = norm.deviation(planes(at, slot)), g = where_active(norm(d), grad);
      sums[0] = sums[0] + g;
      sums[1] = sums[1] + g * d;
    });
  });
  sum_stripes<kFew>(sums, place, shared);
  const BackwardTerms<V> terms(norm, sums[0], sums[1], place.part());
  place.save(grad_scale, 0, terms.grad_scale);
  place.save(grad_shift, 0, terms.grad_shift);
  place.windows([&](const auto& window, int64_t pooled) {
    const V grad = pooled < 0 ? V{} : grads(pooled, window.slot) * T(0.25) * norm.gain;
    place.in_window(window, [&](int64_t at, int slot) {
      const V d = norm.deviation(planes(at, slot));
      place.store(grad_y + at, where_active(norm(d), grad) + terms.constant - d * terms.slope);
    });
  });
}

template <class S, int kWidth, bool kStaged, int kThreads, class T = Arithmetic<S>>
__global__ void __launch_bounds__(kThreads, kThreads == kFew ? kDualThreads<S, kStaged> / kThreads : 1)
    dual_kernel(Dual<const S> y, Dual<const T> scale, Dual<const T> shift, T eps, Layout layout, Dual<S> out,
                T* __restrict__ statistics) {
  using V = Pack<T, kWidth>;
  DDPP_DYNAMIC_SHARED(V, shared);
  const Place<T, kWidth, kDualKept, kStaged> place(layout);
  auto* const stage = behind_sums<S, kThreads>(shared, layout, 4);
  const Plane<S, kWidth, kStaged, kThreads> values{y.value, stage}, tangents{y.tangent, stage + 4 * kThreads};
  Arrivals<kStaged> arrivals;
  place.windows([&](const auto& window, int64_t) {
    place.in_window(window, [&](int64_t at, int slot) {
      values.fetch(at, slot);
      tangents.fetch(at, slot);
    });
    arrivals.fetched();
  });
  const V start = place.active ? place.load(y.value + place.plane) : V{};
  const V tangent_start = place.active ? place.load(y.tangent + place.plane) : V{};
  V first[2] = {};
  place.windows([&](const auto& window, int64_t) {
    arrivals.wait();
    place.in_window(window, [&](int64_t at, int slot) {
      first[0] = first[0] + (values(at, slot) - start);
      first[1] = first[1] + (tangents(at, slot) - tangent_start);
    });
  });
  sum_stripes<kThreads>(first, place, shared);
  const V mean = start + first[0] * place.part(), tangent_mean = tangent_start + first[1] * place.part();
  V sums[4] = {};
  place.pixels([&](int64_t at, int slot) {
    const V d = values(at, slot) - mean, t = tangents(at, slot) - tangent_mean;
    sums[0] = sums[0] + d;
    sums[1] = sums[1] + d * d;
    sums[2] = sums[2] + t;
    sums[3] = sums[3] + d * t;
  });
  sum_stripes<kThreads>(sums, place, shared);
  const V rest = sums[0] * place.part(), tangent_rest = sums[2] * place.part();
  const V rstd = reciprocal_deviation(sums[1] * place.part() - rest * rest, eps);
  const Tangent<V> tangent{tangent_mean, tangent_rest, rstd * (sums[3] * place.part() - rest * tangent_rest)};
  place.save(statistics, kMean, mean);
  place.save(statistics, kRest, rest);
  place.save(statistics, kRstd, rstd);
  place.save(statistics, kTangentMean, tangent.mean);
  place.save(statistics, kTangentRest, tangent.rest);
  place.save(statistics, kCovariance, tangent.covariance);
  const Norm<V> norm(mean, rest, rstd, place.of_channel(scale.value), place.of_channel(shift.value));
  const DualTerms<V> terms(norm, tangent, place.of_channel(scale.tangent), place.of_channel(shift.tangent));
  place.windows([&](const auto& window, int64_t pooled) {
    if (pooled < 0) return;
    V pool{}, tangent_pool{};
    place.in_window(window, [&](int64_t at, int slot) {
      const V d = norm.deviation(values(at, slot)), z = norm(d);
      const V t = tangent.deviation(tangents(at, slot));
      pool = pool + where_active(z, z);
      tangent_pool = tangent_pool + where_active(z, d * terms.slope + t * norm.gain + terms.constant);
    });
    place.store(out.value + pooled, pool * T(0.25));
    place.store(out.tangent + pooled, tangent_pool * T(0.25));
  });
}

template <class S, int kWidth, bool kStaged, int kThreads, class T = Arithmetic<S>>
__global__ void __launch_bounds__(kThreads, kDualBackwardThreads / kThreads)
    dual_backward_kernel(Dual<const S> grad_out, Dual<const S> y, Dual<const T> scale,
                         const T* __restrict__ shift, const T* __restrict__ statistics, Layout layout,
                         Dual<S> grad_y, T* __restrict__ grad_scale, T* __restrict__ grad_shift) {
  using V = Pack<T, kWidth>;
  DDPP_DYNAMIC_SHARED(V, shared);
  const Place<T, kWidth, kDualBackwardKept, kStaged> place(layout);
  auto* const stage = behind_sums<S, kThreads>(shared, layout, 5);
  const Plane<S, kWidth, kStaged, kThreads> values{y.value, stage}, tangents{y.tangent, stage + 4 * kThreads},
      us{grad_out.value, stage + 8 * kThreads}, vs{grad_out.tangent, stage + 9 * kThreads};
  Arrivals<kStaged> arrivals;
  place.windows([&](const auto& window, int64_t pooled) {
    if (pooled >= 0) us.fetch(pooled, window.slot), vs.fetch(pooled, window.slot);
    place.in_window(window, [&](int64_t at, int slot) {
      values.fetch(at, slot);
      tangents.fetch(at, slot);
    });
    arrivals.fetched();
  });
  const auto norm = saved_norm(place, statistics, scale.value, shift);
  const Tangent<V> tangent{place.saved(statistics, kTangentMean), place.saved(statistics, kTangentRest),
                           place.saved(statistics, kCovariance)};
  V sums[5] = {};
  place.windows([&](const auto& window, int64_t pooled) {
    arrivals.wait();
    const V u = pooled < 0 ? V{} : us(pooled, window.slot) * T(0.25);
    const V v = pooled < 0 ? V{} : vs(pooled, window.slot) * T(0.25);
    place.in_window(window, [&](int64_t at, int slot) {
      const V d = norm.deviation(values(at, slot)), t = tangent.deviation(tangents(at, slot));
      const V z = norm(d), u_active = where_active(z, u), v_active = where_active(z, v);
      sums[0] = sums[0] + u_active;
      sums[1] = sums[1] + u_active * d;
      sums[2] = sums[2] + v_active;
      sums[3] = sums[3] + v_active * d;
      sums[4] = sums[4] + v_active * t;
    });
  });
  sum_stripes<kThreads>(sums, place, shared);
  const DualBackwardTerms<V> terms(norm, tangent, place.of_channel(scale.tangent),
                                   {sums[0], sums[1], sums[2], sums[3], sums[4]}, place.part());
  place.save(grad_scale, 0, terms.grad_scale);
  place.save(grad_shift, 0, terms.grad_shift);
  place.windows([&](const auto& window, int64_t pooled) {
    const V u = pooled < 0 ? V{} : us(pooled, window.slot) * T(0.25);
    const V v = pooled < 0 ? V{} : vs(pooled, window.slot) * T(0.25);
    const V grad = u * norm.gain + v * terms.v_gain, tangent_grad = v * norm.gain;
    place.in_window(window, [&](int64_t at, int slot) {
      const V d = norm.deviation(values(at, slot)), t = tangent.deviation(tangents(at, slot));
      const V z = norm(d);
      place.store(grad_y.value + at,
                  where_active(z, grad) + terms.constant - d * terms.slope - t * terms.tangent_slope);
      place.store(grad_y.tangent + at,
                  where_active(z, tangent_grad) + terms.tangent_constant - d * terms.tangent_slope);
    });
  });
}

// to[c] = the sum over n of partial[n][c], for both pairs. A block sums one warp's width of channels.
template <class T>
__global__ void __launch_bounds__(kFew)
    sum_images_kernel(const T* __restrict__ partial, int64_t n, int64_t channels, T* __restrict__ to_first,
                      T* __restrict__ to_second) {
  constexpr int kWarps = kFew / kWarpSize;
  DDPP_SHARED(double, sums, kFew);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize,
            warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane;
  const T* from = partial + blockIdx.y * n * channels;
  double sum = 0;
  if (channel < channels)
    for (int64_t i = warp; i < n; i += kWarps) sum += from[i * channels + channel];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp == 0 && channel < channels) {
    for (int w = 1; w < kWarps; ++w) sum += sums[w * kWarpSize + lane];
    (blockIdx.y == 0 ? to_first : to_second)[channel] = static_cast<T>(sum);
  }
}

// ---- launchers ----

struct Launch {
  Layout layout;
  dim3 grid;  // groups of an image's channels, images
  int threads;
  int64_t shared_bytes, most_shared;
  bool staged;
};

// For a kernel with scratch for so many sums, that keeps so many packs of a window in so much shared memory,
// and may be launched with so many threads a block.
template <class S, int kWidth>
Launch make_launch(const PlaneBatch& size, int sums, int kept, int64_t most_staged, int most_threads) {
  constexpr int64_t kBytes = sizeof(Stored<S, kWidth>), kSumBytes = sizeof(Pack<Arithmetic<S>, kWidth>);
  const int64_t packs = size.channels / kWidth;
  const int tall = static_cast<int>(size.height + 1) / 2, wide = static_cast<int>(size.width + 1) / 2,
            windows = tall * wide;
  const bool even = size.height % 2 == 0 && size.width % 2 == 0;
  const int64_t available = max_shared_bytes(),
                most_shared = available < most_staged ? available : most_staged;
  int threads = kFew;
  const auto scratch = [&](int lanes) { return kSumBytes * (threads / kWarpSize) * lanes * sums; };
  const auto staged = [&](int lanes) {
    const int stripes = threads / lanes, each = (windows + stripes - 1) / stripes;
    return scratch(lanes) + kBytes * threads * each * kept;
  };
  const auto groups = [&](int lanes) { return (packs + lanes - 1) / lanes; };
  int lanes = 1;
  while (lanes < kWarpSize && lanes < packs && (lanes * kBytes < kSector || lanes * windows < threads))
    lanes *= 2;
  // Up to a line where shared memory and the number of blocks allow it: of narrower pieces the second-level
  // cache has more to look up than it can.
  while (lanes < kWarpSize && lanes < packs && lanes * kBytes < kLine && staged(2 * lanes) <= most_shared &&
         size.n * groups(2 * lanes) >= kEnoughBlocks * multiprocessors())
    lanes *= 2;
  int lane_bits = 0;
  while (1 << lane_bits < lanes) ++lane_bits;
  const bool fits = even && staged(lanes) <= most_shared;
  if (fits && 2 * staged(lanes) > available) {
    threads = most_threads;
    if (staged(lanes) > most_shared) threads = kFew;
  }
  const int stripes = threads / lanes;
  const Layout layout{size.n,
                      size.channels,
                      size.width * size.channels,
                      static_cast<int>(size.height),
                      static_cast<int>(size.width),
                      tall,
                      wide,
                      lane_bits,
                      lanes,
                      stripes / wide,
                      stripes % wide,
                      size.n * size.channels,
                      1.0 / static_cast<double>(size.height * size.width)};
  const auto rows = static_cast<unsigned>(size.n < kMaxGridRows ? size.n : kMaxGridRows);
  const auto layers = static_cast<unsigned>((size.n + kMaxGridRows - 1) / kMaxGridRows);
  const dim3 grid(static_cast<unsigned>(groups(lanes)), rows, layers);
  return {layout, grid, threads, fits ? staged(lanes) : scratch(lanes), most_shared, fits};
}

template <class... Parameters, class... Arguments>
int start(void (*kernel)(Parameters...), const Launch& launch, const Queue& queue, Arguments... arguments) {
  if (launch.layout.n == 0 || launch.layout.channels == 0) return 0;
  if (launch.shared_bytes > kDefaultShared) {
    // The same for all shapes: the limit is the kernel's, and graphs captured with larger ones need theirs.
    const auto error = DDPP_ALLOW_SHARED(kernel, launch.most_shared);
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  DDPP_LAUNCH(kernel, launch.grid, launch.threads, launch.shared_bytes, queue.stream, arguments...);
  return static_cast<int>(cudaGetLastError());
}

template <class T>
int sum_images(const T* partial, const PlaneBatch& size, T* to_first, T* to_second, const Queue& queue) {
  if (size.channels == 0) return 0;
  const dim3 grid(static_cast<unsigned>((size.channels + kWarpSize - 1) / kWarpSize), 2);
  DDPP_LAUNCH(sum_images_kernel<T>, grid, kFew, 0, queue.stream, partial, size.n, size.channels, to_first,
              to_second);
  return static_cast<int>(cudaGetLastError());
}

template <class S>  // values of a pack
constexpr int kPack = 16 / sizeof(Arithmetic<S>);

template <class S, class... Pointers>
bool packs_fit(const PlaneBatch& size, Pointers... pointers) {
  const uintptr_t bits = (reinterpret_cast<uintptr_t>(pointers) | ...);
  return bits % 16 == 0 && size.channels % kPack<S> == 0;
}

template <class S>
int64_t scratch_bytes(const PlaneBatch& size) {
  return 2 * size.n * size.channels * static_cast<int64_t>(sizeof(Arithmetic<S>));
}

template <class S, int kWidth, class T = Arithmetic<S>>
int forward_as(const S* y, const T* scale, const T* shift, double eps, const PlaneBatch& size, S* out,
               T* statistics, const Queue& queue) {
  const Launch launch = make_launch<S, kWidth>(size, 2, kForwardKept, kMaxStaged, kFew);
  const auto kernel = launch.staged ? forward_kernel<S, kWidth, true> : forward_kernel<S, kWidth, false>;
  return start(kernel, launch, queue, y, scale, shift, static_cast<T>(eps), launch.layout, out, statistics);
}

template <class S, class T = Arithmetic<S>>
int forward(const S* y, const T* scale, const T* shift, double eps, const PlaneBatch& size, S* out,
            T* statistics, const Queue& queue) {
  const auto run =
      packs_fit<S>(size, y, scale, shift, out, statistics) ? forward_as<S, kPack<S>> : forward_as<S, 1>;
  return run(y, scale, shift, eps, size, out, statistics, queue);
}

template <class S, int kWidth, class T = Arithmetic<S>>
int backward_as(const S* grad_out, const S* y, const T* scale, const T* shift, const T* statistics,
                const PlaneBatch& size, void* scratch, S* grad_y, T* grad_scale, T* grad_shift,
                const Queue& queue) {
  const Launch launch = make_launch<S, kWidth>(size, 2, kBackwardKept, kMaxStaged, kFew);
  const auto kernel = launch.staged ? backward_kernel<S, kWidth, true> : backward_kernel<S, kWidth, false>;
  T *scale_sums = static_cast<T*>(scratch), *shift_sums = scale_sums + size.n * size.channels;
  const int error = start(kernel, launch, queue, grad_out, y, scale, shift, statistics, launch.layout, grad_y,
                          scale_sums, shift_sums);
  return error ? error : sum_images<T>(scale_sums, size, grad_scale, grad_shift, queue);
}

template <class S, class T = Arithmetic<S>>
int backward(const S* grad_out, const S* y, const T* scale, const T* shift, const T* statistics,
             const PlaneBatch& size, void* scratch, S* grad_y, T* grad_scale, T* grad_shift,
             const Queue& queue) {
  const auto run = packs_fit<S>(size, grad_out, y, scale, shift, statistics, scratch, grad_y)
                       ? backward_as<S, kPack<S>>
                       : backward_as<S, 1>;
  return run(grad_out, y, scale, shift, statistics, size, scratch, grad_y, grad_scale, grad_shift, queue);
}

template <class S, int kWidth, class T = Arithmetic<S>>
int dual_as(Dual<const S> y, Dual<const T> scale, Dual<const T> shift, double eps, const PlaneBatch& size,
            Dual<S> out, T* statistics, const Queue& queue) {
  const Launch launch = make_launch<S, kWidth>(size, 4, kDualKept, kMaxDualStaged, kMany);
  const auto kernel = !launch.staged           ? dual_kernel<S, kWidth, false, kFew>
                      : launch.threads == kFew ? dual_kernel<S, kWidth, true, kFew>
                                               : dual_kernel<S, kWidth, true, kMany>;
  return start(kernel, launch, queue, y, scale, shift, static_cast<T>(eps), launch.layout, out, statistics);
}

template <class S, class T = Arithmetic<S>>
int dual(Dual<const S> y, Dual<const T> scale, Dual<const T> shift, double eps, const PlaneBatch& size,
         Dual<S> out, T* statistics, const Queue& queue) {
  const auto run = packs_fit<S>(size, y.value, y.tangent, scale.value, scale.tangent, shift.value,
                                shift.tangent, out.value, out.tangent, statistics)
                       ? dual_as<S, kPack<S>>
                       : dual_as<S, 1>;
  return run(y, scale, shift, eps, size, out, statistics, queue);
}

template <class S, int kWidth, class T = Arithmetic<S>>
int dual_backward_as(Dual<const S> grad_out, Dual<const S> y, Dual<const T> scale, const T* shift,
                     const T* statistics, const PlaneBatch& size, void* scratch, Dual<S> grad_y,
                     T* grad_scale, T* grad_shift, const Queue& queue) {
  const Launch launch = make_launch<S, kWidth>(size, 5, kDualBackwardKept, kMaxDualStaged, kMany);
  const auto kernel = !launch.staged           ? dual_backward_kernel<S, kWidth, false, kFew>
                      : launch.threads == kFew ? dual_backward_kernel<S, kWidth, true, kFew>
                                               : dual_backward_kernel<S, kWidth, true, kMany>;
  T *scale_sums = static_cast<T*>(scratch), *shift_sums = scale_sums + size.n * size.channels;
  const int error = start(kernel, launch, queue, grad_out, y, scale, shift, statistics, launch.layout, grad_y,
                          scale_sums, shift_sums);
  return error ? error : sum_images<T>(scale_sums, size, grad_scale, grad_shift, queue);
}

template <class S, class T = Arithmetic<S>>
int dual_backward(Dual<const S> grad_out, Dual<const S> y, Dual<const T> scale, const T* shift,
                  const T* statistics, const PlaneBatch& size, void* scratch, Dual<S> grad_y, T* grad_scale,
                  T* grad_shift, const Queue& queue) {
  const auto run = packs_fit<S>(size, grad_out.value, grad_out.tangent, y.value, y.tangent, scale.value,
                                scale.tangent, shift, statistics, scratch, grad_y.value, grad_y.tangent)
                       ? dual_backward_as<S, kPack<S>>
                       : dual_backward_as<S, 1>;
  return run(grad_out, y, scale, shift, statistics, size, scratch, grad_y, grad_scale, grad_shift, queue);
}

}  // namespace

template <class S>
const NormPool<S>& norm_pool_cuda() {
  static const NormPool<S> launchers{scratch_bytes<S>, forward<S>, backward<S>, dual<S>, dual_backward<S>};
  return launchers;
}
template const NormPool<float>& norm_pool_cuda();
template const NormPool<double>& norm_pool_cuda();
template const NormPool<Bfloat16>& norm_pool_cuda();

}  // namespace ddpp
