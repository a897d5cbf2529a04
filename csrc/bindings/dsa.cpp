#include "kernels/dsa.h"

#include "bindings/checks.h"

namespace ddpp {
namespace {

ImageBatch check(const Tensor& images, const Tensor& plan) {
  check_floating("images", images);
  if (images.dim() != 4) fail("ddpp: images must be [N, C, H, W], got ", shape(images));
  if (images.size(1) != 1 && images.size(1) != 3)
    fail("ddpp: images must have 1 or 3 channels, got ", images.size(1), "; use fused=False for others");
  if (images.size(2) > kMaxSide || images.size(3) > kMaxSide)
    fail("ddpp: images must have sides of at most ", kMaxSide, ", got ", shape(images), "; use fused=False");
  if (plan.scalar_type() != ScalarType::Float || plan.dim() != 2 || plan.size(0) != images.size(0) ||
      plan.size(1) != kPlanSize)
    fail("ddpp: plan must be float32 [", images.size(0), ", ", int{kPlanSize}, "], got ", shape(plan));
  if (plan.device() != images.device()) fail("ddpp: plan must be on the device of images");
  return {images.size(0), static_cast<int>(images.size(1)), static_cast<int>(images.size(2)),
          static_cast<int>(images.size(3))};
}

template <class T>
void launch(bool adjoint, const Tensor& images, const Tensor& plan, const ImageBatch& batch, Tensor& out) {
  const auto& launchers = DDPP_LAUNCHERS(dsa, T);
  const Device device(images);
  Tensor scratch = empty(images, {launchers.scratch_bytes(batch)}, ScalarType::Byte);
  const auto run = adjoint ? launchers.adjoint : launchers.augment;
  check_launch(adjoint ? "dsa_adjoint" : "dsa_augment",
               run(images.const_data_ptr<T>(), plan.const_data_ptr<float>(), batch,
                   scratch.mutable_data_ptr(), out.mutable_data_ptr<T>(), device.queue));
}

Tensor apply(bool adjoint, const Tensor& images, const Tensor& plan) {
  const ImageBatch batch = check(images, plan);
  Tensor out = empty(images, {batch.n, batch.channels, batch.height, batch.width}, images.scalar_type());
  const auto run = images.scalar_type() == ScalarType::Float ? launch<float> : launch<double>;
  run(adjoint, as_contiguous(images), as_contiguous(plan), batch, out);
  return out;
}

Tensor dsa_augment(const Tensor& images, const Tensor& plan) { return apply(false, images, plan); }
Tensor dsa_adjoint(const Tensor& grad, const Tensor& plan) { return apply(true, grad, plan); }

}  // namespace
}  // namespace ddpp

DDPP_LIBRARY(m) {
  m.impl("dsa_augment", TORCH_BOX(&ddpp::dsa_augment));
  m.impl("dsa_adjoint", TORCH_BOX(&ddpp::dsa_adjoint));
}
