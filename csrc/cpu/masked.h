// Dropout and its fused relatives: apply a keep mask to a stretch of elements.
#pragma once

#include "cpu/keep.h"
#include "cpu/values.h"

namespace everett {
namespace {  // one copy for each instruction set, never merged by the linker

// kLanes fp32 values under the masks keep[0..kLanes).
template <MaskedOp Op>
EV_FN F masked_value(const MaskedJob& job, const int16_t* keep, F in, F extra) {
  HalfS narrow;
  memcpy(&narrow, keep, sizeof narrow);
  const U mask = (U)__builtin_convertvector(narrow, I);
  const F scaled = in * splat((float)job.scale, F{});
  if constexpr (Op == MaskedOp::affine)
    return select((I)mask, scaled + splat((float)job.shift, F{}), splat((float)job.dropped, F{}));
  const F kept = as_f32(as_u32(scaled) & mask);
  if constexpr (Op == MaskedOp::dropout_add) return kept + extra;
  return kept;
}

template <MaskedOp Op, class Type>
static void apply(const MaskedJob& job, const int16_t* keep, const typename Type::T* in, const typename Type::T* extra,
                  typename Type::T* out, i64 n) {
  i64 i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F residual = Op == MaskedOp::dropout_add ? Type::load(extra + i) : F{};
    Type::store(out + i, masked_value<Op>(job, keep + i, Type::load(in + i), residual));
  }
  if (i < n) {
    typename Type::T in_rest[kLanes] = {}, extra_rest[kLanes] = {}, out_rest[kLanes];
    int16_t keep_rest[kLanes] = {};
    memcpy(in_rest, in + i, (n - i) * sizeof(*in));
    memcpy(keep_rest, keep + i, (n - i) * sizeof(*keep));
    if (Op == MaskedOp::dropout_add) memcpy(extra_rest, extra + i, (n - i) * sizeof(*in));
    const F residual = Op == MaskedOp::dropout_add ? Type::load(extra_rest) : F{};
    Type::store(out_rest, masked_value<Op>(job, keep_rest, Type::load(in_rest), residual));
    memcpy(out + i, out_rest, (n - i) * sizeof(*out));
  }
}


// fp64 multiplies by the fp64 scale; the compiler turns this loop into vectors.
template <MaskedOp Op>
static void apply_fp64(const MaskedJob& job, const int16_t* keep, const double* in, const double* extra, double* out,
                       i64 n) {
  for (i64 i = 0; i < n; i++) {
    const double scaled = in[i] * job.scale;
    if (Op == MaskedOp::affine) {
      out[i] = keep[i] ? scaled + job.shift : job.dropped;
    } else {
      const double kept = as_f64(as_u64(scaled) & (u64)(i64)keep[i]);
      out[i] = Op == MaskedOp::dropout_add ? kept + extra[i] : kept;
    }
  }
}

// The bf16 pattern of a number (not NaN) in the high half of its lane; the low half holds what rounding left.
EV_FN U rounded_to_bf16(F x) {
  const U bits = as_u32(x);
  return bits + splat(0x7FFFu, U{}) + ((bits >> 16) & splat(1u, U{}));
}

// The pair of bf16 elements in each lane times scale, rounded, under mask.
EV_FN U masked_bf16_pairs(U v, U mask, F scale) {
  const F low = as_f32(v << 16) * scale, high = as_f32(v & splat(0xFFFF0000u, U{})) * scale;
  if (__builtin_expect(any_nan(low, high), 0)) return (bf16_of<U>(low) | (bf16_of<U>(high) << 16)) & mask;
  return ((rounded_to_bf16(low) >> 16) | (rounded_to_bf16(high) & splat(0xFFFF0000u, U{}))) & mask;
}

#if EVERETT_ISA == 2
// With AVX512_BF16 one instruction rounds 32 products to nearest even. It takes subnormals for zero, so vectors with one
// in them, or with a NaN, go the other way. Returns how many of n elements it did: all whole vectors.
__attribute__((target("avx512bf16"))) i64 apply_bf16_by_instruction(const MaskedJob& job, const int16_t* keep,
                                                                     const u16* in, u16* out, i64 n) {
  const __m512 scale = _mm512_set1_ps((float)job.scale);
  const __m512i odd = _mm512_set1_epi32((int)0xFFFF0000u);
  // Words 0-15 of the rounded vector are the even elements, 16-31 the odd ones.
  alignas(64) static constexpr u16 kInterleave[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i interleave = _mm512_load_si512(kInterleave);
  constexpr int kSubnormalOrNan = 0x20 | 0x01 | 0x80;
  i64 i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512i v = _mm512_loadu_si512(in + i), mask = _mm512_loadu_si512(keep + i);
    const __m512 low = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)), scale);
    const __m512 high = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(v, odd)), scale);
    const __mmask16 strange = _mm512_fpclass_ps_mask(low, kSubnormalOrNan) | _mm512_fpclass_ps_mask(high, kSubnormalOrNan);
    __m512i r;
    if (__builtin_expect(strange != 0, 0))
      r = (__m512i)masked_bf16_pairs((U)v, (U)mask, (F)scale);
    else
      r = _mm512_and_si512(_mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(high, low)), mask);
    _mm512_storeu_si512(out + i, r);
  }
  return i;
}

