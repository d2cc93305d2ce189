// Dropout fused with what stands before and after it in a transformer: bias, GELU, residual; and GELU's backward.
#pragma once

#include <algorithm>

#include "cpu/keep.h"
#include "cpu/values.h"
#include "law/gelu.h"

namespace everett {
namespace {  // one copy for each instruction set, never merged by the linker

// kLanes elements: v is x + bias, extra the residual, or the incoming gradient of a backward.
template <FusedOp Op>
EV_FN F fused_value(F v, F extra, F scale, U keep) {
  switch (Op) {
    case FusedOp::bias_dropout_add: return as_f32(as_u32(v * scale) & keep) + extra;
    case FusedOp::gelu_erf: return as_f32(as_u32(gelu_erf(v) * scale) & keep);
    case FusedOp::gelu_tanh: return as_f32(as_u32(gelu_tanh(v) * scale) & keep);
    case FusedOp::gelu_erf_backward: return as_f32(as_u32(extra * scale * gelu_erf_slope(v)) & keep);
    case FusedOp::gelu_tanh_backward: return as_f32(as_u32(extra * scale * gelu_tanh_slope(v)) & keep);
  }
}

// n <= kGroup elements of one row; bias and extra may be null where the op takes none.
template <FusedOp Op, class Type>
static void fused_stretch(const FusedJob& job, const int16_t* keep, i64 at, i64 column, i64 n) {
  using T = typename Type::T;
  const T* in = (const T*)job.in + at;
  const T* bias = job.bias ? (const T*)job.bias + column : nullptr;
  const T* extra = job.extra ? (const T*)job.extra + at : nullptr;
  T* out = (T*)job.out + at;
  const F scale = splat((float)job.scale, F{});
  auto lanes = [&](const T* x, const T* b, const T* r, const int16_t* k, T* y) {
    HalfS narrow;
    memcpy(&narrow, k, sizeof narrow);
    F v = Type::load(x);
    if (b) v = v + Type::load(b);
    Type::store(y, fused_value<Op>(v, r ? Type::load(r) : F{}, scale, (U)__builtin_convertvector(narrow, I)));
  };
  i64 i = 0;
  for (; i + kLanes <= n; i += kLanes) lanes(in + i, bias ? bias + i : nullptr, extra ? extra + i : nullptr, keep + i, out + i);
  if (i < n) {
    T x[kLanes] = {}, b[kLanes] = {}, r[kLanes] = {}, y[kLanes];
    int16_t k[kLanes] = {};
    memcpy(x, in + i, (n - i) * sizeof(T));
    memcpy(k, keep + i, (n - i) * sizeof(*k));
    if (bias) memcpy(b, bias + i, (n - i) * sizeof(T));
    if (extra) memcpy(r, extra + i, (n - i) * sizeof(T));
    lanes(x, bias ? b : nullptr, extra ? r : nullptr, k, y);
    memcpy(out + i, y, (n - i) * sizeof(T));
  }
}

template <FusedOp Op, class Type>
static void fused_rows(const FusedJob& job, i64 begin, i64 end) {
  KeepMasks masks(job);
  while (begin < end) {
    const i64 column = begin % job.columns;
    i64 n = std::min(end - begin, job.columns - column);
    const int16_t* keep = masks.from(job.layout.e0 + (u64)begin, n);
    fused_stretch<Op, Type>(job, keep, begin, column, n);
    begin += n;
  }
}

template <FusedOp Op>
static void fused_op(const FusedJob& job, i64 begin, i64 end) {
  switch (job.type) {
    case DType::bf16: return fused_rows<Op, Bf16>(job, begin, end);
    case DType::f16: return fused_rows<Op, Fp16>(job, begin, end);
    case DType::f8e4m3: return fused_rows<Op, E4m3>(job, begin, end);
    case DType::f8e5m2: return fused_rows<Op, E5m2>(job, begin, end);
    default: return fused_rows<Op, Fp32>(job, begin, end);
  }
}

static void fused(const FusedJob& job, i64 begin, i64 end) {
  switch (job.fused) {
    case FusedOp::bias_dropout_add: return fused_op<FusedOp::bias_dropout_add>(job, begin, end);
    case FusedOp::gelu_erf: return fused_op<FusedOp::gelu_erf>(job, begin, end);
    case FusedOp::gelu_tanh: return fused_op<FusedOp::gelu_tanh>(job, begin, end);
    case FusedOp::gelu_erf_backward: return fused_op<FusedOp::gelu_erf_backward>(job, begin, end);
    case FusedOp::gelu_tanh_backward: return fused_op<FusedOp::gelu_tanh_backward>(job, begin, end);
  }
}

}  // namespace
}  // namespace everett
