"""Draws into values: the numpy twin of csrc/law/convert.h, operation for operation, so that every bit agrees.

Draws are arrays of unsigned integers as `stream.draws` gives them. dtype is "float32", "float64", "bfloat16" or
"float16"; bf16 values come as uint16 patterns. bf16 and fp16 normals, exponentials and Gumbels are the fp32 values
rounded to nearest even.
"""

import numpy as np

from everett_cuda.reference.ieee import fma32, fma64, round_to

# Polynomials, lowest degree first; fit.py recomputes them. y is a part of a quarter turn, z = y^2.
#   sine: sin(pi/2 y) = y*half_pi[0] + y*(half_pi[1] + z*P(z))        cosine: cos(pi/2 y) = 1 + z*P(z)
#   log_f32: -ln(1+f) = -f + f^2*P(f)       log_f64: 2 atanh(s)/s - 2 = z*P(z), z = s^2, s = f/(2+f)
COEFFICIENTS = {
    name: [float.fromhex(c) for c in text.split()]
    for name, text in {
        "half_pi_f32": "0x1.921fb6p+0 -0x1.777a5cp-25",
        "ln2_f32": "0x1.62e430p-1",
        "sine_f32": "-0x1.4abbbep-1 0x1.465facp-4 -0x1.2db5d4p-8",
        "cosine_f32": "-0x1.3bd3ccp+0 0x1.03c1b0p-2 -0x1.55b2b6p-6 0x1.d4f7eap-11",
        "log_f32": "0x1.ffffd6p-2 -0x1.5554fcp-2 0x1.001450p-2 -0x1.99d3a6p-3 0x1.50388ep-3 -0x1.1ea958p-3 "
        "0x1.3b0dfcp-3 -0x1.1f247ep-3",
        "half_pi_f64": "0x1.921fb54442d18p+0 0x1.1a62633145c07p-54",
        "ln2_f64": "0x1.62e42fefa39efp-1 0x1.abc9e3b39803fp-56",
        "sine_f64": "-0x1.4abbce625be46p-1 0x1.466bc67758c4cp-4 -0x1.32d2cce31bf07p-8 0x1.5078300344a80p-13 "
        "-0x1.e3008fa597315p-19 0x1.e3fbde29d4c65p-25",
        "cosine_f64": "-0x1.3bd3cc9be45dep+0 0x1.03c1f081b5a52p-2 -0x1.55d3c7e3bfe56p-6 0x1.e1f50675b2059p-11 "
        "-0x1.a6d1e238e0cd5p-16 0x1.f9c4adaee162cp-22 -0x1.b03457279239bp-28",
        "log_f64": "0x1.5555555555773p-1 0x1.99999998f1712p-2 0x1.249249b1b214dp-2 0x1.c71c01a6a6706p-3 "
        "0x1.7474d8d663d8fp-3 0x1.385390ec09399p-3 0x1.3ab8d2089c1f5p-3",
    }.items()
}
WIDTH = {"float32": 32, "bfloat16": 32, "float16": 32, "float64": 64}  # bits of a draw of `uniform` and `normal`
# Words wrap around on purpose; numpy warns of it when a draw is a scalar.
_wrapping = np.errstate(over="ignore")
UNIFORM_BITS = {"float32": 24, "bfloat16": 8, "float16": 11, "float64": 53}


def uniform(draws, dtype="float32", closed_above=False):
    """Uniforms: the draw's top 24 (fp32), 8 (bf16), 11 (fp16) or, of 64, 53 (fp64) bits, times the step 2^-bits.

    In [0,1), or one step more, in (0,1], with `closed_above`.
    """
    width, bits = WIDTH[dtype], UNIFORM_BITS[dtype]
    steps = (np.asarray(draws, np.uint64) >> np.uint64(width - bits)) + np.uint64(bool(closed_above))
    values = steps.astype(np.float64) * 2.0**-bits  # exact
    return values if dtype == "float64" else round_to(values, dtype)


