// One include for every .cu file: the CUDA runtime under nvcc, an emulation of CUDA's execution model under a
// host compiler (csrc/tests/cuda_emul.h). What a kernel must keep to so that both accept it stands in
// csrc/README.md.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <cstdint>

#define DDPP_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel)<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define DDPP_SHARED(type, name, count) __shared__ type name[count]
#define DDPP_DYNAMIC_SHARED(type, name)                       \
  extern __shared__ __align__(16) unsigned char name##_raw[]; \
  type* name = reinterpret_cast<type*>(name##_raw)
// Lets `kernel` be launched with more than 48 KB of dynamic shared memory; gives cudaSuccess or an error.
#define DDPP_ALLOW_SHARED(kernel, shared_bytes) \
  cudaFuncSetAttribute((kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes))

// Bytes of dynamic shared memory that a block may ask for on the current device.
inline int64_t max_shared_bytes() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
    return 0;
  return bytes;
}

#else
#include "cuda_emul.h"
#endif
