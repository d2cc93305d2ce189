"""GELU and its slope in fp32: the numpy twin of csrc/law/gelu.h, operation for operation, so that every bit agrees."""

import numpy as np

from everett_cuda.reference.convert import _F, _U, _f32, _polynomial, _u32
from everett_cuda.reference.ieee import fma32

# exp2_f32: 2^f = 1 + f*P(f), |f| <= 1/2. erfc_f32: erfc(x) exp(x^2) = t*P(t), t = 1/(1 + 3x/8). fit.py recomputes them.
COEFFICIENTS = {
    name: [float.fromhex(c) for c in text.split()]
    for name, text in {
        "exp2_f32": "0x1.62e430p-1 0x1.ebfbdcp-3 0x1.c6af7cp-5 0x1.3b2de0p-7 0x1.5f082ep-10 0x1.416b60p-13",
        "erfc_f32": "0x1.b162e6p-3 0x1.af609ep-3 0x1.a4b8b6p-3 0x1.efc666p-4 0x1.1970e6p-2 -0x1.d93f4ap-3 0x1.bc4f10p-2 "
        "-0x1.26fd7ep-2 0x1.f96bbap-5",
    }.items()
}


def _c(text):
    return _F(float.fromhex(text))


def exp2_negative(z):
    """2^z of float32 z <= 0; 0 from -126 down."""
    inside = z > _F(-126)
    z = np.where(inside, z, _F(0))
    shifted = z + _F(12582912.0)
    p = _polynomial(z - (shifted - _F(12582912.0)), [_F(1), *map(_F, COEFFICIENTS["exp2_f32"])], fma32)
    with np.errstate(over="ignore"):
        return np.where(inside, _f32(_u32(p) + (_u32(shifted) << _U(23))), _F(0))


def reciprocal(d):
    """1/d of float32 1 <= d < 2^30, within 2 ulp."""
    r = _f32(_U(0x7EF311C7) - _u32(d))
    for _ in range(2):
        e = fma32(-d, r, _F(1))
        r = fma32(r, fma32(e, e, e), r)
    return r


def _erf_parts(v):
    a = np.minimum(np.abs(v), _F(14))
    gauss = exp2_negative(a * a * -_c("0x1.715476p-1"))
    t = reciprocal(fma32(a, _c("0x1.0f876cp-2"), _F(1)))
    tail = gauss * _F(0.5) * (t * _polynomial(t, list(map(_F, COEFFICIENTS["erfc_f32"])), fma32))
    return np.where(v > 0, _F(1) - tail, tail), gauss


def _tanh_parts(v):
    e = exp2_negative(-(np.abs(v) * fma32(v * v, _c("0x1.a5a7d0p-4"), _c("0x1.26aec2p+1"))))
    r = reciprocal(_F(1) + e)
    return np.where(v > 0, r, e * r), e * r * r


def _of_finite(function):
    """Applied where v is finite; there the twins' arithmetic is defined. NaN gives NaN, the ends are given by the law."""

    def wrapped(v, approximate="none"):
        v = np.asarray(v, _F)
        finite = np.isfinite(v)
        values, at_plus, at_minus = function(np.where(finite, v, _F(0)), approximate)
        return np.where(finite, values, np.where(np.isnan(v), v, np.where(v > 0, _F(at_plus), _F(at_minus))))

    wrapped.__doc__ = function.__doc__
    return wrapped


@_of_finite
def gelu(v, approximate="none"):
    """v * Phi(v) of float32 v; approximate: "none" (erf) or "tanh". +Inf gives +Inf, -Inf gives NaN, as torch's does."""
    cdf = _erf_parts(v)[0] if approximate == "none" else _tanh_parts(np.clip(v, _F(-11), _F(11)))[0]
    return v * cdf, np.inf, np.nan


@_of_finite
def gelu_slope(v, approximate="none"):
    """The derivative of `gelu`: 1 at +Inf and 0 at -Inf."""
    if approximate == "none":
        cdf, gauss = _erf_parts(v)
        inside = np.where(np.abs(v) >= 14, _F(0), v)
        return fma32(inside, gauss * _c("0x1.988454p-2"), cdf), 1, 0
    inside = np.clip(v, _F(-11), _F(11))
    cdf, factor = _tanh_parts(inside)
    twice_u_slope = fma32(inside * inside, _c("0x1.b6676cp-3"), _c("0x1.988454p+0"))
    return fma32(inside * twice_u_slope, factor, cdf), 1, 0
