#include "kernels/head.h"

#include <optional>

#include "bindings/checks.h"

// On a CPU the head is part of the whole step's kernel: see convnet.cpp.
#if !defined(DDPP_FOR_CPU)

namespace ddpp {
namespace {

using MaybeTensor = std::optional<Tensor>;

// Tensors of one size, dtype and device, without gaps; the first, features, sets dtype and device.
class Checked {
 public:
  Checked(const Tensor& features, const Tensor& weight, const MaybeTensor& weight_tangent)
      : features_(features) {
    check_floating("features", features);
    if (features.dim() != 2 || weight.dim() != 2)
      fail("ddpp: features must be [n, F] and weight [K, F], got ", shape(features), " and ", shape(weight));
    rows = features.size(0), f = features.size(1), k = weight.size(0);
    if (k < 1 || f < 1) fail("ddpp: weight must have classes and features, got ", shape(weight));
    if (weight_tangent && rows % 2 != 0)
      fail("ddpp: features must be stacked with their tangents, [2 n, F], got ", shape(features));
    n = weight_tangent ? rows / 2 : rows;
    is("features", features, {rows, f});
    is("weight", weight, {k, f});
    if (weight_tangent) is("weight_tangent", *weight_tangent, {k, f});
  }
  void is(const char* name, const Tensor& t, const std::vector<int64_t>& size) const {
    check_size(name, t, size, "features", features_);
  }
  int64_t rows, n, f, k;

 private:
  const Tensor& features_;
};

template <class T>
const T* read(const MaybeTensor& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}
template <class T>
T* written(MaybeTensor& t) {
  return t ? t->mutable_data_ptr<T>() : nullptr;
}

template <class T>
HeadLayer<T> layer_of(const Checked& size, const Tensor& features, const Tensor& weight,
                      const MaybeTensor& weight_tangent) {
  return {size.n,
          size.f,
          size.k,
          features.const_data_ptr<T>(),
          weight.const_data_ptr<T>(),
          nullptr,
          read<T>(weight_tangent),
          nullptr};
}

void cotangents_op(const Tensor& features, const Tensor& weight, const Tensor& bias,
                   MaybeTensor weight_tangent, MaybeTensor bias_tangent, const Tensor& targets, int64_t count,
                   Tensor cotangents, MaybeTensor d_labels, MaybeTensor phis) {
  const Checked size(features, weight, weight_tangent);
  const bool dual = weight_tangent.has_value();
  if (dual != bias_tangent.has_value() || dual != phis.has_value() || (d_labels && !dual))
    fail("ddpp: weight_tangent, bias_tangent and phis go together, and d_labels with them");
  if (count < 1) fail("ddpp: count must be at least 1, got ", count);
  size.is("bias", bias, {size.k});
  size.is("targets", targets, {size.n, size.k});
  size.is("cotangents", cotangents, {size.rows, size.k});
  if (bias_tangent) size.is("bias_tangent", *bias_tangent, {size.k});
  if (d_labels) size.is("d_labels", *d_labels, {size.n, size.k});
  if (phis) size.is("phis", *phis, {size.n});
  by_dtype(features, [&](auto t) {
    using T = decltype(t);
    HeadLayer<T> layer = layer_of<T>(size, features, weight, weight_tangent);
    layer.bias = bias.const_data_ptr<T>();
    layer.bias_tangent = read<T>(bias_tangent);
    const Device device(features);
    check_launch("head_cotangents",
                 DDPP_LAUNCHERS(head, T).cotangents(layer, targets.const_data_ptr<T>(), count,
                                                    cotangents.mutable_data_ptr<T>(), written<T>(d_labels),
                                                    written<T>(phis), device.queue));
  });
}

void gradients_op(const Tensor& cotangents, const Tensor& features, const Tensor& weight,
                  MaybeTensor weight_tangent, Tensor d_weight, Tensor d_bias, Tensor d_features) {
  const Checked size(features, weight, weight_tangent);
  size.is("cotangents", cotangents, {size.rows, size.k});
  size.is("d_weight", d_weight, {size.k, size.f});
  size.is("d_bias", d_bias, {size.k});
  size.is("d_features", d_features, {size.rows, size.f});
  by_dtype(features, [&](auto t) {
    using T = decltype(t);
    const Device device(features);
    check_launch("head_gradients",
                 DDPP_LAUNCHERS(head, T).gradients(
                     layer_of<T>(size, features, weight, weight_tangent), cotangents.const_data_ptr<T>(),
                     d_weight.mutable_data_ptr<T>(), d_bias.mutable_data_ptr<T>(),
                     d_features.mutable_data_ptr<T>(), device.queue));
  });
}

}  // namespace
}  // namespace ddpp

DDPP_LIBRARY(m) {
  m.impl("head_cotangents", TORCH_BOX(&ddpp::cotangents_op));
  m.impl("head_gradients", TORCH_BOX(&ddpp::gradients_op));
}

#endif
