// Instance normalisation, ReLU and 2x2 average pooling as one op: forward and backward, on numbers and on
// dual numbers (value, tangent). ddpp/ops/norm_pool.py gives the formulas.
#pragma once

#include <cstdint>

#include "kernels/bfloat16.h"
#include "kernels/isa.h"
#include "kernels/queue.h"

namespace ddpp {

// Everything is stored channels last: planes are n * height * width * channels values, pooled planes
// n * (height / 2) * (width / 2) * channels, a vector of channels is channels values, all without gaps.
// height and width are at least 2. A last odd row or column is normalised but not pooled.
struct PlaneBatch {
  int64_t n, channels, height, width;
};

// Statistics of the planes, one row [n, channels] of T each. A forward face writes them, its backward face
// reads them. A mean is kept as T and what T cannot hold of it, so that value - mean - rest is precise where
// the mean is large. kRstd is 1 / sqrt(variance + eps), kCovariance mean(normalised plane * tangent).
enum StatisticRow { kMean, kRest, kRstd, kTangentMean, kTangentRest, kCovariance };
constexpr int64_t kStatistics = 3, kDualStatistics = 6;  // rows of the plain and of the dual faces

template <class T>
struct Dual {
  T *value, *tangent;
};

// The launchers of one device. S is what planes are stored as: float, double or, on CUDA, Bfloat16; all else
// is of type T, also the arithmetic, so that a result is rounded to S once, where it is stored. Pointers are
// to that device's memory and do not overlap, but grad_y may be y: planes are written where they were read,
// in cache, and take no further memory. Launchers return the device's error code, 0 for success. Sums over
// images are in a fixed order.
template <class S>
struct NormPool {
  using T = Arithmetic<S>;

  // Bytes of scratch that the backward launchers need, aligned to 16; they need not be set.
  int64_t (*scratch_bytes)(const PlaneBatch& size);

  // out = pool(relu(normalised y * scale + shift))
  int (*forward)(const S* y, const T* scale, const T* shift, double eps, const PlaneBatch& size, S* out,
                 T* statistics, const Queue& queue);

  // The products of the derivative of forward with grad_out.
  int (*backward)(const S* grad_out, const S* y, const T* scale, const T* shift, const T* statistics,
                  const PlaneBatch& size, void* scratch, S* grad_y, T* grad_scale, T* grad_shift,
                  const Queue& queue);

  // forward on dual numbers: the tangent of out is the derivative of forward times the tangents of y, scale,
  // shift.
  int (*dual)(Dual<const S> y, Dual<const T> scale, Dual<const T> shift, double eps, const PlaneBatch& size,
              Dual<S> out, T* statistics, const Queue& queue);

  // The products of the derivative of dual with (grad_out.value, grad_out.tangent), the cotangents of out's
  // value and tangent. The gradients of scale and shift are those of their values; shift's tangent does not
  // enter.
  int (*dual_backward)(Dual<const S> grad_out, Dual<const S> y, Dual<const T> scale, const T* shift,
                       const T* statistics, const PlaneBatch& size, void* scratch, Dual<S> grad_y,
                       T* grad_scale, T* grad_shift, const Queue& queue);
};

DDPP_PER_ISA(template <class T> const NormPool<T>& norm_pool();)

template <class T>
const NormPool<T>& norm_pool_cpu(Isa isa = active_isa()) {
  return DDPP_SELECT(isa, norm_pool<T>());
}

template <class S>
const NormPool<S>& norm_pool_cuda();

}  // namespace ddpp