bool has_bf16_instruction() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
}
const bool kHasBf16Instruction = has_bf16_instruction();
#endif

// bf16 dropout by pairs: two elements share a 32-bit lane from load to store, so nothing is packed or unpacked.
static void apply_bf16_dropout(const MaskedJob& job, const int16_t* keep, const u16* in, u16* out, i64 n) {
  const F scale = splat((float)job.scale, F{});
  i64 i = 0;
#if EVERETT_ISA == 2
  if (kHasBf16Instruction) i = apply_bf16_by_instruction(job, keep, in, out, n);
#endif
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    U v, mask;
    memcpy(&v, in + i, sizeof v);
    memcpy(&mask, keep + i, sizeof mask);
    const U r = masked_bf16_pairs(v, mask, scale);
    memcpy(out + i, &r, sizeof r);
  }
  if (i < n) apply<MaskedOp::dropout, Bf16>(job, keep + i, in + i, nullptr, out + i, n - i);
}

// Elements [begin, end) of a job whose masks are applied by `body(keep, in, extra, out, n)` on contiguous stretches.
// A stretch that is not contiguous goes through small buffers, so that there is one arithmetic for all layouts.
template <class T, class Body>
static void masked_runs(const MaskedJob& job, i64 begin, i64 end, Body body) {
  KeepMasks masks(job);
  const Layout& l = job.layout;
  const int last = l.dims - 1;
  const bool with_extra = job.extra != nullptr;
  const bool contiguous = l.in[last] == 1 && l.out[last] == 1 && (!with_extra || l.extra[last] == 1);
  for_runs(l, begin, end, [&](Run r) {
    while (r.n > 0) {
      i64 n = r.n;
      const int16_t* keep = masks.along(r.e, l.e[last], n);
      const T* in = (const T*)job.in + r.in;
      const T* extra = with_extra ? (const T*)job.extra + r.extra : nullptr;
      T* out = (T*)job.out + r.out;
      if (contiguous) {
        body(keep, in, extra, out, n);
      } else {
        T in_buffer[kGroup], extra_buffer[kGroup], out_buffer[kGroup];
        for (i64 i = 0; i < n; i++) in_buffer[i] = in[i * l.in[last]];
        if (with_extra)
          for (i64 i = 0; i < n; i++) extra_buffer[i] = extra[i * l.extra[last]];
        body(keep, in_buffer, extra_buffer, out_buffer, n);
        for (i64 i = 0; i < n; i++) out[i * l.out[last]] = out_buffer[i];
      }
      r.n -= n, r.in += n * l.in[last], r.extra += n * l.extra[last], r.out += n * l.out[last];
      r.e += (u64)(n * l.e[last]);
    }
  });
}

template <MaskedOp Op>
static void masked_op(const MaskedJob& job, i64 begin, i64 end) {
  switch (job.type) {
    case DType::f64:
      return masked_runs<double>(job, begin, end, [&](const int16_t* k, const double* x, const double* r, double* y, i64 n) {
        apply_fp64<Op>(job, k, x, r, y, n);
      });
    case DType::bf16:
      return masked_runs<u16>(job, begin, end, [&](const int16_t* k, const u16* x, const u16* r, u16* y, i64 n) {
        if constexpr (Op == MaskedOp::dropout)
          apply_bf16_dropout(job, k, x, y, n);
        else
          apply<Op, Bf16>(job, k, x, r, y, n);
      });
    case DType::f16:
      return masked_runs<u16>(job, begin, end, [&](const int16_t* k, const u16* x, const u16* r, u16* y, i64 n) {
        apply<Op, Fp16>(job, k, x, r, y, n);
      });
    case DType::f8e4m3:
      return masked_runs<u8>(job, begin, end, [&](const int16_t* k, const u8* x, const u8* r, u8* y, i64 n) {
        apply<Op, E4m3>(job, k, x, r, y, n);
      });
    case DType::f8e5m2:
      return masked_runs<u8>(job, begin, end, [&](const int16_t* k, const u8* x, const u8* r, u8* y, i64 n) {
        apply<Op, E5m2>(job, k, x, r, y, n);
      });
    default:
      return masked_runs<float>(job, begin, end, [&](const int16_t* k, const float* x, const float* r, float* y, i64 n) {
        apply<Op, Fp32>(job, k, x, r, y, n);
      });
  }
}

static void masked(const MaskedJob& job, i64 begin, i64 end) {
  switch (job.op) {
    case MaskedOp::dropout_add: return masked_op<MaskedOp::dropout_add>(job, begin, end);
    case MaskedOp::affine: return masked_op<MaskedOp::affine>(job, begin, end);
    default: return masked_op<MaskedOp::dropout>(job, begin, end);
  }
}

}  // namespace
}  // namespace everett
