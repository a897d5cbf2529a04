#include "kernels/norm_pool.h"

#include "bindings/checks.h"

namespace ddpp {
namespace {

// ---- checks: a direct call of an op must not reach foreign memory ----

bool is_channels_last(const Tensor& t) {
  int64_t expected = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (t.size(dim) == 0) return true;
    if (t.size(dim) != 1 && t.stride(dim) != expected) return false;
    expected *= t.size(dim);
  }
  return true;
}

Tensor as_channels_last(const Tensor& t) {
  return is_channels_last(t) ? t
                             : torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast);
}

// Calls f(S{}) with the type S that y is stored as.
template <class F>
void with_type_of(const Tensor& y, const F& f) {
  if (y.scalar_type() == ScalarType::Float) return f(float{});
  if (y.scalar_type() == ScalarType::Double) return f(double{});
#if defined(DDPP_FOR_CPU)
  const char* dtypes =
      "float32 or float64 on the CPU";  // ddpp/ops/norm_pool.py takes the rest to plain torch
#else
  if (y.scalar_type() == ScalarType::BFloat16) return f(Bfloat16{});
  const char* dtypes = "float32, float64 or bfloat16";
#endif
  fail("ddpp: y must be ", dtypes, ", got ", torch::headeronly::toString(y.scalar_type()));
}

void check(const char* name, const Tensor& t, const std::vector<int64_t>& size, const Tensor& y,
           ScalarType dtype) {
  bool same = t.dim() == static_cast<int64_t>(size.size());
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == size[i];
  if (!same) fail("ddpp: ", name, " does not fit y ", shape(y), ", got ", shape(t));
  if (t.scalar_type() != dtype)
    fail("ddpp: ", name,
         dtype == y.scalar_type() ? " must have the dtype of y" : " must be float32 where y is bfloat16");
  if (t.device() != y.device()) fail("ddpp: ", name, " must be on the device of y");
}

class Planes {
 public:
  explicit Planes(const Tensor& y) : y_(y) {
    constexpr int64_t kMaxSide = 1 << 15;
    if (y.dim() != 4 || y.size(2) < 2 || y.size(3) < 2 || y.size(2) > kMaxSide || y.size(3) > kMaxSide)
      fail("ddpp: y must be [N, C, H, W] with H and W from 2 to ", kMaxSide, ", got ", shape(y));
    size = {y.size(0), y.size(1), y.size(2), y.size(3)};
  }
  Tensor plane(const char* name, const Tensor& t) const {
    check(name, t, {size.n, size.channels, size.height, size.width}, y_, y_.scalar_type());
    return as_channels_last(t);
  }
  Tensor pooled(const char* name, const Tensor& t) const {
    check(name, t, {size.n, size.channels, size.height / 2, size.width / 2}, y_, y_.scalar_type());
    return as_channels_last(t);
  }
  Tensor channels(const char* name, const Tensor& t) const {
    check(name, t, {size.channels}, y_, arithmetic());
    return as_contiguous(t);
  }
  Tensor statistics(const Tensor& t, int64_t rows) const {
    check("statistics", t, {rows, size.n, size.channels}, y_, arithmetic());
    return as_contiguous(t);
  }
  PlaneBatch size;

 private:
  ScalarType arithmetic() const {
    return y_.scalar_type() == ScalarType::BFloat16 ? ScalarType::Float : y_.scalar_type();
  }
  const Tensor& y_;
};

// `checked` is what a check gave for the tensor that a kernel is to write.
template <class T>
T* written(const char* name, const Tensor& t, Tensor checked) {
  void* data = checked.mutable_data_ptr();
  if (data != t.const_data_ptr())
    fail("ddpp: ", name, " must be without gaps, and channels last if it is [N, C, H, W]");
  return static_cast<T*>(data);
}

template <class T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
Dual<const T> dual(const Tensor& value, const Tensor& tangent) {
  return {read<T>(value), read<T>(tangent)};
}

// ---- the ops ----

