// Draws into values: uniform, normal, exponential, Gumbel, Bernoulli, integers of stream law 1, the same bits everywhere.
//
// Nothing here calls a maths library: ln, sin and cos are polynomials, every fused multiply-add is written as one, and
// square root and division are the correctly rounded IEEE operations. everett_cuda/reference/convert.py is the numpy
// twin and holds the coefficients as a table; everett_cuda/reference/fit.py recomputes them.
//
// W is u32, or a vector of lanes. For vectors cpu/lanes.h must be included before this file: a vector type has no
// namespace, so the overloads for it are found only if they are already declared here.
//
// Measured against exact arithmetic (tests/test_reference.py), in ulps of the value, however small that is:
//   fp32: the logarithm alone 1.0, exponentials 1.7, cos and sin 1.6, normals 3.4
//   fp64: the logarithm alone 0.8, exponentials 1.5, cos and sin 1.5, normals 2.9
#pragma once

#include "law/word.h"

namespace everett {

template <class W>
using Float = decltype(as_f32(W{}));

// c0 + c1*x + c2*x^2 + ..., by Horner with one rounding a step.
template <class T, class C>
EV_FN T polynomial(T x, C c0) {
  return splat(c0, x);
}
template <class T, class C, class... More>
EV_FN T polynomial(T x, C c0, More... more) {
  return fused(polynomial(x, more...), x, splat(c0, x));
}

// ---- uniform --------------------------------------------------------------------------------------------------------
// [0,1): the top bits that the dtype holds. (0,1]: one step more. bf16 and fp16 values come as fp32 and are exact in
// their dtype.

template <int Bits, class W>
EV_FN Float<W> unit_closed_open(W w) {
  return to_f32(w >> (32 - Bits)) * as_f32((127u - Bits) << 23);
}
template <int Bits, class W>
EV_FN Float<W> unit_open_closed(W w) {
  return to_f32((w >> (32 - Bits)) + 1u) * as_f32((127u - Bits) << 23);
}
constexpr int kUniformBitsF32 = 24, kUniformBitsF16 = 11, kUniformBitsBf16 = 8;

EV_FN double unit_closed_open_f64(u64 w) { return to_f64(w >> 11) * 0x1p-53; }
EV_FN double unit_open_closed_f64(u64 w) { return to_f64((w >> 11) + 1) * 0x1p-53; }

// ---- logarithm, fp32 ------------------------------------------------------------------------------------------------

// -ln((1+f) * 2^k) for |f| <= 1/3, with k given as k_scaled = k * 2^23 (the exponent field itself, as a number).
// The square of a tiny f underflows, but then it is far below half an ulp of f: flushing it to zero changes nothing.
template <class F>
EV_FN F minus_ln_reduced(F f, F k_scaled) {
  const F p = polynomial(f, 0x1.ffffd6p-2f, -0x1.5554fcp-2f, 0x1.001450p-2f, -0x1.99d3a6p-3f, 0x1.50388ep-3f,
                         -0x1.1ea958p-3f, 0x1.3b0dfcp-3f, -0x1.1f247ep-3f);
  return fused(k_scaled, splat(-0x1.62e430p-24f, f), fused(f * f, p, -f));
}

// -ln x of a positive normal x. The significand is taken from [2/3, 4/3), where f = m - 1 is exact.
template <class F>
EV_FN F minus_ln(F x) {
  const auto exponent = (as_u32(x) - 0x3f2aaaabu) & 0xff800000u;
  return minus_ln_reduced(as_f32(as_u32(x) - exponent) - 1.0f, to_f32(exponent));
}

// -ln U for a U that is t (upper = 0) or 1 - t (upper = all ones), 0 < t <= 1/2: near U = 1 nothing is lost.
// U itself is rounded only to choose k; f = U * 2^-k - 1 is formed from t and exact.
template <class W>
EV_FN Float<W> minus_ln_sided(Float<W> t, W upper) {
  const Float<W> one = as_f32(upper & 0x3f800000u);
  const Float<W> signed_t = as_f32(as_u32(t) ^ (upper & 0x80000000u));
  const W exponent = (as_u32(one + signed_t) - 0x3f2aaaabu) & 0xff800000u;
  const Float<W> scale = as_f32(0x3f800000u - exponent);  // 2^-k
  const Float<W> f = fused(signed_t, scale, fused(one, scale, splat(-1.0f, t)));
  return minus_ln_reduced(f, to_f32(exponent));
}

// (c * 2^8 + low + 1/2) * 2^-40 for c < 2^31 and low = bits 0-7 of its word. The part below c is composed as a bit
// pattern above 2^-32, which is then taken off: exact, and cheaper than a second conversion.
template <class W>
EV_FN Float<W> fraction_40(W c, W low) {
  const Float<W> below = as_f32(((low << 15) & 0x007f8000u) | 0x2f804000u) - 0x1p-32f;
  return fused(to_f32(c), splat(0x1p-32f, below), below);
}

// ---- normal, fp32 ---------------------------------------------------------------------------------------------------

// cos and sin of (b >> 8) * 2^-24 turns. 4t = quadrant + y with |y| <= 1/2, both exact; so multiples of a quarter turn
// give exactly 0 (the sign of the zero follows the quadrant) and 1.
template <class W>
EV_FN void cos_sin_turns(W b, Float<W>& cosine, Float<W>& sine) {
  const W quadrant = b + 0x20000000u;  // in the top two bits: 4t, rounded to nearest
  const Float<W> y = as_f32(((b >> 7) & 0x007ffffeu) ^ 0x3fc00000u) - 1.5f;
  const Float<W> z = y * y;
  const Float<W> s = fused(
      y, polynomial(z, -0x1.777a5cp-25f, -0x1.4abbbep-1f, 0x1.465facp-4f, -0x1.2db5d4p-8f), y * 0x1.921fb6p+0f);
  const Float<W> c =
      polynomial(z, 1.0f, -0x1.3bd3ccp+0f, 0x1.03c1b0p-2f, -0x1.55b2b6p-6f, 0x1.d4f7eap-11f);
  const auto swap = (quadrant & 0x40000000u) != 0u;
  cosine = as_f32(as_u32(select(swap, s, c)) ^ ((quadrant + 0x40000000u) & 0x80000000u));
  sine = as_f32(as_u32(select(swap, c, s)) ^ (quadrant & 0x80000000u));
}

// Elements 2j and 2j+1 from the 32-bit draws a = 2j and b = 2j+1: U = (a*2^8 + (b & 255) + 1/2) * 2^-40 and
// t = (b >> 8) * 2^-24 turns, r = sqrt(-2 ln U). |value| <= 7.54, and r is never 0.
template <class W>
EV_FN void normal_pair(W a, W b, Float<W>& even, Float<W>& odd) {
  const W upper = shift_right_signed<31>(a);
  const Float<W> x = minus_ln_sided(fraction_40(a ^ upper, b ^ upper), upper);
  const Float<W> r = square_root(x + x);
  Float<W> cosine, sine;
  cos_sin_turns(b, cosine, sine);
  even = r * cosine;
  odd = r * sine;
}

// ---- exponential and Gumbel, fp32 -----------------------------------------------------------------------------------

// -ln U, U = (draw + 1/2) * 2^-64, from the two words of a 64-bit draw. Between 2^-65 and 45.06: never 0, never Inf.
template <class W>
EV_FN Float<W> exponential(W lo, W hi) {
  const W upper = shift_right_signed<31>(hi);
  const W c_lo = lo ^ upper;
  const Float<W> below = fraction_40(c_lo >> 8, c_lo) * 0x1p-24f;
  return minus_ln_sided(fused(to_f32(hi ^ upper), splat(0x1p-32f, below), below), upper);
}

// -ln of the exponential. Between -3.81 and 45.06.
template <class W>
EV_FN Float<W> gumbel(W lo, W hi) {
  return minus_ln(exponential(lo, hi));
}

// An exponential that is stored as fp16 stays above 0: 2^-24 is that format's smallest value.
template <class F>
EV_FN F above_zero_f16(F x) {
  return select(less_signed(as_u32(x), splat(0x33800000u, as_u32(x))), splat(0x1p-24f, x), x);
}

// ---- fp64, one value at a time --------------------------------------------------------------------------------------

// As minus_ln_reduced, with k_scaled = k * 2^52. ln(1+f) = f - (f^2/2 - s*(f^2/2 + R)) where s = f/(2+f) and
// R = 2 atanh(s)/s - 2.
EV_FN double minus_ln_reduced_f64(double f, double k_scaled) {
  const double s = f / (2.0 + f), z = s * s, half_square = 0.5 * f * f;
  const double r = z * polynomial(z, 0x1.5555555555773p-1, 0x1.99999998f1712p-2, 0x1.249249b1b214dp-2,
                                  0x1.c71c01a6a6706p-3, 0x1.7474d8d663d8fp-3, 0x1.385390ec09399p-3,
                                  0x1.3ab8d2089c1f5p-3);
  const double tail = fused(-s, half_square + r, half_square);
  const double low = fused(k_scaled, -0x1.abc9e3b39803fp-108, tail) - f;
  return fused(k_scaled, -0x1.62e42fefa39efp-53, low);
}

EV_FN double minus_ln_f64(double x) {
  const u64 exponent = (as_u64(x) - 0x3fe5555555555555u) & 0xfff0000000000000u;
  return minus_ln_reduced_f64(as_f64(as_u64(x) - exponent) - 1.0, to_f64(exponent));
}

// -ln U, U = (draw + 1/2) * 2^-64.
EV_FN double exponential_f64(u64 draw) {
  const u64 upper = 0 - (draw >> 63);
  const double t = fused(to_f64(draw ^ upper), 0x1p-64, 0x1p-65);
  const double one = as_f64(upper & 0x3ff0000000000000u);
  const double signed_t = upper ? -t : t;
  const u64 exponent = (as_u64(one + signed_t) - 0x3fe5555555555555u) & 0xfff0000000000000u;
  const double scale = as_f64(0x3ff0000000000000u - exponent);
  return minus_ln_reduced_f64(fused(signed_t, scale, fused(one, scale, -1.0)), to_f64(exponent));
}

EV_FN double gumbel_f64(u64 draw) { return minus_ln_f64(exponential_f64(draw)); }

// As normal_pair, from the 64-bit draws a and b: U = (a + 1/2) * 2^-64, t = (b >> 11) * 2^-53. |value| <= 9.50.
EV_FN void normal_pair_f64(u64 a, u64 b, double& even, double& odd) {
  const double x = exponential_f64(a), r = square_root(x + x);
  const u64 quadrant = b + 0x2000000000000000u;
  const double y = to_f64((b & ~(u64)2047) << 2) * 0x1p-64;  // a signed conversion: |y| <= 1/2, exact
  const double z = y * y;
  const double s = fused(y,
                         polynomial(z, 0x1.1a62633145c07p-54, -0x1.4abbce625be46p-1, 0x1.466bc67758c4cp-4,
                                    -0x1.32d2cce31bf07p-8, 0x1.5078300344a80p-13, -0x1.e3008fa597315p-19,
                                    0x1.e3fbde29d4c65p-25),
                         y * 0x1.921fb54442d18p+0);
  const double c = polynomial(z, 1.0, -0x1.3bd3cc9be45dep+0, 0x1.03c1f081b5a52p-2, -0x1.55d3c7e3bfe56p-6,
                              0x1.e1f50675b2059p-11, -0x1.a6d1e238e0cd5p-16, 0x1.f9c4adaee162cp-22,
                              -0x1.b03457279239bp-28);
  const bool swap = (quadrant >> 62) & 1;
  const u64 sign = (u64)1 << 63;
  even = r * as_f64(as_u64(swap ? s : c) ^ ((quadrant + (sign >> 1)) & sign));
  odd = r * as_f64(as_u64(swap ? c : s) ^ (quadrant & sign));
}

// ---- Bernoulli with a probability of its own for each element -------------------------------------------------------

// draw < round(p * 2^64), p in [0,1] (checked by the caller). Scaling is exact, so there is one rounding, and from
// p = 2^-12 on none. p = 0 never gives true, p = 1 always: its threshold 2^64 has no 64-bit form.
EV_FN bool bernoulli(u64 draw, double p) {
  return p >= 1.0 || draw < (u64)__builtin_rint(p * 0x1p64);
}

// ---- integers -------------------------------------------------------------------------------------------------------

// One of 0 ... span-1, each with a probability within 2^-64 of 1/span: the high 64 bits of draw * span. A span of 0 stands
// for 2^64.
EV_FN u64 integer_below(u64 draw, u64 span) { return span == 0 ? draw : mul_hi(draw, span); }

}  // namespace everett
