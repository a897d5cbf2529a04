#include "kernels/cuda_compat.h"
#include "kernels/dsa.h"
#include "kernels/dsa_plan.h"
#include "kernels/reduce.cuh"

namespace ddpp {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksResident = 2;          // per multiprocessor, which leaves enough registers to spill none
constexpr int64_t kMaxBlocks = 1056;        // further images take turns
constexpr int64_t kMaxScratchBlocks = 264;  // fewer where each block needs scratch
constexpr int64_t kStaticShared = 1024;  // at least what sums and the runtime take of a block's shared memory

template <class T>
struct alignas(16) Pack {
  T at[16 / sizeof(T)];
};

// ---- stages: the whole block works on one image; a barrier separates them ----

// image [channels * size], in place
template <int channels, class T>
__device__ void recolor(T* image, int size, const Color& color) {
  DDPP_SHARED(T, shared_mean, 1);
  const T brightness = color.brightness, saturation = color.saturation, contrast = color.contrast;
  T sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < channels * size; i += kThreads) sum += image[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) shared_mean[0] = sum / static_cast<T>(channels * size) + brightness;
  __syncthreads();
  const T mean = shared_mean[0];
  for (int i = static_cast<int>(threadIdx.x); i < size; i += kThreads) {
    T gray = 0;
    for (int c = 0; c < channels; ++c) gray += (image[i + c * size] + brightness) * (T(1) / channels);
    for (int c = 0; c < channels; ++c) {
      const T value = (image[i + c * size] + brightness - gray) * saturation + gray;
      image[i + c * size] = (value - mean) * contrast + mean;  // the saturated image has the same mean
    }
  }
}

// from, to [planes, height, width]
template <class T>
__device__ void move(const T* from, T* to, int planes, int height, int width, const Move& m) {
  for (int i = static_cast<int>(threadIdx.x); i < planes * height * width; i += kThreads) {
    const int x = i % width, row = i / width, y = row % height;
    const int source_x = m.mirror ? m.dx - x : x + m.dx, source_y = y + m.dy;
    const bool inside = source_x >= 0 && source_x < width && source_y >= 0 && source_y < height;
    const bool cut = y >= m.top && y < m.bottom && x >= m.left && x < m.right;
    to[i] = inside && !cut ? from[(row + m.dy) * width + source_x] : T(0);
  }
}

// Where the output pixel (y, x) is taken from. Explicit multiply-adds: the compiler has no choice of
// roundings, so that forward and adjoint use the same weights bit by bit.
template <class T>
struct Sample {
  int row, column;  // of the first tap, may be -1
  T below, right;   // shares of the second taps
};

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

template <class T>
__device__ __forceinline__ Sample<T> sample(int y, int x, int height, int width, const Linear<T>& map) {
  const T cy = static_cast<T>(height - 1) / 2, cx = static_cast<T>(width - 1) / 2;
  const T v = static_cast<T>(y) - cy, u = static_cast<T>(x) - cx;
  Sample<T> s;
  s.row = locate(multiply_add(map.yx, u, multiply_add(map.yy, v, cy)), height, &s.below) - 1;
  s.column = locate(multiply_add(map.xx, u, multiply_add(map.xy, v, cx)), width, &s.right) - 1;
  return s;
}

// from, to [channels, height, width]
template <int channels, class T>
__device__ void resample(const T* from, T* to, int height, int width, const Linear<T>& map) {
  const int size = height * width;
  for (int i = static_cast<int>(threadIdx.x); i < size; i += kThreads) {
    const Sample<T> s = sample(i / width, i % width, height, width, map);
    T sums[channels] = {};
    for (int k = 0; k < 4; ++k) {
      const int row = s.row + k / 2, column = s.column + k % 2;
      if (row < 0 || row >= height || column < 0 || column >= width) continue;
      const T weight = (k / 2 ? s.below : 1 - s.below) * (k % 2 ? s.right : 1 - s.right);
      for (int c = 0; c < channels; ++c) sums[c] += weight * from[c * size + row * width + column];
    }
    for (int c = 0; c < channels; ++c) to[i + c * size] = sums[c];
  }
}