@_wrapping
def normal(even_draws, odd_draws, dtype="float32"):
    """The pair of normals (elements 2j, 2j+1) of the draws A = 2j and B = 2j+1: r cos(2 pi t), r sin(2 pi t).

    r = sqrt(-2 ln U). 32-bit draws: U = (A*2^8 + (B & 255) + 1/2) * 2^-40, t = (B>>8) * 2^-24; fp64, from 64-bit draws:
    U = (A + 1/2) * 2^-64, t = (B>>11) * 2^-53. Box and Muller (1958) with the radius uniform extended to 40 bits.
    """
    if dtype == "float64":
        x = exponential(even_draws, "float64")
        cosine, sine = _cos_sin_turns_f64(np.asarray(odd_draws, np.uint64))
        r = np.sqrt(x + x)
        return r * cosine, r * sine
    a, b = np.asarray(even_draws).astype(np.uint32), np.asarray(odd_draws).astype(np.uint32)
    upper = _spread_top_bit(a)
    x = _minus_ln_sided(_fraction_40(a ^ upper, b ^ upper), upper)
    cosine, sine = _cos_sin_turns(b)
    r = np.sqrt(x + x)
    return round_to(r * cosine, dtype), round_to(r * sine, dtype)


@_wrapping
def exponential(draws, dtype="float32"):
    """-ln U, U = (64-bit draw + 1/2) * 2^-64. Between 2^-65 and 45.06: never 0, never Inf.

    fp16 cannot hold values below 2^-24: they are stored as 2^-24, so that 0 stays impossible.
    """
    draws = np.asarray(draws, np.uint64)
    if dtype == "float64":
        return _exponential_f64(draws)
    x = _exponential_f32(draws)
    return round_to(np.maximum(x, np.float32(2.0**-24)) if dtype == "float16" else x, dtype)


@_wrapping
def gumbel(draws, dtype="float32"):
    """-ln of the exponential of the same draw (in fp32 for the 16-bit types). Between -3.81 and 45.06."""
    draws = np.asarray(draws, np.uint64)
    if dtype == "float64":
        return _minus_ln_f64(_exponential_f64(draws))
    return round_to(_minus_ln(_exponential_f32(draws)), dtype)


def minus_ln(x):
    """-ln of positive normal fp64 x."""
    return _minus_ln_f64(np.asarray(x, np.float64))


def bernoulli(draws, p):
    """True where the 64-bit draw is below round(p * 2^64), half to even. p: float64 in [0,1]; 0 never, 1 always."""
    draws, p = np.broadcast_arrays(np.asarray(draws, np.uint64), np.asarray(p, np.float64))
    below_one = np.where(p < 1, p, 0.0)
    threshold = np.rint(below_one * 2.0**64).astype(np.uint64)
    return (draws < threshold) | (p >= 1)


# ---- fp32 ------------------------------------------------------------------------------------------------------------

_F = np.float32
_U = np.uint32


def _u32(x):
    return np.asarray(x, _F).view(_U)


def _f32(x):
    return np.asarray(x, _U).view(_F)


def _spread_top_bit(w):
    return np.where(w >> _U(31), _U(0xFFFFFFFF), _U(0))


def _to_f32(w):
    """A word read as a signed number."""
    return np.asarray(w, _U).view(np.int32).astype(_F)


def _polynomial(x, coefficients, fma):
    result = np.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        result = fma(result, x, c)
    return result


def _minus_ln_reduced(f, k_scaled):
    """-ln((1+f) * 2^k), |f| <= 1/3, k_scaled = k * 2^23."""
    p = _polynomial(f, COEFFICIENTS["log_f32"], fma32)
    return fma32(k_scaled, -COEFFICIENTS["ln2_f32"][0] * 2.0**-23, fma32(f * f, p, -f))


def _minus_ln(x):
    """-ln x of positive normal fp32: x = m * 2^k with m in [2/3, 4/3)."""
    exponent = (_u32(x) - _U(0x3F2AAAAB)) & _U(0xFF800000)
    return _minus_ln_reduced(_f32(_u32(x) - exponent) - _F(1), _to_f32(exponent))


def _minus_ln_sided(t, upper):
    """-ln U where U = t (upper 0) or 1 - t (upper all ones), 0 < t <= 1/2."""
    one = _f32(upper & _U(0x3F800000))
    signed_t = np.where(upper != 0, -t, t)
    exponent = (_u32(one + signed_t) - _U(0x3F2AAAAB)) & _U(0xFF800000)
    scale = _f32(_U(0x3F800000) - exponent)
    return _minus_ln_reduced(fma32(signed_t, scale, fma32(one, scale, -1.0)), _to_f32(exponent))