template <class S, class T = Arithmetic<S>>
void forward_as(const Tensor& y_in, const Tensor& scale_in, const Tensor& shift_in, double eps,
                const Tensor& out, const Tensor& statistics) {
  const Planes planes(y_in);
  const Tensor y = planes.plane("y", y_in);
  const Tensor scale = planes.channels("scale", scale_in), shift = planes.channels("shift", shift_in);
  S* out_data = written<S>("out", out, planes.pooled("out", out));
  T* statistics_data = written<T>("statistics", statistics, planes.statistics(statistics, kStatistics));
  const Device device(y);
  check_launch("norm_relu_pool", DDPP_LAUNCHERS(norm_pool, S)
                                     .forward(read<S>(y), read<T>(scale), read<T>(shift), eps, planes.size,
                                              out_data, statistics_data, device.queue));
}

void forward(const Tensor& y, const Tensor& scale, const Tensor& shift, double eps, const Tensor& out,
             const Tensor& statistics) {
  with_type_of(y, [&](auto zero) { forward_as<decltype(zero)>(y, scale, shift, eps, out, statistics); });
}

template <class S, class T = Arithmetic<S>>
void backward_as(const Tensor& grad_out_in, const Tensor& y_in, const Tensor& scale_in,
                 const Tensor& shift_in, const Tensor& statistics_in, const Tensor& grad_y,
                 const Tensor& grad_scale, const Tensor& grad_shift) {
  const Planes planes(y_in);
  const Tensor grad_out = planes.pooled("grad_out", grad_out_in), y = planes.plane("y", y_in);
  const Tensor scale = planes.channels("scale", scale_in), shift = planes.channels("shift", shift_in);
  const Tensor statistics = planes.statistics(statistics_in, kStatistics);
  S* grad_y_data = written<S>("grad_y", grad_y, planes.plane("grad_y", grad_y));
  T* grad_scale_data = written<T>("grad_scale", grad_scale, planes.channels("grad_scale", grad_scale));
  T* grad_shift_data = written<T>("grad_shift", grad_shift, planes.channels("grad_shift", grad_shift));
  const auto& launchers = DDPP_LAUNCHERS(norm_pool, S);
  const Device device(y);
  Tensor scratch = empty(y, {launchers.scratch_bytes(planes.size)}, ScalarType::Byte);
  check_launch("norm_relu_pool_backward",
               launchers.backward(read<S>(grad_out), read<S>(y), read<T>(scale), read<T>(shift),
                                  read<T>(statistics), planes.size, scratch.mutable_data_ptr(), grad_y_data,
                                  grad_scale_data, grad_shift_data, device.queue));
}

void backward(const Tensor& grad_out, const Tensor& y, const Tensor& scale, const Tensor& shift,
              const Tensor& statistics, const Tensor& grad_y, const Tensor& grad_scale,
              const Tensor& grad_shift) {
  with_type_of(y, [&](auto zero) {
    backward_as<decltype(zero)>(grad_out, y, scale, shift, statistics, grad_y, grad_scale, grad_shift);
  });
}

template <class S, class T = Arithmetic<S>>
void dual_as(const Tensor& y_in, const Tensor& y_tangent_in, const Tensor& scale_in,
             const Tensor& scale_tangent_in, const Tensor& shift_in, const Tensor& shift_tangent_in,
             double eps, const Tensor& out, const Tensor& out_tangent, const Tensor& statistics) {
  const Planes planes(y_in);
  const Tensor y = planes.plane("y", y_in), y_tangent = planes.plane("y_tangent", y_tangent_in);
  const Tensor scale = planes.channels("scale", scale_in), shift = planes.channels("shift", shift_in);
  const Tensor scale_tangent = planes.channels("scale_tangent", scale_tangent_in);
  const Tensor shift_tangent = planes.channels("shift_tangent", shift_tangent_in);
  const Dual<S> out_data{written<S>("out", out, planes.pooled("out", out)),
                         written<S>("out_tangent", out_tangent, planes.pooled("out_tangent", out_tangent))};
  T* statistics_data = written<T>("statistics", statistics, planes.statistics(statistics, kDualStatistics));
  const Device device(y);
  check_launch("norm_relu_pool_dual",
               DDPP_LAUNCHERS(norm_pool, S)
                   .dual(dual<S>(y, y_tangent), dual<T>(scale, scale_tangent), dual<T>(shift, shift_tangent),
                         eps, planes.size, out_data, statistics_data, device.queue));
}

