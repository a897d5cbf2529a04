// A GPU's time for a step of few images goes into launches, and into products that a library gives to one
// block. Here a block takes one image from the features to what comes back to its outputs, a warp for each
// class; and for the gradients a block takes a part of the columns, its warps the rows.

#include <initializer_list>
#include <limits>

#include "kernels/cuda_compat.h"
#include "kernels/head.h"
#include "kernels/pack.cuh"
#include "kernels/reduce.cuh"

namespace ddpp {
namespace {

constexpr int kOutputThreads = 512;    // ten classes in one round
constexpr int kGradientThreads = 256;  // few enough images to each warp, and few warps' sums to add
constexpr int kGradientBlocks = 2;     // of a multiprocessor; unasked, registers are saved and loads wait
constexpr int kWarps = kGradientThreads / kWarpSize;
constexpr int64_t kMaxBlocks = 2147483647, kMaxLayers = 65535;  // of a grid in x and in z
constexpr int64_t kMaxShared = 48 * 1024, kMaxColumns = int64_t{1} << 30;
template <class T>
constexpr T kLeast = -std::numeric_limits<T>::infinity();  // device code may not call it

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / kWarpSize; }

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// The sum over the warp, in every lane.
template <class T>
__device__ __forceinline__ T shared_sum(T value) {
  return __shfl_sync(kFullWarp, warp_sum(value), 0);
}

// The most of the warp's values, in every lane. Another lane's NaN is passed over.
template <class T>
__device__ __forceinline__ T shared_max(T value) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const T other = __shfl_down_sync(kFullWarp, value, offset);
    value = other > value ? other : value;
  }
  return __shfl_sync(kFullWarp, value, 0);
}

// By value: of a reference the compiler loads the parts.
template <int width, class T>
__device__ __forceinline__ Pack<T, width> load(const T* from) {
  return *reinterpret_cast<const Pack<T, width>*>(from);
}

template <class T, int width>
__device__ __forceinline__ void add_product(T* sum, const Pack<T, width>& x, const Pack<T, width>& y) {
  for (int j = 0; j < width; ++j) *sum += x.at[j] * y.at[j];
}

template <class T, int width>
__device__ __forceinline__ void add_product(Pack<T, width>* sum, T factor, const Pack<T, width>& x) {
  for (int j = 0; j < width; ++j) sum->at[j] += factor * x.at[j];
}

// One warp: from an image's outputs in shared memory to what comes back to them.
template <bool dual, class T>
__device__ void write_cotangents(const HeadLayer<T>& layer, T* outputs, const T* tangents,
                                 const T* __restrict__ targets, T count, T* __restrict__ cotangents,
                                 T* __restrict__ d_labels, T* __restrict__ phis) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * layer.k, second = first + layer.n * layer.k;
  const int classes = static_cast<int>(layer.k);
  T most = kLeast<T>;
  DDPP_UNROLL(1)
  for (int k = lane(); k < classes; k += kWarpSize) most = outputs[k] > most ? outputs[k] : most;
  most = shared_max(most);
  T sum = 0;
  DDPP_UNROLL(1)
  for (int k = lane(); k < classes; k += kWarpSize) {
    outputs[k] = exponential(outputs[k] - most);
    sum += outputs[k];
  }
  sum = shared_sum(sum);
  T mean = 0, target_mean = 0;  // of the tangents, by the softmax and by the targets
  DDPP_UNROLL(1)
  for (int k = lane(); k < classes; k += kWarpSize) {
    outputs[k] /= sum;
    if constexpr (dual) {
      mean += outputs[k] * tangents[k];
      target_mean += targets[first + k] * tangents[k];
    }
  }
  if constexpr (dual) {
    mean = shared_sum(mean);
    target_mean = shared_sum(target_mean);
  }
  T phi = 0;
  DDPP_UNROLL(1)
  for (int k = lane(); k < classes; k += kWarpSize) {
    const T softmax = outputs[k], target = targets[first + k], by_tangent = (softmax - target) / count;
    cotangents[(dual ? second : first) + k] = by_tangent;  // plain: by the output
    if constexpr (dual) {
      cotangents[first + k] = softmax * (tangents[k] - mean) / count;
      if (d_labels != nullptr) d_labels[first + k] = target * (target_mean - tangents[k]) / count;
      phi += by_tangent * tangents[k];
    }
  }
  if constexpr (dual) {
    phi = warp_sum(phi);
    if (lane() == 0) phis[blockIdx.x] = phi;
  }
}

