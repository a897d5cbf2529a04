// The last include of every *_cpu.cpp: what follows is compiled for the instruction set DDPP_ISA, which the
// build sets. A pragma and not a compiler flag, so that no inline function of another header gets it.
// The file ends with DDPP_ISA_END.
#if !defined(DDPP_ISA)
#error "compile *_cpu.cpp with DDPP_ISA=base, avx2 or avx512"
#endif

#if defined(__clang__) && defined(DDPP_ISA_avx2)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#elif defined(__clang__) && defined(DDPP_ISA_avx512)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), \
                             apply_to = function)
#elif defined(DDPP_ISA_avx2)
#pragma GCC target("avx2,fma")
#elif defined(DDPP_ISA_avx512)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

// Bytes of a vector register.
#if defined(DDPP_ISA_avx512)
#define DDPP_VECTOR_BYTES 64
#elif defined(DDPP_ISA_avx2)
#define DDPP_VECTOR_BYTES 32
#else
#define DDPP_VECTOR_BYTES 16
#endif

#define DDPP_ALWAYS_INLINE inline __attribute__((always_inline))

// For kernels whose speed needs loops over registers unrolled, through all functions and lambdas. Inlined,
// the sanitizers' checks take minutes to compile.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define DDPP_INLINE inline __attribute__((noinline))
#define DDPP_LAMBDA __attribute__((noinline))
#define DDPP_UNROLL_8
#else
#define DDPP_INLINE DDPP_ALWAYS_INLINE
#define DDPP_LAMBDA __attribute__((always_inline))
#define DDPP_UNROLL_8 _Pragma("GCC unroll 8")
#endif

#if defined(__clang__) && !defined(DDPP_ISA_base)
#define DDPP_ISA_END _Pragma("clang attribute pop")
#else
#define DDPP_ISA_END
#endif
