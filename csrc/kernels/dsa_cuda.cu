// One block augments one image in shared memory. Between reading it from device memory and writing it there
// lie a pass for crop, cutout, flip, scaling and colour together, and one for the rotation. In between the
// channels of a pixel stand side by side: one address serves the taps of all of them, and three values a
// pixel, an odd number, spread over all banks.
//
// In every pass a warp takes rows of pixels and its lanes the columns: no division finds a pixel's place, and
// what depends on the row alone is the same for the whole warp, branches too.

#include <type_traits>

#include "kernels/cuda_compat.h"
#include "kernels/dsa.h"
#include "kernels/dsa_plan.h"
#include "kernels/pack.cuh"
#include "kernels/reduce.cuh"

namespace ddpp {
namespace {

constexpr int kThreads = 512, kFewThreads = 256;
constexpr int64_t kFewPixels = 2048;        // of an image for which fewer threads do
constexpr int kBlocksResident = 2;          // of kThreads per multiprocessor
constexpr int64_t kMaxBlocks = 2147483647;  // one an image
constexpr int64_t kMaxScratchBlocks = 264;  // where each block needs scratch; further images take turns
constexpr int64_t kStaticShared = 1024;  // at least what sums and the runtime take of a block's shared memory
constexpr int kReach = 3;  // outputs of a resampling on one axis that take from a pixel, in every drawn plan

// A weighted sum of pixels, and the sum of its weights.
template <class T, int channels>
struct Mixture {
  T at[channels];
  T weight;

  __device__ __forceinline__ void add(T share, const T* pixel) {
    if (share == 0) return;  // the pixel may be outside; and what is not finite there stays there
    for (int c = 0; c < channels; ++c) at[c] += share * pixel[c];
    weight += share;
  }
};

__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % unsigned{kWarpSize}); }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x / unsigned{kWarpSize}); }
__device__ __forceinline__ bool within(int i, int begin, int end) { return i >= begin && i < end; }

__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
__device__ __forceinline__ double magnitude(double x) { return fabs(x); }

// Explicit multiply-adds: the compiler has no choice of roundings.
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

template <class T>
__device__ __forceinline__ T centre(int size) {
  return static_cast<T>(size - 1) / 2;
}

// ---- colour ----

// The three parts of colour are one affine map: of a value, the sum over its pixel's channels and the image's
// mean, which the saturation does not change.
template <class T, int channels>
struct Recolor {
  bool on;
  T own, shared, offset;

  __device__ Recolor(const Color& color, T mean)
      : on(color.on()),
        own(static_cast<T>(color.contrast) * color.saturation),
        shared(static_cast<T>(color.contrast) * (1 - static_cast<T>(color.saturation)) * (T(1) / channels)),
        offset((1 - static_cast<T>(color.contrast)) * mean + color.brightness) {}

  // Black has a colour, what is outside or cut out has none: the offset goes by the weight.
  __device__ __forceinline__ void operator()(Mixture<T, channels>* x) const {
    if (!on || x->weight == 0) return;
    T sum = x->at[0];
    for (int c = 1; c < channels; ++c) sum += x->at[c];
    const T rest = shared * sum + offset * x->weight;
    for (int c = 0; c < channels; ++c) x->at[c] = own * x->at[c] + rest;
  }
};

// ---- crop, cutout, flip and scaling: apart from the cutout's box, rows and columns are independent ----

// x between 0 and 1; NaN gives 0
__device__ __forceinline__ float saturated(float x) { return __saturatef(x); }
__device__ __forceinline__ double saturated(double x) { return clamped(x, 0.0, 1.0); }

// What a sample takes from a pixel at this distance, on one axis.
template <class T>
__device__ __forceinline__ T share(T distance) {
  return saturated(1 - magnitude(distance));
}

// From how far away outputs may take from a pixel: by more than the rounding errors of the sample points.
template <class T>
__device__ __forceinline__ T with_margin(T extent) {
  return extent * T(1.01) + T(0.01);
}

// The first of `count` pixels among which are all that lie from low to less than low + count.
template <class T>
__device__ __forceinline__ int first_candidate(T low, int count, int size) {
  return static_cast<int>(clamped(low + 1, T(0), static_cast<T>(size > count ? size - count : 0)));
}

