// One block augments one image in shared memory: it is read from device memory once and written there once,
// and between lie only the passes that the image's row of the plan asks for. Drawn one group at a time, that
// is one. In between the channels of a pixel stand side by side: one address serves the taps of all of them,
// and three values a pixel, an odd number, spread over all banks.
//
// In a pass a warp takes rows of pixels and its lanes the columns: no division finds a pixel's place, and
// what depends on the row alone is the same for the whole warp, branches too. Colour and copies take packs.

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

// A weighted sum of pixels.
template <class T, int channels>
struct Mixture {
  T at[channels];

  __device__ __forceinline__ void add(T share, const T* pixel) {
    if (share == 0) return;  // the pixel may be outside; and what is not finite there stays there
    for (int c = 0; c < channels; ++c) at[c] += share * pixel[c];
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
  bool on = false;
  T own = 1, shared = 0, offset = 0;

  Recolor() = default;
  __device__ Recolor(const Color& color, T mean)
      : on(color.on()),
        own(static_cast<T>(color.contrast) * color.saturation),
        shared(static_cast<T>(color.contrast) * (1 - static_cast<T>(color.saturation)) * (T(1) / channels)),
        offset((1 - static_cast<T>(color.contrast)) * mean + color.brightness) {}

  __device__ __forceinline__ void operator()(Mixture<T, channels>* pixel) const {
    if (!on) return;
    T sum = pixel->at[0];
    for (int c = 1; c < channels; ++c) sum += pixel->at[c];
    const T rest = shared * sum + offset;
    for (int c = 0; c < channels; ++c) pixel->at[c] = own * pixel->at[c] + rest;
  }
};

// ---- crop, flip and scaling: rows and columns are independent ----

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

// On one axis, what a pixel of the result takes: the source's pixels from `first` on. Those outside have no
// weight.
template <class T>
struct alignas(16) Taps {
  T weight[kReach];
  int first;
};

// One axis of a Move and of the scaling that follows it, or whose transpose precedes it.
template <class T>
struct Axis {
  int size, shift;
  bool mirror;
  T scale;

  __device__ int source(int i) const { return mirror ? shift - i : shift + i; }

  // The move alone: one tap.
  __device__ Taps<T> moved(int i) const {
    Taps<T> found{};
    found.first = source(i);
    found.weight[0] = within(found.first, 0, size);
    return found;
  }

  // The scaling's two taps, each taken through the move.
  __device__ Taps<T> sampled(int i) const {
    T second;
    const T x = multiply_add(scale, static_cast<T>(i) - centre<T>(size), centre<T>(size));
    const int tap = locate(x, size, &second) - 1;
    Taps<T> found{};
    found.first = source(mirror ? tap + 1 : tap);
    for (int k = 0; k < 2; ++k) {
      const int moved = mirror ? tap + 1 - k : tap + k;
      if (within(moved, 0, size) && within(found.first + k, 0, size))
        found.weight[k] = moved == tap ? 1 - second : second;
    }
    return found;
  }

