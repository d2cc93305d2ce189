// Standard gamma variates of any shape a > 0, in fp64: Marsaglia and Tsang, "A simple method for generating gamma variables"
// (ACM TOMS 26(3), 2000), as a pure function of the stream.
//
// Element e has block e of each stream (tag 9, s = round r = 0, 1, ...) to itself, eight 64-bit draws: pairs (0, 1) and (2, 3)
// make four normals, of which three are tried in turn, against the exponentials of draws 4, 5 and 6; draw 7 of round 0 makes
// the exponential E by which a shape below 1 is reached from a + 1: times U^(1/a) = exp(-E/a).
//
// With d = a - 1/3, c = 1/sqrt(9d) and v = (1 + cx)^3, x is taken iff 1 + cx > 0 and -E' < x^2/2 + d(1 - v + ln v). A try fails
// with a probability of at most 0.05 (at a = 1; 0.0002 at a = 100). After kGammaRounds rounds, which a stream in 10^62 needs,
// the value is d. At large shapes d(1 - v + ln v) is off by about 1e-16 d: the law is that good up to a = 10^12 or so.
#pragma once

#include "law/convert.h"

namespace everett {

constexpr u32 kGammaRounds = 16;

// exp(-y), y >= 0; 0 from 707 on. y = k ln 2 - r, |r| <= 0.35, and Taylor's polynomial, whose rest is below 5e-18.
EV_FN double exp_minus_f64(double y) {
  if (!(y < 707.0)) return 0.0;
  const double k = __builtin_rint(y * 0x1.71547652b82fep+0);
  const double r = fused(k, 0x1.abc9e3b39803fp-56, fused(k, 0x1.62e42fefa39efp-1, -y));
  const double p = polynomial(r, 1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320,
                              1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800);
  return p * as_f64((u64)(1023 - (i64)k) << 52);
}

// `draws(round, w)` writes the eight draws of a round. logarithm: ln of the variate, which holds where that is too small for
// fp64. A shape that is no positive number gives NaN.
template <class Draws>
EV_FN double gamma_variate(double shape, bool logarithm, Draws draws) {
  if (!(shape > 0.0)) return as_f64(0x7ff8000000000000u);
  const bool raised = shape < 1.0;
  const double d = (raised ? shape + 1.0 : shape) - 1.0 / 3, c = 1.0 / square_root(9.0 * d);
  double v = 1.0, reduce = 0.0;
  bool taken = false;
#if defined(__CUDACC__)
#pragma unroll 1
#endif
  for (u32 round = 0; round < kGammaRounds && !taken; round++) {
    u64 w[8];
    draws(round, w);
    if (round == 0 && raised) reduce = exponential_f64(w[7]) / shape;
    double x[4];
    normal_pair_f64(w[0], w[1], x[0], x[1]);
    normal_pair_f64(w[2], w[3], x[2], x[3]);
    EV_UNROLL
    for (int i = 0; i < 3; i++) {
      const double t = fused(c, x[i], 1.0);
      if (taken || t <= 0.0) continue;
      const double cube = t * t * t;
      const double bound = fused(d, (1.0 - cube) - 3.0 * minus_ln_f64(t), 0.5 * x[i] * x[i]);
      if (-exponential_f64(w[4 + i]) < bound) taken = true, v = cube;
    }
  }
  return logarithm ? -minus_ln_f64(d * v) - reduce : d * v * exp_minus_f64(reduce);
}

}  // namespace everett