// On one axis, the taps of a pixel of the result: the source's pixels from `first` on.
template <class T>
struct alignas(16) Taps {
  T weight[2];
  int first;
  unsigned cut;  // bit k: tap k lies in the rows, or columns, of the cutout's box
  __device__ bool cuts(int k) const { return cut >> k & 1; }
};
template <class T>
struct alignas(16) TransposedTaps {
  T weight[kReach];
  int first;
  __device__ static bool cuts(int) { return false; }  // the box is one of the result
};

// One axis of a Move and of the scaling that follows it, or whose transpose precedes it.
template <class T>
struct Axis {
  int size, shift;
  bool mirror;
  int begin, end;  // of the box
  T scale;

  __device__ int source(int i) const { return mirror ? shift - i : shift + i; }

  // The scaling's two taps, each taken through the move.
  __device__ void find(int i, Taps<T>* taps) const {
    T second;
    const T x = multiply_add(scale, static_cast<T>(i) - centre<T>(size), centre<T>(size));
    const int tap = locate(x, size, &second) - 1;
    Taps<T> found{};
    found.first = source(mirror ? tap + 1 : tap);
    for (int k = 0; k < 2; ++k) {
      const int moved = mirror ? tap + 1 - k : tap + k;
      if (within(moved, begin, end)) found.cut |= 1u << k;
      if (within(moved, 0, size) && within(found.first + k, 0, size))
        found.weight[k] = moved == tap ? 1 - second : second;
    }
    *taps = found;
  }

  // The transposed scaling collects the pixel that the move takes.
  __device__ void find(int i, TransposedTaps<T>* taps) const {
    const int from = source(i);
    const T u = static_cast<T>(from) - centre<T>(size), shrink = 1 / scale;
    TransposedTaps<T> found{};
    found.first =
        first_candidate(u * shrink + centre<T>(size) - with_margin(magnitude(shrink)), kReach, size);
    for (int k = 0; k < kReach; ++k) {
      const int to = found.first + k;
      if (within(from, 0, size) && to < size)
        found.weight[k] = share(multiply_add(scale, static_cast<T>(to) - centre<T>(size), -u));
    }
    *taps = found;
  }
};

// Whether a scaling's outputs that take from a pixel are no more than kReach on each axis.
template <class T>
__device__ bool narrow(const Linear<T>& scale) {
  return magnitude(scale.xx) > T(0.7) && magnitude(scale.yy) > T(0.7);
}

// ---- rotation ----

// Where the outputs lie that take from one input pixel: on each axis, less than a margin from the pixel's
// image under the inverse map. These are at most `rows` times `columns`; all, where there is no inverse.
template <class T>
struct Neighbourhood {
  int height, width;
  Linear<T> inverse;
  T row_margin, column_margin;
  int rows, columns;

  __device__ Neighbourhood(const Linear<T>& map, int height, int width)
      : height(height),
        width(width),
        inverse{},
        row_margin(0),
        column_margin(0),
        rows(height),
        columns(width) {
    const T det = map.xx * map.yy - map.xy * map.yx;
    if (!(det > T(1e-4) || det < T(-1e-4))) return;
    const T shrink = 1 / det;
    inverse = {map.yy * shrink, -map.xy * shrink, -map.yx * shrink, map.xx * shrink};
    row_margin = with_margin(magnitude(inverse.yx) + magnitude(inverse.yy));
    column_margin = with_margin(magnitude(inverse.xx) + magnitude(inverse.xy));
    rows = count(row_margin, height);
    columns = count(column_margin, width);
  }

  __device__ bool small() const { return rows == kReach && columns == kReach; }

  // of the pixel at (v, u) from the centre
  __device__ __forceinline__ int first_row(T v, T u) const {
    return first_candidate(inverse.yx * u + inverse.yy * v + (centre<T>(height) - row_margin), rows, height);
  }
  __device__ __forceinline__ int first_column(T v, T u) const {
    return first_candidate(inverse.xx * u + inverse.xy * v + (centre<T>(width) - column_margin), columns,
                           width);
  }

