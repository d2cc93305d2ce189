// fp32 to bf16, fp16 and fp8 and back, rounded to nearest even, in integer arithmetic: the same on every target and in
// any denormal mode. W is u32 or a vector of lanes, as in convert.h.
//
// fp8: finite numbers beyond the largest become the largest (448 in e4m3, 57344 in e5m2), as in every recipe for fp8
// training: a tensor scaled to its largest element would else turn into NaN there when dropout scales it up. Inf stays
// Inf in e5m2; e4m3 has none and takes its largest number. NaN stays NaN.
#pragma once

#include "law/word.h"

namespace everett {

// The bf16 pattern in the low half of the word. NaN stays NaN (its quiet bit is set).
template <class W>
EV_FN W bf16_of(decltype(as_f32(W{})) x) {
  const W bits = as_u32(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const auto nan = less_signed(splat(0x7f800000u, bits), bits & 0x7fffffffu);
  return select(nan, (bits >> 16) | 0x40u, rounded);
}

// The fp16 pattern in the low half of the word. From 65520 on Inf; NaN stays NaN with the top of its payload.
template <class W>
EV_FN W f16_of(decltype(as_f32(W{})) x) {
  const W bits = as_u32(x), u = bits & 0x7fffffffu;
  // Below 2^-14 the result counts in steps of 2^-24, the spacing of fp32 numbers between 1/2 and 1.
  const W small = as_u32(as_f32(u) + 0.5f) - 0x3f000000u;
  const W normal = (u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13;
  W r = select(less_signed(u, splat(0x38800000u, u)), small, normal);
  r = select(less_signed(splat(0x477fffffu, u), u), splat(0x7c00u, u), r);
  r = select(less_signed(splat(0x7f800000u, u), u), ((u >> 13) & 0x3ffu) | 0x7e00u, r);
  return r | ((bits >> 16) & 0x8000u);
}

// The e4m3 ("e4m3fn") pattern in the low byte of the word.
template <class W>
EV_FN W e4m3_of(decltype(as_f32(W{})) x) {
  const W bits = as_u32(x), u = bits & 0x7fffffffu;
  // Below 2^-6 the result counts in steps of 2^-9, the spacing of fp32 numbers between 2^14 and 2^15.
  const W small = as_u32(as_f32(u) + 0x1p14f) - 0x46800000u;
  const W normal = (u - 0x3c000000u + 0x7ffffu + ((u >> 20) & 1u)) >> 20;
  W r = select(less_signed(u, splat(0x3c800000u, u)), small, normal);
  r = select(less_signed(splat(0x43dfffffu, u), u), splat(0x7eu, u), r);
  r = select(less_signed(splat(0x7f800000u, u), u), splat(0x7fu, u), r);
  return r | ((bits >> 24) & 0x80u);
}

// The e5m2 pattern in the low byte of the word.
template <class W>
EV_FN W e5m2_of(decltype(as_f32(W{})) x) {
  const W bits = as_u32(x), u = bits & 0x7fffffffu;
  // Below 2^-14 the result counts in steps of 2^-16, the spacing of fp32 numbers between 2^7 and 2^8.
  const W small = as_u32(as_f32(u) + 0x1p7f) - 0x43000000u;
  const W normal = (u - 0x38000000u + 0xfffffu + ((u >> 21) & 1u)) >> 21;
  W r = select(less_signed(u, splat(0x38800000u, u)), small, normal);
  r = select(less_signed(splat(0x475fffffu, u), u), splat(0x7bu, u), r);
  r = select(less_signed(splat(0x7f7fffffu, u), u), splat(0x7cu, u), r);
  r = select(less_signed(splat(0x7f800000u, u), u), splat(0x7fu, u), r);
  return r | ((bits >> 24) & 0x80u);
}

// fp32 of patterns in the low bits of a word (the bits above must be zero). Exact; NaN stays NaN.

template <class W>
EV_FN auto f32_of_f16(W h) {
  const W u = h & 0x7fffu;
  const W small = as_u32(as_f32(u + 0x3f000000u) - 0.5f);
  W r = select(less_signed(u, splat(0x400u, u)), small, (u << 13) + 0x38000000u);
  r = select(less_signed(splat(0x7bffu, u), u), (u << 13) | 0x7f800000u, r);
  return as_f32(r | ((h & 0x8000u) << 16));
}

template <class W>
EV_FN auto f32_of_e4m3(W b) {
  const W u = b & 0x7fu;
  const W small = as_u32(as_f32(u + 0x46800000u) - 0x1p14f);
  W r = select(less_signed(u, splat(8u, u)), small, (u << 20) + 0x3c000000u);
  r = select(less_signed(splat(0x7eu, u), u), splat(0x7fc00000u, u), r);
  return as_f32(r | ((b & 0x80u) << 24));
}

// e5m2 is the upper byte of fp16.
template <class W>
EV_FN auto f32_of_e5m2(W b) {
  return f32_of_f16(W(b << 8));
}

}  // namespace everett
