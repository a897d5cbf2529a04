#include "kernels/norm_pool.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/isa_target.h"

namespace ddpp {
namespace DDPP_ISA {
namespace {

#if defined(DDPP_ISA_avx512)
constexpr int kRegister = 64;  // bytes
#elif defined(DDPP_ISA_avx2)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif
constexpr int64_t kTaskBytes = 128;  // of a pixel's channels in one task: their planes stay in the L2 cache
constexpr int64_t kCacheBytes = 32 << 20;
constexpr int64_t kThreadValues = 1 << 15;  // values worth a thread

template <class Register>
DDPP_INLINE void stream(void* to, const Register& x) {
#if defined(DDPP_ISA_avx512)
  _mm512_stream_si512(static_cast<__m512i*>(to), reinterpret_cast<const __m512i&>(x));
#elif defined(DDPP_ISA_avx2)
  _mm256_stream_si256(static_cast<__m256i*>(to), reinterpret_cast<const __m256i&>(x));
#elif defined(__x86_64__)
  _mm_stream_si128(static_cast<__m128i*>(to), reinterpret_cast<const __m128i&>(x));
#else
  std::memcpy(to, &x, sizeof x);
#endif
}

// Makes what was stored past the caches visible to other threads.
inline void end_stores() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// A value for each of kLanes channels, in registers. Plain arrays would not stay in registers, and the
// compiler computes vectors longer than a register lane by lane.
template <class T, int kLanes>
struct Lanes {
  static constexpr int kPart = kLanes * int{sizeof(T)} < kRegister ? kLanes : kRegister / int{sizeof(T)};
  static constexpr int kParts = kLanes / kPart, kCount = kLanes;
  typedef T Part __attribute__((vector_size(kPart * sizeof(T))));

  static DDPP_INLINE Lanes load(const T* from) {
    Lanes x;
    for (int k = 0; k < kParts; ++k) std::memcpy(&x.part[k], from + k * kPart, sizeof(Part));
    return x;
  }
  static DDPP_INLINE Lanes fill(T value) {
    Lanes x{};
    for (int k = 0; k < kParts; ++k) x.part[k] += value;
    return x;
  }
  DDPP_INLINE void store(T* to) const {
    for (int k = 0; k < kParts; ++k) std::memcpy(to + k * kPart, &part[k], sizeof(Part));
  }
  // Past the caches, where a register is full; `to` is aligned to one, and end_stores() follows some time.
  DDPP_INLINE void store_past_caches(T* to) const {
    if constexpr (kPart * int{sizeof(T)} < kRegister) {
      store(to);
    } else {
      for (int k = 0; k < kParts; ++k) stream(to + k * kPart, part[k]);
    }
  }
  // x where z > 0 or z is NaN, 0 elsewhere
  friend DDPP_INLINE Lanes where_active(const Lanes& z, const Lanes& x) {
    Lanes result;
    for (int k = 0; k < kParts; ++k) result.part[k] = z.part[k] <= 0 ? Part{} : x.part[k];
    return result;
  }
  friend DDPP_INLINE Lanes operator+(Lanes a, const Lanes& b) {
    for (int k = 0; k < kParts; ++k) a.part[k] += b.part[k];
    return a;
  }
  friend DDPP_INLINE Lanes operator-(Lanes a, const Lanes& b) {
    for (int k = 0; k < kParts; ++k) a.part[k] -= b.part[k];
    return a;
  }
  friend DDPP_INLINE Lanes operator*(Lanes a, const Lanes& b) {
    for (int k = 0; k < kParts; ++k) a.part[k] *= b.part[k];
    return a;
  }
  friend DDPP_INLINE Lanes operator*(Lanes a, T b) {
    for (int k = 0; k < kParts; ++k) a.part[k] *= b;
    return a;
  }

  Part part[kParts];
};

// A sum by rows: its rounding error grows with height + width, not with their product.
template <class V>
struct Sum {
  DDPP_INLINE void add(const V& x) { row = row + x; }
  DDPP_INLINE void end_row() {
    total = total + row;
    row = V{};
  }
  V row{}, total{};
};

#include "kernels/norm_pool_terms.inl"

// The order in which a kernel goes through the planes of one image, and where a pixel's neighbours are.
struct Sweep {
  explicit Sweep(const PlaneBatch& size)
      : right(size.channels), down(size.width * size.channels), height(size.height), width(size.width) {}