 private:
  __device__ static int count(T margin, int size) {
    return static_cast<int>(clamped(2 * margin + 1, static_cast<T>(kReach), static_cast<T>(size)));
  }
};

// ---- one block per image ----

// What a block works in: the taps of the rows and columns; an image of [height, width, channels]; another
// one, with a border of a row above and two below. In bytes from the beginning.
struct Layout {
  int64_t front, back, bytes;
};

// What the whole block needs of a row of the plan.
template <class T>
struct Stages {
  Color color;
  Move move;
  Linear<T> scale, rotation;
};

template <class T, int channels, bool transpose, int threads>
struct Block {
  static constexpr int warps = threads / kWarpSize;
  static constexpr int taps_each = transpose ? kReach : 2;
  static constexpr int pack = 16 / sizeof(T);
  using Mixed = Mixture<T, channels>;
  using AxisTaps = std::conditional_t<transpose, TransposedTaps<T>, Taps<T>>;

  int height, width, size;
  bool aligned;  // the image in device memory, to packs
  T *front, *back;
  AxisTaps* taps;

  __device__ Block(unsigned char* memory, const Layout& layout, int height, int width, bool aligned)
      : height(height),
        width(width),
        size(height * width),
        aligned(aligned),
        front(reinterpret_cast<T*>(memory + layout.front)),
        back(reinterpret_cast<T*>(memory + layout.back)),
        taps(reinterpret_cast<AxisTaps*>(memory)) {}

  __device__ void augment(const T* __restrict__ from, const float* p, T* __restrict__ to) const {
    clear_border();
    const Stages<T>& stages = find_stages(p);
    const T mean = total(load(from)) / static_cast<T>(channels * size);
    const Recolor<T, channels> recolor(stages.color, mean);
    if (!stages.rotation.on()) {
      move_and_scale(front, [&](int y, int x, Mixed mixed) {
        recolor(&mixed);
        for (int c = 0; c < channels; ++c) to[c * size + y * width + x] = mixed.at[c];
      });
      return;
    }
    move_and_scale(front, [&](int y, int x, Mixed mixed) {
      recolor(&mixed);
      for (int c = 0; c < channels; ++c) back[(y * width + x) * channels + c] = mixed.at[c];
    });
    __syncthreads();
    rotate(stages.rotation, to);
  }

  __device__ void adjoint(const T* __restrict__ from, const float* p, T* __restrict__ to) const {
    const Stages<T>& stages = find_stages(p);
    load(from);
    __syncthreads();
    T *source = front, *target = back;
    const auto next = [&] {
      __syncthreads();
      T* const swapped = source;
      source = target;
      target = swapped;
    };
    if (stages.rotation.on()) rotate_transposed(source, target, stages.rotation), next();
    if (!narrow(stages.scale)) {
      collect<false>(source, target, stages.scale, Neighbourhood<T>(stages.scale, height, width));
      next();
    }
    const Move move = stages.move;
    T sum = 0;
    move_and_scale(source, [&](int y, int x, const Mixed& mixed) {
      const bool cut = within(y, move.top, move.bottom) && within(x, move.left, move.right);
      for (int c = 0; c < channels; ++c) {
        const T value = cut ? T(0) : mixed.at[c];
        sum += value;
        target[(y * width + x) * channels + c] = value;
      }
    });
    const T mean = total(sum) / static_cast<T>(channels * size);
    store(target, Recolor<T, channels>(stages.color, mean), to);
  }

 private:
  // The sum over the block, in every thread. All threads take part; the barrier in it is one for them too.
  __device__ static T total(T value) {
    DDPP_SHARED(T, warp_totals, warps);
    value = warp_sum(value);
    if (lane() == 0) warp_totals[warp()] = value;
    __syncthreads();
    value = warp_sum(lane() < warps ? warp_totals[lane()] : T(0));
    return __shfl_sync(kFullWarp, value, 0);
  }