  // The transposed scaling collects the pixel that the move takes.
  __device__ Taps<T> collected(int i) const {
    const int from = source(i);
    const T u = static_cast<T>(from) - centre<T>(size), shrink = 1 / scale;
    Taps<T> found{};
    found.first =
        first_candidate(u * shrink + centre<T>(size) - with_margin(magnitude(shrink)), kReach, size);
    for (int k = 0; k < kReach; ++k) {
      const int to = found.first + k;
      if (within(from, 0, size) && to < size)
        found.weight[k] = share(multiply_add(scale, static_cast<T>(to) - centre<T>(size), -u));
    }
    return found;
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
// one. Above the first lies a row, below each of them two. In bytes from the beginning.
struct Layout {
  int64_t front, back, bytes;
};

// A row of the plan, asked for before the image so that it is on its way at the same time.
struct PlanRow {
  float at[kPlanSize];
  __device__ explicit PlanRow(const float* p) {
    for (int k = 0; k < kPlanSize; ++k) at[k] = p[k];
  }
};

// What the whole block needs of it.
template <class T>
struct Stages {
  Color color;
  Move move, box;  // the box is one of the image that is not yet, or no longer, moved
  Linear<T> scale, rotation;
};

template <class T, int channels, bool transpose, int threads>
struct Block {
  static constexpr int warps = threads / kWarpSize;
  static constexpr int most_taps = transpose ? kReach : 2;  // on an axis, under a scaling
  static constexpr int pack = 16 / sizeof(T);
  using Mixed = Mixture<T, channels>;

  int height, width, size;
  bool aligned;  // the image in device memory, to packs
  T *front, *back;
  Taps<T>* taps;

  __device__ Block(unsigned char* memory, const Layout& layout, int height, int width, bool aligned)
      : height(height),
        width(width),
        size(height * width),
        aligned(aligned),
        front(reinterpret_cast<T*>(memory + layout.front)),
        back(reinterpret_cast<T*>(memory + layout.back)),
        taps(reinterpret_cast<Taps<T>*>(memory)) {}

  __device__ void augment(const T* __restrict__ from, const float* p, T* __restrict__ to) const {
    const PlanRow row(p);
    const T sum = load(from);
    const Stages<T>& stages = find_stages(row.at);
    const T mean = total(sum) / static_cast<T>(channels * size);
    const Recolor<T, channels> recolor(stages.color, mean);
    const bool scaled = by_taps(stages.scale), moved = scaled || stages.move.moves(), cut = stages.box.cuts(),
               turned = stages.rotation.on();
    if (!moved && !cut && !turned) return store(front, recolor, to);
    if (recolor.on) paint(front, recolor), __syncthreads();
    if (cut) cut_out(front, stages.box), __syncthreads();
    if (!turned && !moved) return store(front, {}, to);
    if (!turned) return move_and_scale(front, scaled, planes_of(to));
    clear_border(moved ? back : front);
    if (moved) move_and_scale(front, scaled, pixels_of(back));
    __syncthreads();
    rotate(moved ? back : front, stages.rotation, to);
  }

  __device__ void adjoint(const T* __restrict__ from, const float* p, T* __restrict__ to) const {
    const PlanRow row(p);
    T sum = load(from);
    const Stages<T>& stages = find_stages(row.at);
    __syncthreads();
    const bool wide = !narrow(stages.scale), scaled = by_taps(stages.scale),
               moved = scaled || stages.move.moves(), cut = stages.box.cuts(), turned = stages.rotation.on(),
               colored = stages.color.on();
    T *source = front, *target = back;
    const auto next = [&] {
      __syncthreads();
      T* const swapped = source;
      source = target;
      target = swapped;
    };
    if (turned) rotate_transposed(source, target, stages.rotation), next();
    if (wide) {
      collect<false>(source, target, stages.scale, Neighbourhood<T>(stages.scale, height, width));
      next();
    }
    if (moved && !cut && !colored) return move_and_scale(source, scaled, planes_of(to));
    if (moved) move_and_scale(source, scaled, pixels_of(target)), next();
    if (cut) cut_out(source, stages.box), __syncthreads();
    if (!colored) return store(source, {}, to);
    if (turned || wide || moved || cut) sum = sum_of(source);
    const T mean = total(sum) / static_cast<T>(channels * size);
    store(source, {stages.color, mean}, to);
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

  // Whether a scaling is done by the taps. A wide one's transpose is a pass of its own.
  __device__ static bool by_taps(const Linear<T>& scale) {
    return scale.on() && (!transpose || narrow(scale));
  }

  // The taps, and the stages by the last thread; they can be read after the next barrier.
  __device__ const Stages<T>& find_stages(const float* p) const {
    DDPP_SHARED(Stages<T>, stages, 1);
    if (thread() == threads - 1)
      stages[0] = {make_color(p, transpose), make_move(p, height, width, transpose),
                   make_move(p, height, width, true), make_scale<T>(p), make_rotation<T>(p, height, width)};
    for (int i = thread(); i < height + width; i += threads) {
      const Move m = make_move(p, height, width, transpose);
      const Linear<T> scale = make_scale<T>(p);
      const bool row = i < height;
      const Axis<T> axis =
          row ? Axis<T>{height, m.dy, false, scale.yy} : Axis<T>{width, m.dx, m.mirror, scale.xx};
      const int at = row ? i : i - height;
      taps[i] = !by_taps(scale) ? axis.moved(at) : transpose ? axis.collected(at) : axis.sampled(at);
    }
    return stages[0];
  }

  // What a rotation finds outside of its source, above and below.
  __device__ void clear_border(T* image) const {
    const int row = width * channels;
    for (int i = thread(); i < row; i += threads) {
      image[i - row] = 0;
      image[height * row + i] = 0;
      image[height * row + row + i] = 0;
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
    recolored<n>(image, recolor, [&](int i, const Mixed(&pixels)[n]) {
      Pack<T, n> planes[channels];
      for (int k = 0; k < n * channels; ++k)
        planes[k % channels].at[k / channels] = pixels[k / channels].at[k % channels];
      for (int c = 0; c < channels; ++c) store_whole(to + c * size + i * n, planes[c]);
    });
  }

  __device__ void paint(T* image, const Recolor<T, channels>& recolor) const {
    aligned ? paint_packs<pack>(image, recolor) : paint_packs<1>(image, recolor);
  }
  template <int n>
  __device__ void paint_packs(T* image, const Recolor<T, channels>& recolor) const {
    recolored<n>(image, recolor, [&](int i, const Mixed(&pixels)[n]) {
      Pack<T, n> packs[channels];
      for (int k = 0; k < n * channels; ++k) packs[k / n].at[k % n] = pixels[k / channels].at[k % channels];
      for (int c = 0; c < channels; ++c) reinterpret_cast<Pack<T, n>*>(image)[i * channels + c] = packs[c];
    });
  }

  // put(i, pixels) for the i-th n pixels of an image
  template <int n, class Put>
  __device__ void recolored(const T* image, const Recolor<T, channels>& recolor, const Put& put) const {
    DDPP_UNROLL(2)
    for (int i = thread(); i < size / n; i += threads) {
      Pack<T, n> packs[channels];
      Mixed pixels[n];
      for (int c = 0; c < channels; ++c)
        packs[c] = reinterpret_cast<const Pack<T, n>*>(image)[i * channels + c];
      for (int k = 0; k < n * channels; ++k) pixels[k / channels].at[k % channels] = packs[k / n].at[k % n];
      for (int k = 0; k < n; ++k) recolor(&pixels[k]);
      put(i, pixels);
    }
  }

  // This thread's part of the sum of an image's values.
  __device__ T sum_of(const T* image) const {
    T sum = 0;
    for (int i = thread(); i < channels * size; i += threads) sum += image[i];
    return sum;
  }

  __device__ void cut_out(T* image, const Move& box) const {
    for (int y = box.top + warp(); y < box.bottom; y += warps)
      for (int i = box.left * channels + lane(); i < box.right * channels; i += kWarpSize)
        image[y * width * channels + i] = 0;
  }

  // Where a pixel of the result goes: into planes in device memory, or where the next pass finds it.
  __device__ auto planes_of(T* to) const {
    return [this, to](int y, int x, const Mixed& pixel) {
      for (int c = 0; c < channels; ++c) to[c * size + y * width + x] = pixel.at[c];
    };
  }
  __device__ auto pixels_of(T* image) const {
    return [this, image](int y, int x, const Mixed& pixel) {
      for (int c = 0; c < channels; ++c) image[(y * width + x) * channels + c] = pixel.at[c];
    };
  }

  template <class Put>
  __device__ void move_and_scale(const T* from, bool scaled, const Put& put) const {
    scaled ? mix<most_taps>(from, put) : mix<1>(from, put);
  }

  // put(y, x, pixel) for each pixel, of so many taps on an axis
  template <int count, class Put>
  __device__ void mix(const T* from, const Put& put) const {
    for (int x = lane(); x < width; x += kWarpSize) {
      const Taps<T> column = taps[height + x];
      const T* const column_taps = from + column.first * channels;
      DDPP_UNROLL(1)
      for (int y = warp(); y < height; y += warps) {
        const Taps<T> row = taps[y];
        const T* tap = column_taps + row.first * width * channels;
        Mixed sum{};
        for (int j = 0; j < count; ++j, tap += width * channels) {
          if (transpose && row.weight[j] == 0) continue;  // about one of three, for the whole warp
          for (int k = 0; k < count; ++k) sum.add(row.weight[j] * column.weight[k], tap + k * channels);
        }
        put(y, x, sum);
      }
    }
  }

  __device__ void rotate(const T* from, const Linear<T>& shared_map, T* __restrict__ to) const {
    const Linear<T> map = shared_map;
    const T cy = centre<T>(height), cx = centre<T>(width);
    const T* const corner = from - (width + 1) * channels;  // where locate() counts from
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
  const int64_t row = aligned(int64_t{batch.width} * batch.channels * sizeof(T)),
                image = aligned(int64_t{batch.height} * batch.width * batch.channels * sizeof(T));
  const int64_t front = (batch.height + batch.width) * static_cast<int64_t>(sizeof(Taps<T>)) + row;
  const int64_t back = front + image + 2 * row;
  return {front, back, back + image + 2 * row};
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