template <bool dual, class T, int width>
__global__ void __launch_bounds__(kOutputThreads, 1)
    cotangents_kernel(HeadLayer<T> layer, const T* __restrict__ targets, T count, T* __restrict__ cotangents,
                      T* __restrict__ d_labels, T* __restrict__ phis) {
  DDPP_DYNAMIC_SHARED(T, outputs);
  T* const tangents = outputs + layer.k;  // with tangents only, as all that is named so
  const T* const x = layer.features + blockIdx.x * layer.f;
  const T* const x_tangent = dual ? x + layer.n * layer.f : x;
  for (int k = warp(); k < static_cast<int>(layer.k); k += kOutputThreads / kWarpSize) {
    const T* const w = layer.weight + k * layer.f;
    const T* const w_tangent = dual ? layer.weight_tangent + k * layer.f : w;
    T output = lane() == 0 ? layer.bias[k] : T(0), tangent = 0;  // on its way beside the rest
    if constexpr (dual) tangent = lane() == 0 ? layer.bias_tangent[k] : T(0);
    DDPP_UNROLL(4)
    for (int c = lane() * width; c < static_cast<int>(layer.f); c += kWarpSize * width) {
      const auto weights = load<width>(w + c), values = load<width>(x + c);
      add_product(&output, weights, values);
      if constexpr (dual) {
        const auto weight_tangents = load<width>(w_tangent + c), value_tangents = load<width>(x_tangent + c);
        add_product(&tangent, weights, value_tangents);
        add_product(&tangent, weight_tangents, values);
      }
    }
    output = warp_sum(output);
    if (lane() == 0) outputs[k] = output;
    if constexpr (dual) {
      tangent = warp_sum(tangent);
      if (lane() == 0) tangents[k] = tangent;
    }
  }
  __syncthreads();
  if (warp() == 0)
    write_cotangents<dual>(layer, outputs, tangents, targets, count, cotangents, d_labels, phis);
}

// A class's gradients of weight and bias, over all rows of features.
template <class T, int width>
__device__ void weight_gradient(const HeadLayer<T>& layer, int64_t k, int64_t rows, int64_t column,
                                const T* __restrict__ cotangents, T* __restrict__ d_weight,
                                T* __restrict__ d_bias) {
  using P = Pack<T, width>;
  DDPP_SHARED(P, sums, kGradientThreads);
  DDPP_SHARED(T, biases, kWarps);
  const bool inside = column < layer.f;
  P sum{};
  T bias = 0;
  DDPP_UNROLL(4)
  for (int64_t i = warp(); i < rows; i += kWarps) {
    const T cotangent = cotangents[i * layer.k + k];
    if (i < layer.n) bias += cotangent;
    if (!inside) continue;
    const P values = load<width>(layer.features + i * layer.f + column);
    add_product(&sum, cotangent, values);
  }
  sums[threadIdx.x] = sum;
  if (lane() == 0) biases[warp()] = bias;
  __syncthreads();
  if (warp() == 0) {
    for (int other = 1; other < kWarps; ++other) {
      add_product(&sum, T(1), sums[other * kWarpSize + lane()]);
      bias += biases[other];
    }
    if (inside) store_whole(d_weight + k * layer.f + column, sum);
    if (column == 0) d_bias[k] = bias;
  }
}

// A row of features' gradient, over all classes.
template <bool dual, class T, int width>
__device__ void feature_gradient(const HeadLayer<T>& layer, int64_t i, int64_t column,
                                 const T* __restrict__ cotangents, T* __restrict__ d_features) {
  const bool with_tangent = dual && i < layer.n;
  Pack<T, width> sum{};
  DDPP_UNROLL(4)
  for (int64_t k = 0; k < layer.k; ++k) {
    const auto weights = load<width>(layer.weight + k * layer.f + column);
    add_product(&sum, cotangents[i * layer.k + k], weights);
    if (!with_tangent) continue;
    const auto tangents = load<width>(layer.weight_tangent + k * layer.f + column);
    add_product(&sum, cotangents[(layer.n + i) * layer.k + k], tangents);
  }
  store_whole(d_features + i * layer.f + column, sum);
}

