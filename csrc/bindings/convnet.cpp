#include "kernels/convnet.h"

#include <optional>

#include "bindings/checks.h"

// On a GPU the vendor's library convolves: there are kernels for the CPU only.
#if defined(DDPP_FOR_CPU)

namespace ddpp {
namespace {

ConvNetSize checked_size(const Tensor& theta, const Tensor& images, int64_t classes, int64_t pad_y,
                         int64_t pad_x, int64_t depth, int64_t filters, double eps, int64_t m,
                         int64_t parts) {
  check_floating("theta", theta);
  if (images.dim() != 4) fail("ddpp: images must be [N, C, H, W], got ", shape(images));
  const ConvNetSize size{images.size(0), images.size(1), images.size(2), images.size(3), pad_y,
                         pad_x,          depth,          filters,        classes,        eps};
  check_size("images", images, {size.n, size.channels, size.height, size.width}, "theta", theta);
  if (m != 2 && m != 4) fail("ddpp: m must be 2 or 4, got ", m);
  if (size.n < 1 || parts < 1 || parts > size.n)
    fail("ddpp: parts must be from 1 to the number of images, ", size.n, ", got ", parts);
  if (pad_y < 0 || pad_x < 0 || depth < 1 || depth > 16 || filters < 1 || classes < 1 || size.channels < 1)
    fail("ddpp: depth (at most 16), filters, classes and channels must be positive, paddings not negative");
  if (size.rows(depth) < 1 || size.columns(depth) < 1)
    fail("ddpp: images ", shape(images), " are too small for ", depth, " poolings");
  check_size("theta", theta, {size.parameters()}, "theta", theta);
  return size;
}

double* checked_account(std::optional<Tensor>& account) {
  if (!account) return nullptr;
  if (account->scalar_type() != ScalarType::Double || account->dim() != 1 ||
      account->size(0) != kConvNetAccounts || !account->is_contiguous())
    fail("ddpp: account must be float64 [", static_cast<int>(kConvNetAccounts), "], got ", shape(*account));
  return account->mutable_data_ptr<double>();
}

// What every face of a step needs.
template <class T>
ConvNetStep<T> step_on(const ConvNetSize& size, int64_t m, int64_t parts, const Tensor& theta,
                       const Tensor& images) {
  ConvNetStep<T> step{};
  step.size = size;
  step.m = static_cast<int>(m);
  step.parts = parts;
  step.theta = theta.const_data_ptr<T>();
  step.images = images.const_data_ptr<T>();
  return step;
}

void logits_op(const Tensor& theta, const Tensor& images, int64_t pad_y, int64_t pad_x, int64_t depth,
               int64_t filters, double eps, int64_t m, int64_t parts, Tensor logits) {
  if (logits.dim() != 2) fail("ddpp: logits must be [N, K], got ", shape(logits));
  const ConvNetSize size =
      checked_size(theta, images, logits.size(1), pad_y, pad_x, depth, filters, eps, m, parts);
  check_size("logits", logits, {size.n, size.classes}, "theta", theta);
  by_dtype(theta, [&](auto t) {
    using T = decltype(t);
    convnet_cpu<T>().logits(step_on<T>(size, m, parts, theta, images), logits.mutable_data_ptr<T>(),
                            Device(theta).queue);
  });
}

void step_op(const Tensor& theta, const Tensor* tangent, const Tensor& images, const Tensor& targets,
             int64_t pad_y, int64_t pad_x, int64_t depth, int64_t filters, double eps, int64_t m,
             int64_t parts, std::optional<Tensor> account, Tensor gradient, Tensor* d_images,
             Tensor* d_labels, Tensor* phi) {
  if (targets.dim() != 2) fail("ddpp: targets must be [N, K], got ", shape(targets));
  const ConvNetSize size =
      checked_size(theta, images, targets.size(1), pad_y, pad_x, depth, filters, eps, m, parts);
  check_size("targets", targets, {size.n, size.classes}, "theta", theta);
  check_size("gradient", gradient, {size.parameters()}, "theta", theta);
  if (tangent) {
    check_size("tangent", *tangent, {size.parameters()}, "theta", theta);
    check_size("d_images", *d_images, {size.n, size.channels, size.height, size.width}, "theta", theta);
    check_size("d_labels", *d_labels, {size.n, size.classes}, "theta", theta);
    check_size("phi", *phi, {}, "theta", theta);
  }
  double* const account_data = checked_account(account);
  Tensor scratch = empty(theta, {(parts - 1) * size.parameters()}, theta.scalar_type());
  by_dtype(theta, [&](auto t) {
    using T = decltype(t);
    ConvNetStep<T> step = step_on<T>(size, m, parts, theta, images);
    step.targets = targets.const_data_ptr<T>();
    step.scratch = scratch.mutable_data_ptr<T>();
    step.gradient = gradient.mutable_data_ptr<T>();
    step.account = account_data;
    if (tangent) {
      step.tangent = tangent->const_data_ptr<T>();
      step.d_images = d_images->mutable_data_ptr<T>();
      step.d_labels = d_labels->mutable_data_ptr<T>();
      step.phi = phi->mutable_data_ptr<T>();
    }
    convnet_cpu<T>().step(step, Device(theta).queue);
  });
}

void gradient_op(const Tensor& theta, const Tensor& images, const Tensor& targets, int64_t pad_y,
                 int64_t pad_x, int64_t depth, int64_t filters, double eps, int64_t m, int64_t parts,
                 std::optional<Tensor> account, Tensor gradient) {
  step_op(theta, nullptr, images, targets, pad_y, pad_x, depth, filters, eps, m, parts, account, gradient,
          nullptr, nullptr, nullptr);
}

void adjoint_op(const Tensor& theta, const Tensor& tangent, const Tensor& images, const Tensor& targets,
                int64_t pad_y, int64_t pad_x, int64_t depth, int64_t filters, double eps, int64_t m,
                int64_t parts, std::optional<Tensor> account, Tensor gradient, Tensor d_images,
                Tensor d_labels, Tensor phi) {
  step_op(theta, &tangent, images, targets, pad_y, pad_x, depth, filters, eps, m, parts, account, gradient,
          &d_images, &d_labels, &phi);
}

}  // namespace
}  // namespace ddpp

DDPP_LIBRARY(m) {
  m.impl("convnet_logits", TORCH_BOX(&ddpp::logits_op));
  m.impl("convnet_gradient", TORCH_BOX(&ddpp::gradient_op));
  m.impl("convnet_adjoint", TORCH_BOX(&ddpp::adjoint_op));
}

#endif