  // The taps, and the stages by the last thread; they can be read after the next barrier.
  __device__ const Stages<T>& find_stages(const float* p) const {
    DDPP_SHARED(Stages<T>, stages, 1);
    if (thread() == threads - 1)
      stages[0] = {make_color(p, transpose), make_move(p, height, width, transpose), make_scale<T>(p),
                   make_rotation<T>(p, height, width)};
    for (int i = thread(); i < height + width; i += threads) {
      const Move m = make_move(p, height, width, transpose);
      Linear<T> scale = make_scale<T>(p);
      if (transpose && !narrow(scale)) scale = {1, 0, 0, 1};
      if (i < height) {
        Axis<T>{height, m.dy, false, m.top, m.bottom, scale.yy}.find(i, taps + i);
      } else {
        Axis<T>{width, m.dx, m.mirror, m.left, m.right, scale.xx}.find(i - height, taps + i);
      }
    }
    return stages[0];
  }

  // Rotations read it. Only here is it written.
  __device__ void clear_border() const {
    const int row = width * channels;
    for (int i = thread(); i < row; i += threads) {
      back[i - row] = 0;
      back[height * row + i] = 0;
      back[height * row + row + i] = 0;
    }
  }

  // To the front. The sum of what this thread has copied.
  __device__ T load(const T* __restrict__ from) const {
    return aligned ? load_packs<pack>(from) : load_packs<1>(from);
  }
  template <int n>
  __device__ T load_packs(const T* __restrict__ from) const {
    using Values = Pack<T, n>;
    T sum = 0;
    DDPP_UNROLL(2)
    for (int i = thread(); i < size / n; i += threads) {
      Values planes[channels], pixels[channels];
      for (int c = 0; c < channels; ++c) planes[c] = reinterpret_cast<const Values*>(from + c * size)[i];
      for (int k = 0; k < n * channels; ++k) {
        pixels[k / n].at[k % n] = planes[k % channels].at[k / channels];
        sum += pixels[k / n].at[k % n];
      }
      for (int c = 0; c < channels; ++c) reinterpret_cast<Values*>(front)[i * channels + c] = pixels[c];
    }
    return sum;
  }

  __device__ void store(const T* image, const Recolor<T, channels>& recolor, T* __restrict__ to) const {
    aligned ? store_packs<pack>(image, recolor, to) : store_packs<1>(image, recolor, to);
  }
  template <int n>
  __device__ void store_packs(const T* image, const Recolor<T, channels>& recolor, T* __restrict__ to) const {
    using Values = Pack<T, n>;
    DDPP_UNROLL(2)
    for (int i = thread(); i < size / n; i += threads) {
      Values planes[channels], pixels[channels];
      for (int c = 0; c < channels; ++c) pixels[c] = reinterpret_cast<const Values*>(image)[i * channels + c];
      for (int k = 0; k < n; ++k) {
        Mixed pixel{{}, 1};
        for (int c = 0; c < channels; ++c)
          pixel.at[c] = pixels[(k * channels + c) / n].at[(k * channels + c) % n];
        recolor(&pixel);
        for (int c = 0; c < channels; ++c) planes[c].at[k] = pixel.at[c];
      }
      for (int c = 0; c < channels; ++c) store_whole(to + c * size + i * n, planes[c]);
    }
  }

  // put(y, x, mixture) for each pixel
  template <class Put>
  __device__ void move_and_scale(const T* from, const Put& put) const {
    for (int x = lane(); x < width; x += kWarpSize) {
      const AxisTaps column = taps[height + x];
      T uncut[taps_each];  // the column's weights in the rows of the box
      for (int k = 0; k < taps_each; ++k) uncut[k] = column.cuts(k) ? T(0) : column.weight[k];
      const T* const column_taps = from + column.first * channels;
      DDPP_UNROLL(1)
      for (int y = warp(); y < height; y += warps) {
        const AxisTaps row = taps[y];
        const T* tap = column_taps + row.first * width * channels;
        Mixed sum{};
        for (int j = 0; j < taps_each; ++j, tap += width * channels) {
          if (transpose && row.weight[j] == 0) continue;  // about one of three, for the whole warp
          for (int k = 0; k < taps_each; ++k)
            sum.add(row.weight[j] * (row.cuts(j) ? uncut[k] : column.weight[k]), tap + k * channels);
        }
        put(y, x, sum);
      }
    }
  }

