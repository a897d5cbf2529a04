// Values that are loaded and stored at once: 16 bytes of them, or one where more would not be aligned.
#pragma once

#include "kernels/cuda_compat.h"

namespace ddpp {

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T at[kWidth];
};

// The compiler takes the assignment of a pack that it has just computed apart into stores of single values;
// these it leaves whole.
__device__ __forceinline__ void store_whole(float* to, const Pack<float, 4>& x) {
  __stwb(reinterpret_cast<float4*>(to), make_float4(x.at[0], x.at[1], x.at[2], x.at[3]));
}
__device__ __forceinline__ void store_whole(double* to, const Pack<double, 2>& x) {
  __stwb(reinterpret_cast<double2*>(to), make_double2(x.at[0], x.at[1]));
}
template <class S, class T>
__device__ __forceinline__ void store_whole(S* to, const Pack<T, 1>& x) {
  *to = static_cast<S>(x.at[0]);
}

}  // namespace ddpp
