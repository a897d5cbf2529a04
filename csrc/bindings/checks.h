// What every binding shares: the device it is compiled for, checks, scratch. Only headers of torch's stable
// ABI. A binding is compiled once per device, with DDPP_FOR_CPU, DDPP_FOR_CUDA or DDPP_FOR_EMULATED (the CUDA
// kernels on CPU tensors, for tests) defined.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/isa.h"
#include "kernels/queue.h"

// DDPP_LAUNCHERS(match_loss, float): the launchers of the op for this device.
// DDPP_LIBRARY(m) { m.impl("op", TORCH_BOX(&function)); } registers them.
#if defined(DDPP_FOR_CPU)
#define DDPP_LAUNCHERS(op, T) (::ddpp::op##_cpu<T>())
#define DDPP_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(ddpp, CPU, m)
#elif defined(DDPP_FOR_CUDA)
#define DDPP_LAUNCHERS(op, T) (::ddpp::op##_cuda<T>())
#define DDPP_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(ddpp, CUDA, m)
#elif defined(DDPP_FOR_EMULATED)
#define DDPP_LAUNCHERS(op, T) (::ddpp::op##_cuda<T>())
#define DDPP_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(ddpp_emulated, CPU, m)
#else
#error "compile bindings with DDPP_FOR_CPU, DDPP_FOR_CUDA or DDPP_FOR_EMULATED"
#endif

namespace ddpp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A message without file and line. Throw before any parallel region, never inside one.
template <class... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline std::string shape(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

// The Python functions check with better words; these keep a direct call of the op from reading foreign
// memory.
inline void check_floating(const char* name, const Tensor& t) {
  if (t.scalar_type() != ScalarType::Float && t.scalar_type() != ScalarType::Double)
    fail("ddpp: ", name, " must be float32 or float64, got ", torch::headeronly::toString(t.scalar_type()));
}

// run(T()) for the dtype of a tensor that check_floating has let pass.
template <class Run>
void by_dtype(const Tensor& t, const Run& run) {
  t.scalar_type() == ScalarType::Float ? run(float()) : run(double());
}

inline void check_like(const char* name, const Tensor& t, const char* model_name, const Tensor& model) {
  if (t.dim() != model.dim() || shape(t) != shape(model))
    fail("ddpp: ", name, " must have the shape of ", model_name, " ", shape(model), ", got ", shape(t));
  if (t.scalar_type() != model.scalar_type()) fail("ddpp: ", name, " must have the dtype of ", model_name);
  if (t.device() != model.device()) fail("ddpp: ", name, " must be on the device of ", model_name);
}

// Of a tensor that a kernel takes as it is: its size, without gaps, and like the model in all else.
inline void check_size(const char* name, const Tensor& t, const std::vector<int64_t>& size,
                       const char* model_name, const Tensor& model) {
  bool same = t.dim() == static_cast<int64_t>(size.size());
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == size[i];
  if (!same) {
    std::ostringstream wanted;
    for (size_t i = 0; i < size.size(); ++i) wanted << (i ? ", " : "") << size[i];
    fail("ddpp: ", name, " must be [", wanted.str(), "], got ", shape(t));
  }
  if (t.scalar_type() != model.scalar_type()) fail("ddpp: ", name, " must have the dtype of ", model_name);
  if (t.device() != model.device()) fail("ddpp: ", name, " must be on the device of ", model_name);
  if (!t.is_contiguous()) fail("ddpp: ", name, " must be contiguous");
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype) {
  return torch::stable::new_empty(like, size, dtype);
}

// Makes the tensor's device the current one, and gives the queue its kernels go to.
class Device {
 public:
#if defined(DDPP_FOR_CUDA)
  explicit Device(const Tensor& t) : guard_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &queue.stream));
  }
#else
  explicit Device(const Tensor&) {
    queue.parallel_for = [](int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                            void* state) {
      if (torch_parallel_for(begin, end, grain, body, state) != 0)
        fail("ddpp: a kernel can't allocate memory");
    };
  }
#endif
  Queue queue;

#if defined(DDPP_FOR_CUDA)
 private:
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// Turns a launcher's error code into an exception.
inline void check_launch(const char* op, int code) {
  if (code != 0) fail("ddpp: ", op, " could not be launched: CUDA error ", code);
}

}  // namespace ddpp