def _fraction_40(c, low):
    """fp32 of (c * 2^8 + (low & 255) + 1/2) * 2^-40, c < 2^31: c is rounded to fp32 first, then the sum."""
    below = (2.0 * (low & _U(255)) + 1.0) * 2.0**-41
    return fma32(_to_f32(c), 2.0**-32, below)


def _cos_sin_turns(b):
    """cos and sin of (b>>8) * 2^-24 turns."""
    t = (b >> _U(8)).astype(np.int64)
    quadrant = (t + 2**21) >> 22  # 4t to the nearest integer, halves up
    y = ((t - (quadrant << 22)) * 2.0**-22).astype(_F)  # exact
    z = y * y
    half_pi, rest = COEFFICIENTS["half_pi_f32"]
    sine = fma32(y, _polynomial(z, [rest, *COEFFICIENTS["sine_f32"]], fma32), y * _F(half_pi))
    cosine = _polynomial(z, [1.0, *COEFFICIENTS["cosine_f32"]], fma32)
    return _rotate(cosine, sine, quadrant)


def _rotate(cosine, sine, quadrant):
    """Cosine and sine after `quadrant` quarter turns."""
    swap, turn = quadrant & 1 == 1, quadrant & 3
    c, s = np.where(swap, sine, cosine), np.where(swap, cosine, sine)
    return np.where((turn == 1) | (turn == 2), -c, c), np.where(turn >= 2, -s, s)


def _exponential_f32(draws):
    lo, hi = (draws & np.uint64(0xFFFFFFFF)).astype(_U), (draws >> np.uint64(32)).astype(_U)
    upper = _spread_top_bit(hi)
    c_lo, c_hi = lo ^ upper, hi ^ upper
    below = _fraction_40(c_lo >> _U(8), c_lo) * _F(2.0**-24)
    return _minus_ln_sided(fma32(_to_f32(c_hi), 2.0**-32, below), upper)


# ---- fp64 ------------------------------------------------------------------------------------------------------------

_TWO_THIRDS_F64 = np.uint64(0x3FE5555555555555)
_EXPONENT_F64 = np.uint64(0xFFF0000000000000)
_ONE_F64 = np.uint64(0x3FF0000000000000)


def _minus_ln_reduced_f64(f, k_scaled):
    """-ln((1+f) * 2^k), |f| <= 1/3, k_scaled = k * 2^52; ln(1+f) = f - (f^2/2 - s*(f^2/2 + R))."""
    s = f / (2.0 + f)
    z, half_square = s * s, 0.5 * f * f
    r = z * _polynomial(z, COEFFICIENTS["log_f64"], fma64)
    tail = fma64(-s, half_square + r, half_square)
    ln2, rest = COEFFICIENTS["ln2_f64"]
    return fma64(k_scaled, -ln2 * 2.0**-52, fma64(k_scaled, -rest * 2.0**-52, tail) - f)


def _minus_ln_f64(x):
    bits = np.asarray(x, np.float64).view(np.uint64)
    exponent = (bits - _TWO_THIRDS_F64) & _EXPONENT_F64
    return _minus_ln_reduced_f64((bits - exponent).view(np.float64) - 1.0, exponent.view(np.int64).astype(np.float64))


def _exponential_f64(draws):
    upper = draws >> np.uint64(63) == 1
    c = np.where(upper, ~draws, draws)
    t = fma64(c.astype(np.float64), 2.0**-64, 2.0**-65)
    one, signed_t = np.where(upper, 1.0, 0.0), np.where(upper, -t, t)
    exponent = ((one + signed_t).view(np.uint64) - _TWO_THIRDS_F64) & _EXPONENT_F64
    scale = (_ONE_F64 - exponent).view(np.float64)
    f = fma64(signed_t, scale, fma64(one, scale, -1.0))
    return _minus_ln_reduced_f64(f, exponent.view(np.int64).astype(np.float64))


def _cos_sin_turns_f64(b):
    """cos and sin of (b>>11) * 2^-53 turns."""
    t = (b >> np.uint64(11)).astype(np.int64)
    quadrant = (t + 2**50) >> 51
    y = (t - (quadrant << 51)) * 2.0**-51
    z = y * y
    half_pi, rest = COEFFICIENTS["half_pi_f64"]
    sine = fma64(y, _polynomial(z, [rest, *COEFFICIENTS["sine_f64"]], fma64), y * half_pi)
    cosine = _polynomial(z, [1.0, *COEFFICIENTS["cosine_f64"]], fma64)
    return _rotate(cosine, sine, quadrant)