// In z, a block for each class, and then one for as many rows of features as it has warps; in x, columns.
template <bool dual, class T, int width>
__global__ void __launch_bounds__(kGradientThreads, kGradientBlocks)
    gradients_kernel(HeadLayer<T> layer, const T* __restrict__ cotangents, T* __restrict__ d_weight,
                     T* __restrict__ d_bias, T* __restrict__ d_features) {
  const int64_t rows = dual ? 2 * layer.n : layer.n;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kWarpSize + lane()) * width;
  if (blockIdx.z < layer.k) {
    weight_gradient<T, width>(layer, blockIdx.z, rows, column, cotangents, d_weight, d_bias);
  } else {
    const int64_t i = (blockIdx.z - layer.k) * kWarps + warp();
    if (i < rows && column < layer.f)
      feature_gradient<dual, T, width>(layer, i, column, cotangents, d_features);
  }
}

// Whether rows of f values begin at packs in all of them; null is nowhere.
template <class T>
bool aligned(int64_t f, std::initializer_list<const T*> matrices) {
  uintptr_t bits = static_cast<uintptr_t>(f) * sizeof(T);
  for (const T* matrix : matrices) bits |= reinterpret_cast<uintptr_t>(matrix);
  return bits % 16 == 0;
}

template <bool dual, class T, int width>
int launch_cotangents(const HeadLayer<T>& layer, const T* targets, int64_t count, T* cotangents, T* d_labels,
                      T* phis, const Queue& queue) {
  const int64_t bytes = (dual ? 2 : 1) * layer.k * static_cast<int64_t>(sizeof(T));
  if (bytes > kMaxShared || layer.n > kMaxBlocks || layer.f > kMaxColumns)
    return static_cast<int>(cudaErrorInvalidValue);
  DDPP_LAUNCH((cotangents_kernel<dual, T, width>), static_cast<unsigned>(layer.n), kOutputThreads,
              static_cast<size_t>(bytes), queue.stream, layer, targets, static_cast<T>(count), cotangents,
              d_labels, phis);
  return static_cast<int>(cudaGetLastError());
}

template <bool dual, class T, int width>
int launch_gradients(const HeadLayer<T>& layer, const T* cotangents, T* d_weight, T* d_bias, T* d_features,
                     const Queue& queue) {
  const int64_t rows = dual ? 2 * layer.n : layer.n, blocks = layer.k + (rows + kWarps - 1) / kWarps;
  const int64_t parts = (layer.f + kWarpSize * width - 1) / (kWarpSize * width);
  if (blocks > kMaxLayers || parts > kMaxBlocks) return static_cast<int>(cudaErrorInvalidValue);
  const dim3 grid(static_cast<unsigned>(parts), 1, static_cast<unsigned>(blocks));
  DDPP_LAUNCH((gradients_kernel<dual, T, width>), grid, kGradientThreads, 0, queue.stream, layer, cotangents,
              d_weight, d_bias, d_features);
  return static_cast<int>(cudaGetLastError());
}

template <class T>
int run_cotangents(const HeadLayer<T>& layer, const T* targets, int64_t count, T* cotangents, T* d_labels,
                   T* phis, const Queue& queue) {
  if (layer.n == 0) return 0;
  constexpr int pack = 16 / sizeof(T);
  const bool whole = aligned<T>(layer.f, {layer.features, layer.weight, layer.weight_tangent});
  const auto launch = layer.weight_tangent
                          ? (whole ? launch_cotangents<true, T, pack> : launch_cotangents<true, T, 1>)
                          : (whole ? launch_cotangents<false, T, pack> : launch_cotangents<false, T, 1>);
  return launch(layer, targets, count, cotangents, d_labels, phis, queue);
}

template <class T>
int run_gradients(const HeadLayer<T>& layer, const T* cotangents, T* d_weight, T* d_bias, T* d_features,
                  const Queue& queue) {
  constexpr int pack = 16 / sizeof(T);
  const bool whole =
      aligned<T>(layer.f, {layer.features, layer.weight, layer.weight_tangent, d_weight, d_features});
  const auto launch = layer.weight_tangent
                          ? (whole ? launch_gradients<true, T, pack> : launch_gradients<true, T, 1>)
                          : (whole ? launch_gradients<false, T, pack> : launch_gradients<false, T, 1>);
  return launch(layer, cotangents, d_weight, d_bias, d_features, queue);
}

}  // namespace

template <class T>
const Head<T>& head_cuda() {
  static const Head<T> launchers{run_cotangents<T>, run_gradients<T>};
  return launchers;
}
template const Head<float>& head_cuda();
template const Head<double>& head_cuda();

}  // namespace ddpp
