// GELU, x * Phi(x), and its slope, in fp32 by our own polynomials: bit for bit the same on every target.
//
// Phi is the standard normal's distribution function. `erf` form: Phi(v) from erfc(x) = exp(-x^2) t P(t), t = 1/(1 + 3x/8),
// x = |v|/sqrt 2 (the shape of Abramowitz and Stegun 7.1.26, with nine terms). `tanh` form (Hendrycks and Gimpel 2016):
// Phi(v) ~ 1/(1 + exp(-2u)), u = sqrt(2/pi) (v + 0.044715 v^3). Conventions and measurement as in convert.h; numpy's twin
// is everett_cuda/reference/gelu.py. Greatest error against exact arithmetic, |v| <= 12 (tests/test_gelu.py):
//   erf form 2.2e-7 |v|, its slope 2.1e-7; tanh form 1.5e-7 |v| of its own formula, its slope 2.0e-7
#pragma once

#include "law/convert.h"

namespace everett {

template <class F>
EV_FN F magnitude(F x) {
  return as_f32(as_u32(x) & 0x7fffffffu);
}

// 2^z for z <= 0; 0 from -126 down, and for NaN.
template <class F>
EV_FN F exp2_negative(F z) {
  const F shifted = z + 12582912.0f;  // 1.5 * 2^23: the integer part lies in the low bits
  const F p = polynomial(z - (shifted - 12582912.0f), 1.0f, 0x1.62e430p-1f, 0x1.ebfbdcp-3f, 0x1.c6af7cp-5f,
                         0x1.3b2de0p-7f, 0x1.5f082ep-10f, 0x1.416b60p-13f);
  return select(z > splat(-126.0f, z), as_f32(as_u32(p) + (as_u32(shifted) << 23)), splat(0.0f, z));
}

// 1/d for 1 <= d < 2^30, within 2 ulp: a guess from the bit pattern (within 13 %), then two steps of third order. No
// division, which would cost a GPU more than all the rest.
template <class F>
EV_FN F reciprocal(F d) {
  F r = as_f32(0x7ef311c7u - as_u32(d));
  for (int i = 0; i < 2; i++) {
    const F e = fused(-d, r, splat(1.0f, d));
    r = fused(r, fused(e, e, e), r);
  }
  return r;
}

// Phi(v), and exp(-v^2/2) for the slope. Beyond |v| = 14 the exponential is 0.
template <class F>
EV_FN F normal_cdf(F v, F& gauss) {
  const F a = select(magnitude(v) >= splat(14.0f, v), splat(14.0f, v), magnitude(v));
  gauss = exp2_negative(a * a * -0x1.715476p-1f);
  const F t = reciprocal(fused(a, splat(0x1.0f876cp-2f, v), splat(1.0f, v)));
  const F p = polynomial(t, 0x1.b162e6p-3f, 0x1.af609ep-3f, 0x1.a4b8b6p-3f, 0x1.efc666p-4f, 0x1.1970e6p-2f,
                         -0x1.d93f4ap-3f, 0x1.bc4f10p-2f, -0x1.26fd7ep-2f, 0x1.f96bbap-5f);
  const F tail = gauss * 0.5f * (t * p);
  return select(v > splat(0.0f, v), 1.0f - tail, tail);
}

template <class F>
EV_FN F gelu_erf(F v) {
  F gauss;
  return v * normal_cdf(v, gauss);
}
template <class F>
EV_FN F gelu_erf_slope(F v) {
  F gauss;
  const F cdf = normal_cdf(v, gauss);
  const F inside = select(magnitude(v) >= splat(14.0f, v), splat(0.0f, v), v);  // Inf times 0 is not wanted here
  return fused(inside, gauss * 0x1.988454p-2f, cdf);
}

// The tanh form's stand-in for Phi, and the factor E r^2 = s (1 - s) of its slope. v within +-11, where it is 0 or 1.
template <class F>
EV_FN F logistic_cdf(F v, F& slope_factor) {
  const F e = exp2_negative(-(magnitude(v) * fused(v * v, splat(0x1.a5a7d0p-4f, v), splat(0x1.26aec2p+1f, v))));
  const F r = reciprocal(1.0f + e);
  slope_factor = e * r * r;
  return select(v > splat(0.0f, v), r, e * r);
}

template <class F>
EV_FN F within_11(F v) {
  const F end = as_f32((as_u32(v) & 0x80000000u) | 0x41300000u);
  return select(magnitude(v) >= splat(11.0f, v), end, v);
}

template <class F>
EV_FN F gelu_tanh(F v) {
  F factor;
  return v * logistic_cdf(within_11(v), factor);
}
template <class F>
EV_FN F gelu_tanh_slope(F v) {
  F factor;
  const F inside = within_11(v);
  const F cdf = logistic_cdf(inside, factor);
  const F twice_u_slope = fused(inside * inside, splat(0x1.b6676cp-3f, v), splat(0x1.988454p+0f, v));
  return fused(inside * twice_u_slope, factor, cdf);
}

}  // namespace everett
