// bfloat16, the upper half of a float: what CUDA's planes may be stored as. All arithmetic is in float.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define DDPP_BOTH_SIDES __host__ __device__ __forceinline__
#else
#define DDPP_BOTH_SIDES inline
#endif

namespace ddpp {

// Rounded to nearest, ties to even.
DDPP_BOTH_SIDES uint32_t bfloat16_bits(float x) {
  if (x != x) return 0x7fff;  // rounding up would make some NaN a zero
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Two values in one word. A GPU that knows the type rounds both at once, to the same bits.
DDPP_BOTH_SIDES uint32_t bfloat16_pair(float lower, float upper) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(upper), "f"(lower));
  return pair;
#else
  return bfloat16_bits(lower) | bfloat16_bits(upper) << 16;
#endif
}
DDPP_BOTH_SIDES float upper_bfloat16(uint32_t pair) {
  const uint32_t bits = pair & 0xffff0000u;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
DDPP_BOTH_SIDES float lower_bfloat16(uint32_t pair) { return upper_bfloat16(pair << 16); }

struct Bfloat16 {
  Bfloat16() = default;
  explicit DDPP_BOTH_SIDES Bfloat16(float x) : bits(static_cast<uint16_t>(bfloat16_pair(x, 0))) {}
  DDPP_BOTH_SIDES operator float() const { return lower_bfloat16(bits); }
  uint16_t bits;
};

// The type to calculate in with what is stored as S.
template <class S>
using Arithmetic = std::conditional_t<std::is_same_v<S, Bfloat16>, float, S>;

}  // namespace ddpp