  // from the back
  __device__ void rotate(const Linear<T>& shared_map, T* __restrict__ to) const {
    const Linear<T> map = shared_map;
    const T cy = centre<T>(height), cx = centre<T>(width);
    const T* const corner = back - (width + 1) * channels;  // where locate() counts from
    for (int x = lane(); x < width; x += kWarpSize) {
      const T u = static_cast<T>(x) - cx;
      for (int y = warp(); y < height; y += warps) {
        const T v = static_cast<T>(y) - cy;
        T below, right;
        const int row = locate(multiply_add(map.yx, u, multiply_add(map.yy, v, cy)), height, &below);
        const int column = locate(multiply_add(map.xx, u, multiply_add(map.xy, v, cx)), width, &right);
        const bool first_inside = within(column, 1, width + 1), second_inside = column < width;
        const T* tap = corner + (row * width + column) * channels;
        T sum[channels] = {};
        for (int k = 0; k < 2; ++k, tap += width * channels) {
          const T weight = k ? below : 1 - below;
          if (first_inside)
            for (int c = 0; c < channels; ++c) sum[c] += weight * (1 - right) * tap[c];
          if (second_inside)
            for (int c = 0; c < channels; ++c) sum[c] += weight * right * tap[channels + c];
        }
        T* const pixel = to + (y * width + x);
        for (int c = 0; c < channels; ++c) pixel[c * size] = sum[c];
      }
    }
  }

  __device__ void rotate_transposed(const T* from, T* to, const Linear<T>& map) const {
    const Neighbourhood<T> near(map, height, width);
    if (near.small()) {
      collect<true>(from, to, map, near);
    } else {
      collect<false>(from, to, map, near);
    }
  }

  // The transpose of a resampling. Every pixel collects, in a fixed order, from the candidates in its
  // neighbourhood; those that do not take from it have no weight.
  template <bool small>
  __device__ void collect(const T* from, T* to, const Linear<T>& shared_map,
                          const Neighbourhood<T>& near) const {
    const Linear<T> map = shared_map;
    const int rows = small ? kReach : near.rows, columns = small ? kReach : near.columns;
    for (int x = lane(); x < width; x += kWarpSize) {
      const T u = static_cast<T>(x) - centre<T>(width);
      for (int y = warp(); y < height; y += warps) {
        const T v = static_cast<T>(y) - centre<T>(height);
        const int row = near.first_row(v, u), column = near.first_column(v, u);
        const T first_v = static_cast<T>(row) - centre<T>(height);
        const T first_u = static_cast<T>(column) - centre<T>(width);
        const T* candidates = from + (row * width + column) * channels;
        Mixed sum{};
        for (int j = 0; j < rows; ++j, candidates += width * channels) {
          const T off_y = multiply_add(map.yy, first_v + static_cast<T>(j), -v);
          const T off_x = multiply_add(map.xy, first_v + static_cast<T>(j), -u);
          DDPP_UNROLL(kReach)
          for (int k = 0; k < columns; ++k) {
            const T to_u = first_u + static_cast<T>(k);
            const T weight =
                share(multiply_add(map.yx, to_u, off_y)) * share(multiply_add(map.xx, to_u, off_x));
            sum.add(weight, candidates + k * channels);
          }
        }
        for (int c = 0; c < channels; ++c) to[(y * width + x) * channels + c] = sum.at[c];
      }
    }
  }
};

// images, out [n, channels, height, width]; plan [n, 16]; scratch: a layout a block, or null: shared memory
template <class T, int channels, bool transpose, bool shared, int threads>
__global__ void __launch_bounds__(threads,
                                  shared && sizeof(T) == 4 ? kBlocksResident * kThreads / threads : 1)
    dsa_kernel(const T* __restrict__ images, const float* __restrict__ plan, int64_t n, int height, int width,
               bool aligned, Layout layout, unsigned char* __restrict__ scratch, T* __restrict__ out) {
  DDPP_DYNAMIC_SHARED(unsigned char, shared_memory);
  unsigned char* const memory =
      shared ? shared_memory : scratch + static_cast<int64_t>(blockIdx.x) * layout.bytes;
  const Block<T, channels, transpose, threads> block(memory, layout, height, width, aligned);
  int64_t i = blockIdx.x;
  do {
    const int64_t first = i * (channels * height * width);
    if constexpr (transpose) {
      block.adjoint(images + first, plan + i * kPlanSize, out + first);
    } else {
      block.augment(images + first, plan + i * kPlanSize, out + first);
    }
    i += gridDim.x;
    if constexpr (!shared) __syncthreads();  // the next image takes this one's memory
  } while (!shared && i < n);
}

