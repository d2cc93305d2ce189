// Vectors of 32-bit lanes for the CPU kernels: the same functions as law/word.h, on 4, 8 or 16 lanes at once.
// EVERETT_ISA (set by each kernels_*.cpp) picks the width: 0 portable, 1 AVX2, 2 AVX-512.
#pragma once

#include "law/word.h"

#if EVERETT_ISA > 0
#include <immintrin.h>
#endif

namespace everett {

#if EVERETT_ISA == 2
constexpr int kLanes = 16;
#elif EVERETT_ISA == 1
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef u32 U __attribute__((vector_size(4 * kLanes), may_alias));
typedef i32 I __attribute__((vector_size(4 * kLanes), may_alias));
typedef float F __attribute__((vector_size(4 * kLanes), may_alias));

EV_FN U splat(u32 value, U) { return (U){} + value; }
EV_FN F splat(float value, F) { return (F){} + value; }

template <int R>
EV_FN U rotl(U x) {
#if EVERETT_ISA == 2
  return (U)_mm512_rol_epi32((__m512i)x, R);
#elif EVERETT_ISA == 1
  // Rotations by whole bytes are one shuffle; the others take two shifts and an or.
  if constexpr (R == 16 || R == 8) {
    const __m256i by16 = _mm256_setr_epi8(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13, 2, 3, 0, 1, 6, 7, 4, 5,
                                          10, 11, 8, 9, 14, 15, 12, 13);
    const __m256i by8 = _mm256_setr_epi8(3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14, 3, 0, 1, 2, 7, 4, 5, 6,
                                         11, 8, 9, 10, 15, 12, 13, 14);
    return (U)_mm256_shuffle_epi8((__m256i)x, R == 16 ? by16 : by8);
  }
  return (x << R) | (x >> (32 - R));
#else
  return (x << R) | (x >> (32 - R));
#endif
}

EV_FN U mul_hi(U a, U b) {
#if EVERETT_ISA == 2
  __m512i even = _mm512_mul_epu32((__m512i)a, (__m512i)b);
  __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), _mm512_srli_epi64((__m512i)b, 32));
  return (U)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
#elif EVERETT_ISA == 1
  __m256i even = _mm256_mul_epu32((__m256i)a, (__m256i)b);
  __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), _mm256_srli_epi64((__m256i)b, 32));
  return (U)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
#else
  U r;
  for (int i = 0; i < kLanes; i++) r[i] = mul_hi((u32)a[i], (u32)b[i]);
  return r;
#endif
}

EV_FN U as_u32(F x) { return (U)x; }
EV_FN F as_f32(U x) { return (F)x; }

EV_FN F to_f32(U x) { return __builtin_convertvector((I)x, F); }

EV_FN F fused(F a, F b, F c) {
#if EVERETT_ISA == 2
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif EVERETT_ISA == 1
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  F r;
  for (int i = 0; i < kLanes; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#endif
}

EV_FN F square_root(F x) {
#if EVERETT_ISA == 2
  return (F)_mm512_sqrt_ps((__m512)x);
#elif EVERETT_ISA == 1
  return (F)_mm256_sqrt_ps((__m256)x);
#else
  F r;
  for (int i = 0; i < kLanes; i++) r[i] = __builtin_sqrtf(x[i]);
  return r;
#endif
}

// `condition` is a lane mask: all ones or zero, as comparisons of vectors give it.
EV_FN U select(I condition, U yes, U no) { return ((U)condition & yes) | (~(U)condition & no); }
EV_FN F select(I condition, F yes, F no) { return (F)select(condition, (U)yes, (U)no); }

template <int R>
EV_FN U shift_right_signed(U x) {
  return (U)((I)x >> R);
}

// Whether any lane of a or b is NaN.
EV_FN bool any_nan(F a, F b) {
#if EVERETT_ISA == 2
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q) != 0;
#elif EVERETT_ISA == 1
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q)) != 0;
#else
  const I nan = (a != a) | (b != b);
  i32 any = 0;
  for (int i = 0; i < kLanes; i++) any |= nan[i];
  return any != 0;
#endif
}

EV_FN I less_signed(U x, U y) { return (I)x < (I)y; }

}  // namespace everett