void dual_forward(const Tensor& y, const Tensor& y_tangent, const Tensor& scale, const Tensor& scale_tangent,
                  const Tensor& shift, const Tensor& shift_tangent, double eps, const Tensor& out,
                  const Tensor& out_tangent, const Tensor& statistics) {
  with_type_of(y, [&](auto zero) {
    dual_as<decltype(zero)>(y, y_tangent, scale, scale_tangent, shift, shift_tangent, eps, out, out_tangent,
                            statistics);
  });
}

template <class S, class T = Arithmetic<S>>
void dual_backward_as(const Tensor& grad_out_in, const Tensor& grad_out_tangent_in, const Tensor& y_in,
                      const Tensor& y_tangent_in, const Tensor& scale_in, const Tensor& scale_tangent_in,
                      const Tensor& shift_in, const Tensor& statistics_in, const Tensor& grad_y,
                      const Tensor& grad_y_tangent, const Tensor& grad_scale, const Tensor& grad_shift) {
  const Planes planes(y_in);
  const Tensor grad_out = planes.pooled("grad_out", grad_out_in);
  const Tensor grad_out_tangent = planes.pooled("grad_out_tangent", grad_out_tangent_in);
  const Tensor y = planes.plane("y", y_in), y_tangent = planes.plane("y_tangent", y_tangent_in);
  const Tensor scale = planes.channels("scale", scale_in), shift = planes.channels("shift", shift_in);
  const Tensor scale_tangent = planes.channels("scale_tangent", scale_tangent_in);
  const Tensor statistics = planes.statistics(statistics_in, kDualStatistics);
  const Dual<S> grad_y_data{
      written<S>("grad_y", grad_y, planes.plane("grad_y", grad_y)),
      written<S>("grad_y_tangent", grad_y_tangent, planes.plane("grad_y_tangent", grad_y_tangent))};
  T* grad_scale_data = written<T>("grad_scale", grad_scale, planes.channels("grad_scale", grad_scale));
  T* grad_shift_data = written<T>("grad_shift", grad_shift, planes.channels("grad_shift", grad_shift));
  const auto& launchers = DDPP_LAUNCHERS(norm_pool, S);
  const Device device(y);
  Tensor scratch = empty(y, {launchers.scratch_bytes(planes.size)}, ScalarType::Byte);
  check_launch("norm_relu_pool_dual_backward",
               launchers.dual_backward(dual<S>(grad_out, grad_out_tangent), dual<S>(y, y_tangent),
                                       dual<T>(scale, scale_tangent), read<T>(shift), read<T>(statistics),
                                       planes.size, scratch.mutable_data_ptr(), grad_y_data, grad_scale_data,
                                       grad_shift_data, device.queue));
}

void dual_backward(const Tensor& grad_out, const Tensor& grad_out_tangent, const Tensor& y,
                   const Tensor& y_tangent, const Tensor& scale, const Tensor& scale_tangent,
                   const Tensor& shift, const Tensor& statistics, const Tensor& grad_y,
                   const Tensor& grad_y_tangent, const Tensor& grad_scale, const Tensor& grad_shift) {
  with_type_of(y, [&](auto zero) {
    dual_backward_as<decltype(zero)>(grad_out, grad_out_tangent, y, y_tangent, scale, scale_tangent, shift,
                                     statistics, grad_y, grad_y_tangent, grad_scale, grad_shift);
  });
}

}  // namespace
}  // namespace ddpp

DDPP_LIBRARY(m) {
  m.impl("norm_relu_pool", TORCH_BOX(&ddpp::forward));
  m.impl("norm_relu_pool_backward", TORCH_BOX(&ddpp::backward));
  m.impl("norm_relu_pool_dual", TORCH_BOX(&ddpp::dual_forward));
  m.impl("norm_relu_pool_dual_backward", TORCH_BOX(&ddpp::dual_backward));
}
