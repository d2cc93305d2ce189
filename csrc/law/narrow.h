// fp32 to bf16 and fp16, rounded to nearest even, in integer arithmetic: the same on every target and in any
// denormal mode. W is u32 or a vector of lanes, as in convert.h.
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

}  // namespace everett
