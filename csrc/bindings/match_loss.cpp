#include "kernels/match_loss.h"

#include <optional>
#include <tuple>

#include "bindings/checks.h"

namespace ddpp {
namespace {

template <class T>
void forward(const Tensor& student, const Tensor& target, const Tensor& start, double epsilon, Tensor& loss,
             Tensor& kept, Tensor& denominator) {
  const auto& launchers = DDPP_LAUNCHERS(match_loss, T);
  const int64_t p = student.size(0);
  Tensor scratch = empty(student, {launchers.scratch_bytes(p)}, ScalarType::Byte);
  const Device device(student);
  check_launch("match_loss",
               launchers.forward(student.const_data_ptr<T>(), target.const_data_ptr<T>(),
                                 start.const_data_ptr<T>(), epsilon, p, scratch.mutable_data_ptr(),
                                 loss.mutable_data_ptr<T>(), kept.mutable_data_ptr<int64_t>(),
                                 denominator.mutable_data_ptr<double>(), device.queue));
}

std::tuple<Tensor, Tensor, Tensor> match_loss_op(const Tensor& student, const Tensor& target,
                                                 const Tensor& start, std::optional<double> epsilon) {
  check_floating("student", student);
  if (student.dim() != 1) fail("ddpp: student must be a vector [P], got ", shape(student));
  check_like("target", target, "student", student);
  check_like("start", start, "student", student);
  Tensor loss = empty(student, {}, student.scalar_type());
  Tensor kept = empty(student, {}, ScalarType::Long);
  Tensor denominator = empty(student, {}, ScalarType::Double);
  const auto run = student.scalar_type() == ScalarType::Float ? forward<float> : forward<double>;
  run(as_contiguous(student), as_contiguous(target), as_contiguous(start), epsilon.value_or(0), loss, kept,
      denominator);
  return {loss, kept, denominator};
}

template <class T>
void backward(const Tensor& grad, const Tensor& denominator, const Tensor& student, const Tensor& target,
              double epsilon, Tensor& gradient) {
  const Device device(student);
  check_launch("match_loss_backward",
               DDPP_LAUNCHERS(match_loss, T)
                   .backward(grad.const_data_ptr<T>(), denominator.const_data_ptr<double>(),
                             student.const_data_ptr<T>(), target.const_data_ptr<T>(), epsilon,
                             student.size(0), gradient.mutable_data_ptr<T>(), device.queue));
}

Tensor match_loss_backward_op(const Tensor& grad, const Tensor& denominator, const Tensor& student,
                              const Tensor& target, std::optional<double> epsilon) {
  check_floating("student", student);
  if (student.dim() != 1) fail("ddpp: student must be a vector [P], got ", shape(student));
  check_like("target", target, "student", student);
  if (grad.dim() != 0 || grad.scalar_type() != student.scalar_type() || grad.device() != student.device())
    fail("ddpp: grad must be a scalar with the dtype and device of student");
  if (denominator.dim() != 0 || denominator.scalar_type() != ScalarType::Double ||
      denominator.device() != student.device())
    fail("ddpp: denominator must be a float64 scalar on the device of student");
  Tensor gradient = empty(student, {student.size(0)}, student.scalar_type());
  const auto run = student.scalar_type() == ScalarType::Float ? backward<float> : backward<double>;
  run(grad, denominator, as_contiguous(student), as_contiguous(target), epsilon.value_or(0), gradient);
  return gradient;
}

}  // namespace
}  // namespace ddpp

DDPP_LIBRARY(m) {
  m.impl("match_loss", TORCH_BOX(&ddpp::match_loss_op));
  m.impl("match_loss_backward", TORCH_BOX(&ddpp::match_loss_backward_op));
}