template <class T>
__device__ __forceinline__ T magnitude(T x) {
  return x < 0 ? -x : x;
}

// Output pixels first to last that may take something from one input pixel, on one axis.
struct Reach {
  int first, last;
};

template <class T>
__device__ __forceinline__ Reach reach(T centre, T extent, int size) {
  const T margin = extent * T(1.01) + T(0.01);  // more than the rounding errors of the sample points
  return {static_cast<int>(clamped(centre - margin, T(0), static_cast<T>(size))),
          static_cast<int>(clamped(centre + margin, T(0), static_cast<T>(size - 1)))};
}

// The transpose of resample: every pixel collects, in a fixed order, from the outputs whose sample points are
// less than one pixel away on both axes. These lie in the image of a square under the inverse map.
template <int channels, class T>
__device__ void resample_transposed(const T* from, T* to, int height, int width, const Linear<T>& map) {
  const int size = height * width;
  const T cy = static_cast<T>(height - 1) / 2, cx = static_cast<T>(width - 1) / 2;
  const T det = map.xx * map.yy - map.xy * map.yx;
  const bool invertible = det > T(1e-4) || det < T(-1e-4);
  const T shrink = 1 / det;
  const Linear<T> inverse{map.yy * shrink, -map.xy * shrink, -map.yx * shrink, map.xx * shrink};
  for (int i = static_cast<int>(threadIdx.x); i < size; i += kThreads) {
    const int row = i / width, column = i % width;
    const T v = static_cast<T>(row) - cy, u = static_cast<T>(column) - cx;
    Reach rows{0, height - 1}, columns{0, width - 1};
    if (invertible) {
      rows =
          reach(inverse.yx * u + inverse.yy * v + cy, magnitude(inverse.yx) + magnitude(inverse.yy), height);
      columns =
          reach(inverse.xx * u + inverse.xy * v + cx, magnitude(inverse.xx) + magnitude(inverse.xy), width);
    }
    T sums[channels] = {};
    for (int y = rows.first; y <= rows.last; ++y)
      for (int x = columns.first; x <= columns.last; ++x) {
        const Sample<T> s = sample(y, x, height, width, map);
        const int below = row - s.row, right = column - s.column;
        if (below < 0 || below > 1 || right < 0 || right > 1) continue;
        const T weight = (below ? s.below : 1 - s.below) * (right ? s.right : 1 - s.right);
        for (int c = 0; c < channels; ++c) sums[c] += weight * from[c * size + y * width + x];
      }
    for (int c = 0; c < channels; ++c) to[i + c * size] = sums[c];
  }
}

// ---- one block per image ----

// from, to [count], both or none aligned to 16 bytes
template <class T>
__device__ void copy(const T* __restrict__ from, T* __restrict__ to, int count, bool aligned) {
  constexpr int width = 16 / sizeof(T);
  const int packs = aligned ? count / width : 0;
  for (int i = static_cast<int>(threadIdx.x); i < packs; i += kThreads)
    reinterpret_cast<Pack<T>*>(to)[i] = reinterpret_cast<const Pack<T>*>(from)[i];
  for (int i = packs * width + static_cast<int>(threadIdx.x); i < count; i += kThreads) to[i] = from[i];
}

__host__ __device__ constexpr int64_t buffer_values(int64_t values, int64_t bytes_each) {
  return (values * bytes_each + 15) / 16 * 16 / bytes_each;  // the next buffer is aligned too
}

