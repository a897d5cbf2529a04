// The masked trajectory-matching loss over flat parameter vectors.
#pragma once

#include <cstdint>

#include "kernels/isa.h"
#include "kernels/queue.h"

namespace ddpp {

// The launchers of one device; T is float or double. Pointers are to that device's memory, vectors have p
// elements. epsilon is in [0, 1]; 0 prunes nothing. Launchers return the device's error code, 0 for success.
template <class T>
struct MatchLoss {
  // Bytes of scratch that forward needs, aligned to 8; they need not be set.
  int64_t (*scratch_bytes)(int64_t p);

  // loss[0]         sum over kept x of (student - target)^2 / sum over kept x of (start - target)^2
  // kept[0]         how many x are kept; 0 when the denominator is 0
  // denominator[0]  infinite when the sum is 0, so that loss and gradient are 0
  int (*forward)(const T* student, const T* target, const T* start, double epsilon, int64_t p, void* scratch,
                 T* loss, int64_t* kept, double* denominator, const Queue& queue);

  // gradient = 2 * grad[0] / denominator[0] * (student - target) where kept, 0 elsewhere
  int (*backward)(const T* grad, const double* denominator, const T* student, const T* target, double epsilon,
                  int64_t p, T* gradient, const Queue& queue);
};

DDPP_PER_ISA(template <class T> const MatchLoss<T>& match_loss();)

template <class T>
const MatchLoss<T>& match_loss_cpu(Isa isa = active_isa()) {
  return DDPP_SELECT(isa, match_loss<T>());
}

template <class T>
const MatchLoss<T>& match_loss_cuda();

}  // namespace ddpp
