// fp32 values of stored elements and back, kLanes at a time: fp32, bf16 and fp16, rounded to nearest even.
#pragma once

#include "cpu/lanes.h"
#include "law/narrow.h"

namespace everett {
namespace {  // one copy for each instruction set, never merged by the linker

typedef u16 HalfU __attribute__((vector_size(2 * kLanes), may_alias));

#if EVERETT_ISA == 0
static inline float f32_of_f16(u16 h) {
  const u32 sign = (u32)(h & 0x8000u) << 16, rest = (u32)(h & 0x7FFFu) << 13;
  if (rest >= 0x0F800000u) return as_f32(sign | rest | 0x7F800000u);          // Inf, NaN
  return as_f32(sign | as_u32(as_f32(rest) * as_f32(0x77800000u)));           // times 2^112, also right for subnormals
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
    HalfU h = __builtin_convertvector(bf16_of<U>(x), HalfU);
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
    HalfU h = __builtin_convertvector(f16_of<U>(x), HalfU);
    memcpy(p, &h, sizeof h);
  }
#endif
};

}  // namespace
}  // namespace everett
