// fp32 values of stored elements and back, kLanes at a time: fp32, bf16 and fp16, rounded to nearest even.
#pragma once

#include "cpu/lanes.h"

namespace everett {
namespace {  // one copy for each instruction set, never merged by the linker

typedef u16 HalfU __attribute__((vector_size(2 * kLanes), may_alias));

EV_FN u32 bf16_bits(u32 f32_bits) {
  const u32 rounded = (f32_bits + 0x7FFFu + ((f32_bits >> 16) & 1u)) >> 16;
  const bool nan = (f32_bits & 0x7FFFFFFFu) > 0x7F800000u;
  return nan ? (f32_bits >> 16) | 0x40u : rounded;
}

// fp32 bits rounded to bf16, in the high half of each lane (the low half holds what rounding left).
EV_FN U bf16_rounded(F x) {
  const U bits = as_u32(x);
  const U rounded = bits + (splat(0x7FFFu, U{}) + ((bits >> 16) & splat(1u, U{})));
  return select((I)(x != x), bits | splat(0x400000u, U{}), rounded);
}

#if EVERETT_ISA == 0
static inline float f32_of_f16(u16 h) {
  const u32 sign = (u32)(h & 0x8000u) << 16, rest = (u32)(h & 0x7FFFu) << 13;
  if (rest >= 0x0F800000u) return as_f32(sign | rest | 0x7F800000u);          // Inf, NaN
  return as_f32(sign | as_u32(as_f32(rest) * as_f32(0x77800000u)));           // times 2^112, also right for subnormals
}
static inline u16 f16_of_f32(float f) {
  const u32 bits = as_u32(f), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return (u16)(sign | 0x7E00u | ((magnitude >> 13) & 0x3FFu));
  if (magnitude >= 0x477FF000u) return (u16)(sign | 0x7C00u);                 // 65520 and above round to Inf
  if (magnitude < 0x38800000u)                                                // below 2^-14: let fp32 addition round
    return (u16)(sign | (as_u32(as_f32(magnitude) + 0.5f) - 0x3F000000u));
  return (u16)(sign | ((magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13));
}
#endif

struct Fp32 {
  using T = float;
  EV_FN F load(const T* p) { F r; memcpy(&r, p, sizeof r); return r; }
  EV_FN void store(T* p, F x) { memcpy(p, &x, sizeof x); }
};

struct Bf16 {
  using T = u16;
  EV_FN F load(const T* p) {
    HalfU h;
    memcpy(&h, p, sizeof h);
    return as_f32(__builtin_convertvector(h, U) << 16);
  }
  EV_FN void store(T* p, F x) {
    HalfU h = __builtin_convertvector(bf16_rounded(x) >> 16, HalfU);
    memcpy(p, &h, sizeof h);
  }
};

struct Fp16 {
  using T = u16;
#if EVERETT_ISA == 2
  EV_FN F load(const T* p) { return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  EV_FN void store(T* p, F x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif EVERETT_ISA == 1
  EV_FN F load(const T* p) { return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  EV_FN void store(T* p, F x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#else
  EV_FN F load(const T* p) {
    F r;
    for (int i = 0; i < kLanes; i++) r[i] = f32_of_f16(p[i]);
    return r;
  }
  EV_FN void store(T* p, F x) {
    for (int i = 0; i < kLanes; i++) p[i] = f16_of_f32(x[i]);
  }
#endif
};

}  // namespace
}  // namespace everett