// images, out [n, channels, height, width]; plan [n, 16]; scratch: two buffers a block, or null: shared
// memory
template <class T, int channels, bool transpose, bool shared>
__global__ void __launch_bounds__(kThreads, kBlocksResident)
    dsa_kernel(const T* __restrict__ images, const float* __restrict__ plan, int64_t n, int height, int width,
               bool aligned, T* __restrict__ scratch, T* __restrict__ out) {
  DDPP_DYNAMIC_SHARED(T, shared_buffers);
  const int size = height * width, values = channels * size;
  const int64_t buffer = buffer_values(values, sizeof(T));
  T* front = shared ? shared_buffers : scratch + static_cast<int64_t>(blockIdx.x) * 2 * buffer;
  T* back = front + buffer;
  const auto next = [&] {
    __syncthreads();
    T* swapped = front;
    front = back;
    back = swapped;
  };
  for (int64_t i = blockIdx.x; i < n; i += gridDim.x) {
    const float* p = plan + i * kPlanSize;
    const Color color = make_color(p, transpose);
    const Move moved = make_move(p, height, width, transpose);
    const Linear<T> scale = make_scale<T>(p), rotation = make_rotation<T>(p, height, width);
    copy(images + i * values, front, values, aligned);
    __syncthreads();
    if constexpr (transpose) {
      if (rotation.on()) resample_transposed<channels>(front, back, height, width, rotation), next();
      if (scale.on()) resample_transposed<channels>(front, back, height, width, scale), next();
      if (moved.on()) move(front, back, channels, height, width, moved), next();
      if (color.on()) recolor<channels>(front, size, color), __syncthreads();
    } else {
      if (color.on()) recolor<channels>(front, size, color), __syncthreads();
      if (moved.on()) move(front, back, channels, height, width, moved), next();
      if (scale.on()) resample<channels>(front, back, height, width, scale), next();
      if (rotation.on()) resample<channels>(front, back, height, width, rotation), next();
    }
    // Each thread loads the next image just where it has stored this one: no barrier in between.
    copy(front, out + i * values, values, aligned);
  }
}

template <class T>
int64_t buffer_bytes(const ImageBatch& batch) {
  return 2 * sizeof(T) * buffer_values(int64_t{batch.channels} * batch.height * batch.width, sizeof(T));
}

int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }

template <class T>
int64_t scratch_bytes(const ImageBatch& batch) {
  if (buffer_bytes<T>(batch) + kStaticShared <= max_shared_bytes()) return 0;
  return at_most(batch.n, kMaxScratchBlocks) * buffer_bytes<T>(batch);
}

template <class T, int channels, bool transpose>
int launch(const T* images, const float* plan, const ImageBatch& batch, void* scratch, T* out,
           const Queue& queue) {
  const int64_t bytes = buffer_bytes<T>(batch);
  const auto bits = reinterpret_cast<uintptr_t>(images) | reinterpret_cast<uintptr_t>(out);
  const bool aligned = bits % 16 == 0 && int64_t{channels} * batch.height * batch.width * sizeof(T) % 16 == 0;
  if (scratch_bytes<T>(batch) > 0) {
    DDPP_LAUNCH((dsa_kernel<T, channels, transpose, false>),
                static_cast<unsigned>(at_most(batch.n, kMaxScratchBlocks)), kThreads, 0, queue.stream, images,
                plan, batch.n, batch.height, batch.width, aligned, static_cast<T*>(scratch), out);
  } else {
    const int allowed =
        static_cast<int>(DDPP_ALLOW_SHARED((dsa_kernel<T, channels, transpose, true>), bytes));
    if (allowed != 0) return allowed;
    DDPP_LAUNCH((dsa_kernel<T, channels, transpose, true>),
                static_cast<unsigned>(at_most(batch.n, kMaxBlocks)), kThreads, static_cast<size_t>(bytes),
                queue.stream, images, plan, batch.n, batch.height, batch.width, aligned,
                static_cast<T*>(nullptr), out);
  }
  return static_cast<int>(cudaGetLastError());
}

template <class T, bool transpose>
int run(const T* images, const float* plan, const ImageBatch& batch, void* scratch, T* out,
        const Queue& queue) {
  if (batch.n * batch.channels * batch.height * batch.width == 0) return 0;
  const auto launch_as = batch.channels == 1 ? launch<T, 1, transpose> : launch<T, 3, transpose>;
  return launch_as(images, plan, batch, scratch, out, queue);
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
