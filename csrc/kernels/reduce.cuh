// Sums over a warp and a block. The order of the additions is fixed, so results do not change between runs.
#pragma once

#include "kernels/cuda_compat.h"

namespace ddpp {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarpSize = 32;

// The sum over the warp, in lane 0. All lanes take part.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    value += __shfl_down_sync(kFullWarp, value, offset);
  return value;
}

// The sum over the block, in thread 0. All threads take part; blockDim.x is a multiple of 32.
template <class T>
__device__ __forceinline__ T block_sum(T value) {
  DDPP_SHARED(T, warp_sums, kWarpSize);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize,
            warp = static_cast<int>(threadIdx.x) / kWarpSize;
  value = warp_sum(value);
  if (lane == 0) warp_sums[warp] = value;
  __syncthreads();
  if (warp == 0) value = warp_sum(lane < static_cast<int>(blockDim.x) / kWarpSize ? warp_sums[lane] : T(0));
  __syncthreads();  // warp_sums may be used again by the next call
  return value;
}

}  // namespace ddpp
