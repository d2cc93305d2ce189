// Stochastic rounding of fp32 to bf16 and fp16: up or down (in magnitude) with the probabilities that make the expected
// value the number itself, decided by one 16-bit draw. Inf and NaN pass. W is u32 or a vector of lanes.
//
// bf16: the draw is added to the bit pattern and the low half cut, so the probability is exact. fp16: the significand is
// shifted right by 13, or by more where the result is subnormal, after a draw of as many bits was added; beyond 16 bits
// of shift the draw decides to 2^-16. Above the greatest finite value "up" is Inf.
#pragma once

#include "law/word.h"

namespace everett {

// draw: 0 .. 65535. The bf16 pattern in the low half of the word; NaN stays NaN (its quiet bit is set).
template <class W>
EV_FN W bf16_stochastic(W bits, W draw) {
  const W magnitude = bits & 0x7fffffffu;
  const W rounded = (bits + draw) >> 16;
  const auto special = less_signed(splat(0x7f7fffffu, bits), magnitude);
  const auto nan = less_signed(splat(0x7f800000u, bits), magnitude);
  return select(nan, (bits >> 16) | 0x40u, select(special, bits >> 16, rounded));
}

// One value at a time: shifts by a variable amount. The fp16 pattern.
EV_FN u32 f16_stochastic(u32 bits, u32 draw) {
  const u32 u = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
  if (u >= 0x7f800000u) return sign | (u == 0x7f800000u ? 0x7c00u : ((u >> 13) & 0x3ffu) | 0x7e00u);
  if (u >= 0x47800000u) return sign | 0x7c00u;  // 65536 on: no finite neighbour above, and none below within a step
  if (u >= 0x38800000u) return sign | ((u + (draw >> 3) - 0x38000000u) >> 13);
  // Subnormal: steps of 2^-24. The significand, with its leading one, is a multiple of 2^(exponent - 23).
  const u32 exponent = u >> 23;
  const u32 shift = 126u - (exponent ? exponent : 1u);  // 14 .. 125
  const u64 significand = (u & 0x7fffffu) | (exponent ? 0x800000u : 0u);
  if (shift > 40) return sign;  // below 2^-40 of a step: the draw cannot tell it from 0
  const u64 added = shift >= 16 ? (u64)draw << (shift - 16) : (u64)draw >> (16 - shift);
  return sign | (u32)((significand + added) >> shift);
}

}  // namespace everett