template <class T>
Layout make_layout(const ImageBatch& batch) {
  const auto aligned = [](int64_t bytes) { return (bytes + 15) / 16 * 16; };
  const int64_t row = int64_t{batch.width} * batch.channels * sizeof(T), axes = batch.height + batch.width;
  const int64_t front = axes * static_cast<int64_t>(sizeof(TransposedTaps<T>));
  const int64_t back = front + aligned(batch.height * row) + aligned(row);
  return {front, back, back + aligned((batch.height + 2) * row)};
}

int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }

template <class T>
int64_t scratch_bytes(const ImageBatch& batch) {
  const int64_t bytes = make_layout<T>(batch).bytes;
  if (bytes + kStaticShared <= max_shared_bytes() && batch.n <= kMaxBlocks) return 0;
  return at_most(batch.n, kMaxScratchBlocks) * bytes;
}

template <class T, int channels, bool transpose, bool shared, int threads>
int launch(const T* images, const float* plan, const ImageBatch& batch, void* scratch, T* out,
           const Queue& queue) {
  const auto kernel = dsa_kernel<T, channels, transpose, shared, threads>;
  const Layout layout = make_layout<T>(batch);
  const auto bits = reinterpret_cast<uintptr_t>(images) | reinterpret_cast<uintptr_t>(out);
  const bool aligned = bits % 16 == 0 && int64_t{batch.height} * batch.width * sizeof(T) % 16 == 0;
  const int64_t bytes = shared ? layout.bytes : 0,
                blocks = shared ? batch.n : at_most(batch.n, kMaxScratchBlocks);
  if (shared) {
    // The same for all images: the limit is the kernel's, and graphs captured with larger ones need theirs.
    const int allowed = static_cast<int>(DDPP_ALLOW_SHARED(kernel, max_shared_bytes() - kStaticShared));
    if (allowed != 0) return allowed;
  }
  DDPP_LAUNCH(kernel, static_cast<unsigned>(blocks), threads, static_cast<size_t>(bytes), queue.stream,
              images, plan, batch.n, batch.height, batch.width, aligned, layout,
              static_cast<unsigned char*>(scratch), out);
  return static_cast<int>(cudaGetLastError());
}

template <class T, int channels, bool transpose>
int choose(const T* images, const float* plan, const ImageBatch& batch, void* scratch, T* out,
           const Queue& queue) {
  const bool few = int64_t{batch.height} * batch.width < kFewPixels;
  const auto launch_as = scratch_bytes<T>(batch) > 0 ? launch<T, channels, transpose, false, kThreads>
                         : few                       ? launch<T, channels, transpose, true, kFewThreads>
                                                     : launch<T, channels, transpose, true, kThreads>;
  return launch_as(images, plan, batch, scratch, out, queue);
}

template <class T, bool transpose>
int run(const T* images, const float* plan, const ImageBatch& batch, void* scratch, T* out,
        const Queue& queue) {
  if (batch.n * batch.channels * batch.height * batch.width == 0) return 0;
  const auto choose_for = batch.channels == 1 ? choose<T, 1, transpose> : choose<T, 3, transpose>;
  return choose_for(images, plan, batch, scratch, out, queue);
}

}  // namespace

template <class T>
const Dsa<T>& dsa_cuda() {
  static const Dsa<T> launchers{scratch_bytes<T>, run<T, false>, run<T, true>};
  return launchers;
}
template const Dsa<float>& dsa_cuda();
template const Dsa<double>& dsa_cuda();

}  // namespace ddpp
