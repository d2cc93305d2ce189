// fp32 values of stored elements and back, kLanes at a time: fp32, bf16, fp16 and fp8, rounded to nearest even.
#pragma once

#include "cpu/lanes.h"
#include "law/narrow.h"

namespace everett {
namespace {  // one copy for each instruction set, never merged by the linker

typedef u16 HalfU __attribute__((vector_size(2 * kLanes), may_alias));

typedef u8 ByteU __attribute__((vector_size(kLanes), may_alias));

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
    HalfU h;
    memcpy(&h, p, sizeof h);
    return f32_of_f16(__builtin_convertvector(h, U));
  }
  EV_FN void store(T* p, F x) {
    HalfU h = __builtin_convertvector(f16_of<U>(x), HalfU);
    memcpy(p, &h, sizeof h);
  }
#endif
};

struct E4m3 {
  using T = u8;
  EV_FN F load(const T* p) {
    ByteU b;
    memcpy(&b, p, sizeof b);
    return f32_of_e4m3(__builtin_convertvector(b, U));
  }
  EV_FN void store(T* p, F x) {
    ByteU b = __builtin_convertvector(e4m3_of<U>(x), ByteU);
    memcpy(p, &b, sizeof b);
  }
};

struct E5m2 {
  using T = u8;
  EV_FN F load(const T* p) {
    ByteU b;
    memcpy(&b, p, sizeof b);
    return f32_of_e5m2(__builtin_convertvector(b, U));
  }
  EV_FN void store(T* p, F x) {
    ByteU b = __builtin_convertvector(e5m2_of<U>(x), ByteU);
    memcpy(p, &b, sizeof b);
  }
};

}  // namespace
}  // namespace everett
