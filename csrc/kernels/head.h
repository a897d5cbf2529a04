// The linear layer of a student step under its softmax cross-entropy, of few images and classes, with what a
// step needs back from it. ddpp/ops/head.py gives the formulas. On a CPU it is part of the kernel of the
// whole step, csrc/kernels/convnet.h.
#pragma once

#include <cstdint>

#include "kernels/queue.h"

namespace ddpp {

// With tangents (where weight_tangent is not null) numbers are dual and rows are stacked: n of values, then n
// of tangents. All without gaps, k classes, f features.
template <class T>
struct HeadLayer {
  int64_t n, f, k;
  const T* features;                       // [n, f] or [2 n, f]
  const T *weight, *bias;                  // [k, f], [k]
  const T *weight_tangent, *bias_tangent;  // the same
};

// The launchers of one device; T is float or double. Pointers are to that device's memory and do not overlap.
// Launchers return the device's error code, 0 for success. Sums are in a fixed order.
template <class T>
struct Head {
  // From targets [n, k], the derivatives by the outputs of their mean cross-entropy over `count` images. With
  // tangents those of phi, the cross-entropy's own tangent, by the outputs and by their tangents; phis [n],
  // each image's share of it; and unless it is null d_labels [n, k], those by the logits of the targets.
  int (*cotangents)(const HeadLayer<T>& layer, const T* targets, int64_t count, T* cotangents, T* d_labels,
                    T* phis, const Queue& queue);

  // From these the gradients of weight, bias and features; with tangents those of phi, by the values, and in
  // further n rows by the tangents of the features. The layer's bias is not read.
  int (*gradients)(const HeadLayer<T>& layer, const T* cotangents, T* d_weight, T* d_bias, T* d_features,
                   const Queue& queue);
};

template <class T>
const Head<T>& head_cuda();

}  // namespace ddpp
