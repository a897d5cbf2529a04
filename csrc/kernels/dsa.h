// Differentiable Siamese augmentation of a batch of images, and its adjoint.
#pragma once

#include <cstdint>

#include "kernels/isa.h"
#include "kernels/queue.h"

namespace ddpp {

// The columns of a plan, one row of floats an image. ddpp/ops/dsa.py gives their meaning.
enum PlanColumn {
  kBrightness,
  kSaturation,
  kContrast,
  kShiftY,
  kShiftX,
  kTop,
  kBottom,
  kLeft,
  kRight,
  kFlip,
  kScaleX,
  kScaleY,
  kCos,
  kSin,
  kPlanSize = 16
};

// A batch of n images of 1 or 3 channels, each channels * height * width values without gaps; a side is at
// most kMaxSide.
struct ImageBatch {
  int64_t n;
  int channels, height, width;
};
constexpr int64_t kMaxSide = 8192;

// The launchers of one device; T is float or double. Pointers are to that device's memory and do not overlap.
// Launchers return the device's error code, 0 for success.
template <class T>
struct Dsa {
  // Bytes of scratch that both launchers need, aligned to 16; they need not be set.
  int64_t (*scratch_bytes)(const ImageBatch& batch);

  // out = the images, each augmented by its row of plan
  int (*augment)(const T* images, const float* plan, const ImageBatch& batch, void* scratch, T* out,
                 const Queue& queue);

  // out = the transpose of augment's linear part, applied to grad
  int (*adjoint)(const T* grad, const float* plan, const ImageBatch& batch, void* scratch, T* out,
                 const Queue& queue);
};

DDPP_PER_ISA(template <class T> const Dsa<T>& dsa();)

template <class T>
const Dsa<T>& dsa_cpu(Isa isa = active_isa()) {
  return DDPP_SELECT(isa, dsa<T>());
}

template <class T>
const Dsa<T>& dsa_cuda();

}  // namespace ddpp
