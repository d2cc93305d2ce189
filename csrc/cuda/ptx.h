// Instructions that C++ has no words for, one function each. The tests compile the kernels with a C++ twin of this file.
//
// Pairs of narrow numbers lie in one register, the element of the lower address in the low half.
#pragma once

#include <cuda_runtime.h>

#include "law/narrow.h"

namespace everett {

// ---- 16 bytes of global memory, at a multiple of 16 -----------------------------------------------------------------

// An input that nobody reads again soon gives way to others in the caches.
__device__ __forceinline__ uint4 load_streaming(const u8* at) { return __ldcs((const uint4*)at); }

// What other warps read too, as the bias of a row.
__device__ __forceinline__ uint4 load_vector(const u8* at) { return __ldg((const uint4*)at); }

// An output is what the next op reads, so it may stay there. (8 bytes at a multiple of 8.)
__device__ __forceinline__ void store_vector(u8* at, uint4 x) { *(uint4*)at = x; }
__device__ __forceinline__ void store_vector(u8* at, uint2 x) { *(uint2*)at = x; }

// ---- shared memory ---------------------------------------------------------------------------------------------------

// An address in shared memory: 32 bits, which XOR and offsets suit better than pointers.
using Shared = u32;

__device__ __forceinline__ Shared shared_address(const void* p) { return (Shared)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void store_shared(Shared at, u32 x, u32 y, u32 z, u32 w) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}

// 2, 4, 8 or 16 bytes.
__device__ __forceinline__ u16 load_shared_half(Shared at) {
  u16 x;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(at) : "memory");
  return x;
}
template <int Words>
__device__ __forceinline__ void load_shared(Shared at, u32 x[Words]) {
  if constexpr (Words == 1) asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x[0]) : "r"(at) : "memory");
  if constexpr (Words == 2)
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "r"(at) : "memory");
  if constexpr (Words == 4)
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(at)
                 : "memory");
}

// The same values, from where the compiler cannot trace them. What it can trace it computes again in each turn of a loop
// rather than keep it in registers, even registers that the kernel has to spare. `scratch`: 128 N bytes of the warp.
template <int N>
__device__ __forceinline__ void hide(u32 (&x)[N], Shared scratch, u32 lane) {
  const Shared own = scratch + 4 * lane;
  for (int i = 0; i < N; i++) asm volatile("st.volatile.shared.b32 [%0], %1;" ::"r"(own + 128 * i), "r"(x[i]));
  for (int i = 0; i < N; i++) asm volatile("ld.volatile.shared.b32 %0, [%1];" : "=r"(x[i]) : "r"(own + 128 * i));
}

// Holds what is computed from x inside the branch where this stands: else the compiler computes it ahead of a loop around
// the branch, or from turn to turn, and keeps it in registers for a branch that is rarely taken.
__device__ __forceinline__ void compute_here(u64& x) { asm volatile("" : "+l"(x)); }

// ---- comparisons and conversions -------------------------------------------------------------------------------------

// Each half of the result is all ones where the low 15 bits of that half of `draws` are at least those of `thresholds`,
// else 0: two comparisons in one HSET2. As fp16 patterns without their sign, 15-bit numbers are in their order, and
// ">= or unordered" takes the NaN patterns as the largest; so thresholds go up to 0x7C00, which is fp16's infinity.
__device__ __forceinline__ u32 at_least_15(u32 draws, u32 thresholds) {
  u32 r;
  asm("{.reg .b32 t; abs.f16x2 t, %1; set.geu.u32.f16x2 %0, t, %2;}" : "=r"(r) : "r"(draws), "r"(thresholds));
  return r;
}

__device__ __forceinline__ u32 bf16_pair(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

__device__ __forceinline__ u32 f16_pair(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

__device__ __forceinline__ void f32_of_f16_pair(u32 pair, float& low, float& high) {
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(low), "=f"(high)
      : "r"(pair));
}

// fp8, in the low half of the register. Below sm_89, which has no such instructions, the law's own functions.

// As e4m3_of.
__device__ __forceinline__ u32 e4m3_pair(float low, float high) {
#if __CUDA_ARCH__ >= 890
  u16 r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
#else
  return e4m3_of<u32>(low) | e4m3_of<u32>(high) << 8;
#endif
}

// As e5m2_of, but Inf becomes the largest number.
__device__ __forceinline__ u32 e5m2_pair_finite(float low, float high) {
#if __CUDA_ARCH__ >= 890
  u16 r;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
#else
  const u32 largest = 0x7f7fffffu;
  const auto finite = [&](float x) { return fabsf(x) > as_f32(largest) ? copysignf(as_f32(largest), x) : x; };
  return e5m2_of<u32>(finite(low)) | e5m2_of<u32>(finite(high)) << 8;
#endif
}

__device__ __forceinline__ void f32_of_e4m3_pair(u32 pair, float& low, float& high) {
#if __CUDA_ARCH__ >= 890
  u32 halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((u16)pair));
  f32_of_f16_pair(halves, low, high);
#else
  low = f32_of_e4m3(pair & 0xffu), high = f32_of_e4m3(pair >> 8 & 0xffu);
#endif
}

__device__ __forceinline__ void f32_of_e5m2_pair(u32 pair, float& low, float& high) {
  f32_of_f16_pair(__byte_perm(pair, 0, 0x1404), low, high);
}

}  // namespace everett