  // window(at, pooled) at every 2x2 window, with the offsets of its first pixel and of its pooled pixel;
  // border(at) at every pixel outside the windows. The sums are told where rows end.
  template <class Window, class Border, class... Sums>
  DDPP_INLINE void windows(const Window& window, const Border& border, Sums&... sums) const {
    int64_t pooled = 0;
    for (int64_t y = 0; y + 1 < height; y += 2) {
      int64_t at = y * down;
      for (int64_t x = 0; x + 1 < width; x += 2, at += 2 * right, pooled += right) window(at, pooled);
      if (width % 2) {
        border(at);
        border(at + down);
      }
      (sums.end_row(), ...);
    }
    if (height % 2) {
      for (int64_t x = 0; x < width; ++x) border((height - 1) * down + x * right);
      (sums.end_row(), ...);
    }
  }

  template <class Pixel, class... Sums>
  DDPP_INLINE void pixels(const Pixel& pixel, Sums&... sums) const {
    windows([&](int64_t at, int64_t) DDPP_LAMBDA { in_window(at, pixel); }, pixel, sums...);
  }

  template <class Pixel>
  DDPP_INLINE void in_window(int64_t at, const Pixel& pixel) const {
    pixel(at);
    pixel(at + right);
    pixel(at + down);
    pixel(at + down + right);
  }

  int64_t right, down, height, width;
};

// Some channels of one image, by their offsets.
struct Block {
  Sweep sweep;
  int64_t plane, pooled, channel;
  int64_t statistic;                        // in a row of statistics or of partial sums
  int64_t row_size;                         // of those rows
  double part;                              // 1 / pixels of a plane
  int64_t next_plane = 0, next_pooled = 0;  // from here to the next block, which is fetched meanwhile

