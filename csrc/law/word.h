// The arithmetic that the stream law is written in: 32-bit words and fp32, for one value (host and device) here, and
// for a vector of lanes in cpu/lanes.h. The law's templates name only these functions, so one text serves every target.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define EV_FN static __host__ __device__ __forceinline__
#define EV_UNROLL _Pragma("unroll")
#else
#define EV_UNROLL _Pragma("GCC unroll 16")
// Internal linkage matters: the CPU files are compiled for several instruction sets, and a linker that merged their
// copies of one function could hand AVX-512 code to a CPU without it.
#define EV_FN static inline __attribute__((always_inline))
#endif

namespace everett {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i32 = int32_t;
using i64 = int64_t;

template <int R>
EV_FN u32 rotl(u32 x) {
  static_assert(R > 0 && R < 32, "rotation");
  return (x << R) | (x >> (32 - R));
}

EV_FN u32 mul_hi(u32 a, u32 b) { return (u32)(((u64)a * b) >> 32); }

// High 64 bits of a 64 x 64 product.
EV_FN u64 mul_hi(u64 a, u64 b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  return (u64)(((unsigned __int128)a * b) >> 64);
#endif
}

EV_FN u32 as_u32(float x) {
  u32 r;
  memcpy(&r, &x, 4);
  return r;
}
EV_FN float as_f32(u32 x) {
  float r;
  memcpy(&r, &x, 4);
  return r;
}
EV_FN u64 as_u64(double x) {
  u64 r;
  memcpy(&r, &x, 8);
  return r;
}
EV_FN double as_f64(u64 x) {
  double r;
  memcpy(&r, &x, 8);
  return r;
}

// fp32 of a word read as a signed number (exact below 2^24, else rounded to nearest even).
EV_FN float to_f32(u32 x) { return (float)(i32)x; }

// fp64 of a 64-bit word read as a signed number (exact below 2^53, else rounded to nearest even).
EV_FN double to_f64(u64 x) { return (double)(i64)x; }

// One rounding, as IEEE fusedMultiplyAdd. Never written as a*b+c: contraction is off everywhere.
EV_FN float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
EV_FN double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

// Of fp32 from 2^-100 to 2^100 on GPUs: the law takes roots of -2 ln U only.
EV_FN float square_root(float x) {
#if defined(__CUDA_ARCH__)
  // What nvcc makes of a correctly rounded root of such numbers (read in sqrt.rn's SASS), without its test for others:
  // five of a normal's 59 instructions, and a branch that would keep two pairs from being computed at the same time.
  float guess;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(x));
  const float root = x * guess;
  return fused(fused(-root, root, x), guess * 0.5f, root);
#else
  return __builtin_sqrtf(x);
#endif
}
EV_FN double square_root(double x) { return __builtin_sqrt(x); }

template <class T>
EV_FN T select(bool condition, T yes, T no) {
  return condition ? yes : no;
}

// Arithmetic (sign-filling) right shift of a word.
template <int R>
EV_FN u32 shift_right_signed(u32 x) {
  return (u32)((i32)x >> R);
}

// x < y as signed 32-bit numbers.
EV_FN bool less_signed(u32 x, u32 y) { return (i32)x < (i32)y; }

// A constant for every lane of the type of `like`.
EV_FN u32 splat(u32 value, u32) { return value; }
EV_FN float splat(float value, float) { return value; }
EV_FN double splat(double value, double) { return value; }

}  // namespace everett
