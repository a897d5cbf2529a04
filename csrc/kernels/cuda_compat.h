// One include for every .cu file: the CUDA runtime under nvcc, an emulation of CUDA's execution model under a
// host compiler (csrc/tests/cuda_emul.h). What a kernel must keep to so that both accept it stands in
// csrc/README.md.
#pragma once

#if defined(__CUDACC__)
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cstdint>

#define DDPP_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel)<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define DDPP_SHARED(type, name, count) __shared__ type name[count]
#define DDPP_DYNAMIC_SHARED(type, name)                       \
  extern __shared__ __align__(16) unsigned char name##_raw[]; \
  type* name = reinterpret_cast<type*>(name##_raw)
// Before a loop: how often nvcc repeats its body.
#define DDPP_UNROLL(times) DDPP_PRAGMA(unroll times)
#define DDPP_PRAGMA(text) _Pragma(#text)
// Lets `kernel` be launched with more than 48 KB of dynamic shared memory; gives cudaSuccess or an error.
#define DDPP_ALLOW_SHARED(kernel, shared_bytes) \
  cudaFuncSetAttribute((kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes))

constexpr unsigned kMaxGridRows = 65535;  // blocks of a grid in y

// Of the current device; 0 if it does not say.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}
// Bytes of dynamic shared memory that a block may ask for.
inline int64_t max_shared_bytes() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

#else
#include "cuda_emul.h"
#endif

// Begins to copy a value to shared memory past the registers. The thread that asked finds it there after it
// has waited; others after a barrier too.
template <class X>
__device__ __forceinline__ void copy_async(X* shared, const X* from) {
  if constexpr (sizeof(X) >= 4) {
    __pipeline_memcpy_async(shared, from, sizeof(X));
  } else {
    *shared = *from;
  }
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void end_copies() { __pipeline_commit(); }

// Waits for this thread's groups of copies, but for the last so many.
__device__ __forceinline__ void wait_for_copies(int but) { __pipeline_wait_prior(static_cast<size_t>(but)); }