  template <class T>
  DDPP_INLINE T* row(T* statistics, int which) const {
    return statistics + which * row_size + statistic;
  }
};

// Into the L2 cache, in a sweep that writes little.
template <class V, class T>
DDPP_INLINE void fetch(const T* from) {
  for (size_t k = 0; k < sizeof(V); k += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(from) + k, 0, 2);
}

// The mean to the precision of T. It is exact where the plane is constant, so that its normalised values are
// 0.
template <class V, class T>
DDPP_INLINE V rough_mean(const Block& block, const T* y) {
  const V first = V::load(y);
  Sum<V> sum;
  block.sweep.pixels([&](int64_t at) DDPP_LAMBDA { sum.add(V::load(y + at) - first); }, sum);
  return first + sum.total * static_cast<T>(block.part);
}

template <class V, class T>
DDPP_INLINE V reciprocal_deviation(const V& variance, T eps) {
  T x[V::kCount];
  variance.store(x);
  for (T& v : x) v = 1 / std::sqrt((v < 0 ? 0 : v) + eps);
  return V::load(x);
}

// with the statistics that a forward face wrote
template <class V, class T>
DDPP_INLINE Norm<V> saved_norm(const Block& block, const T* statistics, const T* scale, const T* shift) {
  return {V::load(block.row(statistics, kMean)), V::load(block.row(statistics, kRest)),
          V::load(block.row(statistics, kRstd)), V::load(scale + block.channel),
          V::load(shift + block.channel)};
}

template <bool kPastCaches, class V, class T>
DDPP_INLINE void store(const V& x, T* to) {
  if constexpr (kPastCaches) {
    x.store_past_caches(to);
  } else {
    x.store(to);
  }
}

constexpr auto nothing = [](int64_t) {};

// ---- the faces, each on one block ----

template <bool kPastCaches, int kLanes, class T>
void forward_block(const Block& block, const T* y, const T* scale, const T* shift, double eps, T* out,
                   T* statistics) {
  using V = Lanes<T, kLanes>;
  y += block.plane;
  out += block.pooled;
  const V rough = rough_mean<V>(block, y);
  Sum<V> sum, squares;
  block.sweep.pixels(
      [&](int64_t at) DDPP_LAMBDA {
        fetch<V>(y + at + block.next_plane);
        const V d = V::load(y + at) - rough;
        sum.add(d);
        squares.add(d * d);
      },
      sum, squares);
  const T part = static_cast<T>(block.part);
  const V rest = sum.total * part;
  const V rstd = reciprocal_deviation(squares.total * part - rest * rest, static_cast<T>(eps));
  rough.store(block.row(statistics, kMean));
  rest.store(block.row(statistics, kRest));
  rstd.store(block.row(statistics, kRstd));
  const Norm<V> norm(rough, rest, rstd, V::load(scale + block.channel), V::load(shift + block.channel));
  block.sweep.windows(
      [&](int64_t at, int64_t pooled) DDPP_LAMBDA {
        V pool{};
        block.sweep.in_window(at, [&](int64_t pixel) DDPP_LAMBDA {
          const V z = norm(norm.deviation(V::load(y + pixel)));
          pool = pool + where_active(z, z);
        });
        store<kPastCaches>(pool * T(0.25), out + pooled);
      },
      nothing);
}

template <bool kPastCaches, int kLanes, class T>
void backward_block(const Block& block, const T* grad_out, const T* y, const T* scale, const T* shift,
                    const T* statistics, T* grad_y, T* grad_scale, T* grad_shift) {
  using V = Lanes<T, kLanes>;
  grad_out += block.pooled;
  y += block.plane;
  grad_y += block.plane;
  const auto norm = saved_norm<V>(block, statistics, scale, shift);
  Sum<V> sum, sum_deviation;  // of the gradient after ReLU, and of its product with the deviation
  block.sweep.windows(
      [&](int64_t at, int64_t pooled) DDPP_LAMBDA {
        V active{}, deviation{};
        block.sweep.in_window(at, [&](int64_t pixel) DDPP_LAMBDA {
          fetch<V>(y + pixel + block.next_plane);
          const V d = norm.deviation(V::load(y + pixel)), z = norm(d);
          active = active + where_active(z, V::fill(1));
          deviation = deviation + where_active(z, d);
        });
        const V grad = V::load(grad_out + pooled) * T(0.25);
        sum.add(grad * active);
        sum_deviation.add(grad * deviation);
      },
      nothing, sum, sum_deviation);
  const BackwardTerms<V> terms(norm, sum.total, sum_deviation.total, static_cast<T>(block.part));
  terms.grad_scale.store(grad_scale + block.statistic);
  terms.grad_shift.store(grad_shift + block.statistic);
  const auto write = [&](int64_t pixel, const V& d, const V& grad) DDPP_LAMBDA {
    store<kPastCaches>(grad + terms.constant - d * terms.slope, grad_y + pixel);
  };
  block.sweep.windows(
      [&](int64_t at, int64_t pooled) DDPP_LAMBDA {
        fetch<V>(grad_out + pooled + block.next_pooled);
        const V grad = V::load(grad_out + pooled) * T(0.25) * norm.gain;
        block.sweep.in_window(at, [&](int64_t pixel) DDPP_LAMBDA {
          const V d = norm.deviation(V::load(y + pixel));
          write(pixel, d, where_active(norm(d), grad));
        });
      },
      [&](int64_t pixel) DDPP_LAMBDA { write(pixel, norm.deviation(V::load(y + pixel)), V{}); });
}

template <bool kPastCaches, int kLanes, class T>
void dual_block(const Block& block, Dual<const T> y, Dual<const T> scale, Dual<const T> shift, double eps,
                Dual<T> out, T* statistics) {
  using V = Lanes<T, kLanes>;
  y = {y.value + block.plane, y.tangent + block.plane};
  out = {out.value + block.pooled, out.tangent + block.pooled};
  const V rough = rough_mean<V>(block, y.value), tangent_rough = rough_mean<V>(block, y.tangent);
  Sum<V> sum, squares, tangent_sum, products;
  block.sweep.pixels(
      [&](int64_t at) DDPP_LAMBDA {
        fetch<V>(y.value + at + block.next_plane);
        const V d = V::load(y.value + at) - rough, t = V::load(y.tangent + at) - tangent_rough;
        sum.add(d);
        squares.add(d * d);
        tangent_sum.add(t);
        products.add(d * t);
      },
      sum, squares, tangent_sum, products);
  const T part = static_cast<T>(block.part);
  const V rest = sum.total * part, tangent_rest = tangent_sum.total * part;
  const V rstd = reciprocal_deviation(squares.total * part - rest * rest, static_cast<T>(eps));
  const Tangent<V> tangent{tangent_rough, tangent_rest, rstd * (products.total * part - rest * tangent_rest)};
  rough.store(block.row(statistics, kMean));
  rest.store(block.row(statistics, kRest));
  rstd.store(block.row(statistics, kRstd));
  tangent.mean.store(block.row(statistics, kTangentMean));
  tangent.rest.store(block.row(statistics, kTangentRest));
  tangent.covariance.store(block.row(statistics, kCovariance));
  const Norm<V> norm(rough, rest, rstd, V::load(scale.value + block.channel),
                     V::load(shift.value + block.channel));
  const DualTerms<V> terms(norm, tangent, V::load(scale.tangent + block.channel),
                           V::load(shift.tangent + block.channel));
  block.sweep.windows(
      [&](int64_t at, int64_t pooled) DDPP_LAMBDA {
        V pool{}, tangent_pool{};
        block.sweep.in_window(at, [&](int64_t pixel) DDPP_LAMBDA {
          fetch<V>(y.tangent + pixel + block.next_plane);
          const V d = norm.deviation(V::load(y.value + pixel)), z = norm(d);
          pool = pool + where_active(z, z);
          const V t = tangent.deviation(V::load(y.tangent + pixel));
          tangent_pool = tangent_pool + where_active(z, d * terms.slope + t * norm.gain + terms.constant);
        });
        store<kPastCaches>(pool * T(0.25), out.value + pooled);
        store<kPastCaches>(tangent_pool * T(0.25), out.tangent + pooled);
      },
      nothing);
}

template <bool kPastCaches, int kLanes, class T>
void dual_backward_block(const Block& block, Dual<const T> grad_out, Dual<const T> y, Dual<const T> scale,
                         const T* shift, const T* statistics, Dual<T> grad_y, T* grad_scale, T* grad_shift) {
  using V = Lanes<T, kLanes>;
  grad_out = {grad_out.value + block.pooled, grad_out.tangent + block.pooled};
  y = {y.value + block.plane, y.tangent + block.plane};
  grad_y = {grad_y.value + block.plane, grad_y.tangent + block.plane};
  const auto norm = saved_norm<V>(block, statistics, scale.value, shift);
  const Tangent<V> tangent{V::load(block.row(statistics, kTangentMean)),
                           V::load(block.row(statistics, kTangentRest)),
                           V::load(block.row(statistics, kCovariance))};
  Sum<V> u_sum, u_deviation, v_sum, v_deviation, v_tangent;
  block.sweep.windows(
      [&](int64_t at, int64_t pooled) DDPP_LAMBDA {
        V active{}, deviation{}, tangent_deviation{};
        block.sweep.in_window(at, [&](int64_t pixel) DDPP_LAMBDA {
          fetch<V>(y.value + pixel + block.next_plane);
          fetch<V>(y.tangent + pixel + block.next_plane);
          const V d = norm.deviation(V::load(y.value + pixel)), z = norm(d);
          active = active + where_active(z, V::fill(1));
          deviation = deviation + where_active(z, d);
          tangent_deviation =
              tangent_deviation + where_active(z, tangent.deviation(V::load(y.tangent + pixel)));
        });
        const V u = V::load(grad_out.value + pooled) * T(0.25),
                v = V::load(grad_out.tangent + pooled) * T(0.25);
        u_sum.add(u * active);
        u_deviation.add(u * deviation);
        v_sum.add(v * active);
        v_deviation.add(v * deviation);
        v_tangent.add(v * tangent_deviation);
      },
      nothing, u_sum, u_deviation, v_sum, v_deviation, v_tangent);

  const DualBackwardTerms<V> terms(
      norm, tangent, V::load(scale.tangent + block.channel),
      {u_sum.total, u_deviation.total, v_sum.total, v_deviation.total, v_tangent.total},
      static_cast<T>(block.part));
  terms.grad_scale.store(grad_scale + block.statistic);
  terms.grad_shift.store(grad_shift + block.statistic);
  const auto write = [&](int64_t pixel, const V& d, const V& grad, const V& tangent_grad) DDPP_LAMBDA {
    const V t = tangent.deviation(V::load(y.tangent + pixel));
    store<kPastCaches>(grad + terms.constant - d * terms.slope - t * terms.tangent_slope,
                       grad_y.value + pixel);
    store<kPastCaches>(tangent_grad + terms.tangent_constant - d * terms.tangent_slope,
                       grad_y.tangent + pixel);
  };
  block.sweep.windows(
      [&](int64_t at, int64_t pooled) DDPP_LAMBDA {
        fetch<V>(grad_out.value + pooled + block.next_pooled);
        fetch<V>(grad_out.tangent + pooled + block.next_pooled);
        const V u = V::load(grad_out.value + pooled) * T(0.25),
                v = V::load(grad_out.tangent + pooled) * T(0.25);
        const V grad = u * norm.gain + v * terms.v_gain, tangent_grad = v * norm.gain;
        block.sweep.in_window(at, [&](int64_t pixel) DDPP_LAMBDA {
          const V d = norm.deviation(V::load(y.value + pixel)), z = norm(d);
          write(pixel, d, where_active(z, grad), where_active(z, tangent_grad));
        });
      },
      [&](int64_t pixel) DDPP_LAMBDA { write(pixel, norm.deviation(V::load(y.value + pixel)), V{}, V{}); });
}

// ---- whole batches ----

// Cuts `count` channels into blocks of powers of two.
template <int kLanes, class Face>
void cut(const Face& face, Block block, int64_t count) {
  for (; count >= kLanes; count -= kLanes) {
    face(std::integral_constant<int, kLanes>(), block);
    block.plane += kLanes;
    block.pooled += kLanes;
    block.channel += kLanes;
    block.statistic += kLanes;
  }
  if constexpr (kLanes > 1) cut<kLanes / 2>(face, block, count);
}

// face(lanes, block) on every block of the batch.
template <class T, class Face>
void for_each_block(const PlaneBatch& size, const Queue& queue, const Face& face) {
  constexpr int64_t kTask = kTaskBytes / sizeof(T);
  const int64_t tasks = (size.channels + kTask - 1) / kTask, area = size.height * size.width;
  const int64_t pooled_area = (size.height / 2) * (size.width / 2);
  const auto block_of = [=](int64_t i) {
    const int64_t n = i / tasks, channel = i % tasks * kTask;
    return Block{Sweep(size),
                 n * area * size.channels + channel,
                 n * pooled_area * size.channels + channel,
                 channel,
                 n * size.channels + channel,
                 size.n * size.channels,
                 1.0 / static_cast<double>(area)};
  };
  parallel_for(queue, size.n * tasks, 1 + kThreadValues / (area * kTask), [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Block block = block_of(i);
      const Block next = block_of(i + 1 < end ? i + 1 : i);
      block.next_plane = next.plane - block.plane;
      block.next_pooled = next.pooled - block.pooled;
      const int64_t left = size.channels - block.channel;
      cut<2 * kRegister / int{sizeof(T)}>(face, block, left < kTask ? left : kTask);
    }
    end_stores();
  });
}

// The same with face(past_caches, lanes, block): whether to store past the caches. That saves reading the
// memory that is written over, where planes are more than the caches hold.
template <class T, class Face, class... Written>
void for_each_block_past_caches(const PlaneBatch& size, const Queue& queue, const Face& face,
                                Written... written) {
  const int64_t pixel_bytes = size.channels * static_cast<int64_t>(sizeof(T));
  const uintptr_t bits = (reinterpret_cast<uintptr_t>(written) | ... | static_cast<uintptr_t>(pixel_bytes));
  if (size.n * size.height * size.width * pixel_bytes >= kCacheBytes && bits % kRegister == 0) {
    for_each_block<T>(size, queue, [=](auto lanes, const Block& b) { face(std::true_type(), lanes, b); });
  } else {
    for_each_block<T>(size, queue, [=](auto lanes, const Block& b) { face(std::false_type(), lanes, b); });
  }
}

// to = the sum of partial over images, in their order.
template <class T>
void sum_images(const T* partial, const PlaneBatch& size, T* to) {
  constexpr int64_t kWidth = 64;
  for (int64_t c = 0; c < size.channels; c += kWidth) {
    const int64_t count = size.channels - c < kWidth ? size.channels - c : kWidth;
    double sum[kWidth] = {};
    for (int64_t n = 0; n < size.n; ++n)
      for (int64_t k = 0; k < count; ++k) sum[k] += partial[n * size.channels + c + k];
    for (int64_t k = 0; k < count; ++k) to[c + k] = static_cast<T>(sum[k]);
  }
}

template <class T>
int64_t scratch_bytes(const PlaneBatch& size) {
  return 2 * size.n * size.channels * static_cast<int64_t>(sizeof(T));
}

template <class T>
int forward(const T* y, const T* scale, const T* shift, double eps, const PlaneBatch& size, T* out,
            T* statistics, const Queue& queue) {
  const auto face = [=](auto past_caches, auto lanes, const Block& block) {
    forward_block<past_caches.value, lanes.value>(block, y, scale, shift, eps, out, statistics);
  };
  for_each_block_past_caches<T>(size, queue, face, out);
  return 0;
}

template <class T>
int backward(const T* grad_out, const T* y, const T* scale, const T* shift, const T* statistics,
             const PlaneBatch& size, void* scratch, T* grad_y, T* grad_scale, T* grad_shift,
             const Queue& queue) {
  T *scale_sums = static_cast<T*>(scratch), *shift_sums = scale_sums + size.n * size.channels;
  const auto face = [=](auto past_caches, auto lanes, const Block& block) {
    backward_block<past_caches.value, lanes.value>(block, grad_out, y, scale, shift, statistics, grad_y,
                                                   scale_sums, shift_sums);
  };
  for_each_block_past_caches<T>(size, queue, face, grad_y);
  sum_images(scale_sums, size, grad_scale);
  sum_images(shift_sums, size, grad_shift);
  return 0;
}

template <class T>
int dual(Dual<const T> y, Dual<const T> scale, Dual<const T> shift, double eps, const PlaneBatch& size,
         Dual<T> out, T* statistics, const Queue& queue) {
  const auto face = [=](auto past_caches, auto lanes, const Block& block) {
    dual_block<past_caches.value, lanes.value>(block, y, scale, shift, eps, out, statistics);
  };
  for_each_block_past_caches<T>(size, queue, face, out.value, out.tangent);
  return 0;
}

template <class T>
int dual_backward(Dual<const T> grad_out, Dual<const T> y, Dual<const T> scale, const T* shift,
                  const T* statistics, const PlaneBatch& size, void* scratch, Dual<T> grad_y, T* grad_scale,
                  T* grad_shift, const Queue& queue) {
  T *scale_sums = static_cast<T*>(scratch), *shift_sums = scale_sums + size.n * size.channels;
  const auto face = [=](auto past_caches, auto lanes, const Block& block) {
    dual_backward_block<past_caches.value, lanes.value>(block, grad_out, y, scale, shift, statistics, grad_y,
                                                        scale_sums, shift_sums);
  };
  for_each_block_past_caches<T>(size, queue, face, grad_y.value, grad_y.tangent);
  sum_images(scale_sums, size, grad_scale);
  sum_images(shift_sums, size, grad_shift);
  return 0;
}

}  // namespace

template <class T>
const NormPool<T>& norm_pool() {
  static const NormPool<T> launchers{scratch_bytes<T>, forward<T>, backward<T>, dual<T>, dual_backward<T>};
  return launchers;
}
template const NormPool<float>& norm_pool();
template const NormPool<double>& norm_pool();

}  // namespace DDPP_ISA
}  // namespace ddpp

DDPP_ISA_END
