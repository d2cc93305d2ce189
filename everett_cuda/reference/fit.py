"""Recomputes the polynomial coefficients of the conversions (csrc/law/convert.h): weighted minimax fits by Remez.

`python -m everett_cuda.reference.fit` prints the table; a test compares it with `convert.COEFFICIENTS`. Needs mpmath.

Each polynomial is fitted for the smallest maximal relative error of the function it serves. Coefficients are rounded to
the working precision one after another, lowest degree first, and those not yet rounded are fitted again each time, so
that they take up the rounding of the earlier ones.
"""

import mpmath as mp
import numpy as np

DIGITS = 50


def _remez(g, weight, terms, low, high):
    """Coefficients c of sum c_k x^k, k < terms, with the smallest maximum of weight*|g - sum| over [low, high].

    Exchange on a fixed Chebyshev grid of 400 points: solve for errors equal in size and alternating in sign on terms+1
    reference points; put the grid's worst point in place of a neighbour whose error has the same sign; repeat until no
    point is worse by 0.1 %.
    """
    points = 400
    grid = [(low + high) / 2 - (high - low) / 2 * mp.cos(mp.pi * (k + mp.mpf(1) / 2) / points) for k in range(points)]
    wanted, weights = [g(x) for x in grid], [weight(x) for x in grid]
    chosen = [int(points * (k + 0.5) / (terms + 1)) for k in range(terms + 1)]
    for _ in range(1000):
        rows, right = mp.matrix(terms + 1, terms + 1), mp.matrix(terms + 1, 1)
        for row, k in enumerate(chosen):
            for degree in range(terms):
                rows[row, degree] = grid[k] ** degree
            rows[row, terms] = (-1) ** row / weights[k]
            right[row] = wanted[k]
        solution = mp.lu_solve(rows, right)
        coefficients, level = [solution[k] for k in range(terms)], abs(solution[terms])
        errors = [w * (t - mp.polyval(coefficients[::-1], x)) for x, t, w in zip(grid, wanted, weights, strict=True)]
        worst = max(range(points), key=lambda k: abs(errors[k]))
        if abs(errors[worst]) < level * mp.mpf("1.001"):
            return coefficients
        same = [k for k in chosen if (errors[k] > 0) == (errors[worst] > 0)]
        left = [k for k in chosen if k < worst]
        if not left or len(left) == len(chosen):
            end = chosen[0] if not left else chosen[-1]
            # Beyond an end of the other sign, the point joins there and the far end leaves.
            chosen.remove(end if end in same else chosen[-1] if not left else chosen[0])
        else:
            after = chosen[len(left)]
            chosen.remove(left[-1] if left[-1] in same else after)
        chosen = sorted([*chosen, worst])
    raise ArithmeticError("no convergence in 1000 exchanges")


def fit(g, weight, terms, low, high, dtype):
    """Coefficients of 1, x, x^2, ... rounded to `dtype` (a numpy float type), as Python floats. weight >= 0."""
    fixed = []
    for k in range(terms):
        # What is left, divided by x^k so that the free terms start at 1 again: only then do signs alternate over x = 0.
        def rest(x, fixed=tuple(fixed), k=k):
            return (g(x) - sum(mp.mpf(c) * x**i for i, c in enumerate(fixed))) / x**k

        def rest_weight(x, k=k):
            return weight(x) * abs(x) ** k

        fixed.append(_nearest(_remez(rest, rest_weight, terms - k, low, high)[0], dtype))
    return fixed


def _nearest(x, dtype):
    """`x` rounded once to the dtype: mpmath rounds to its binary precision, then the cast is exact."""
    with mp.workprec(np.finfo(dtype).nmant + 1):
        return float(+x)


def _sine(z):
    """(sin(pi/2 y)/y - pi/2) / z with y = sqrt(z)."""
    y = mp.sqrt(z)
    return (mp.sin(mp.pi / 2 * y) / y - mp.pi / 2) / z


def _sine_weight(z):
    y = mp.sqrt(z)
    return z * y / mp.sin(mp.pi / 2 * y)


def _cosine(z):
    return (mp.cos(mp.pi / 2 * mp.sqrt(z)) - 1) / z


def _cosine_weight(z):
    return z / mp.cos(mp.pi / 2 * mp.sqrt(z))


def _log(f):
    return (f - mp.log1p(f)) / (f * f)


def _log_weight(f):
    return f * f / abs(mp.log1p(f))


def _atanh(z):
    s = mp.sqrt(z)
    return (2 * mp.atanh(s) / s - 2) / z


def _atanh_weight(z):
    s = mp.sqrt(z)
    return z * s / (2 * mp.atanh(s))


def _exp2(x):
    """(2^x - 1) / x."""
    return (mp.mpf(2) ** x - 1) / x


def _exp2_weight(x):
    return abs(x) / mp.mpf(2) ** x


_ERFC_STEP = mp.mpf(3) / 8


def _erfc(t):
    """erfc(x) exp(x^2) / t with x such that t = 1 / (1 + 3/8 x)."""
    x = (1 / t - 1) / _ERFC_STEP
    return mp.erfc(x) * mp.exp(x * x) / t


def _erfc_weight(t):
    return 1 / _erfc(t)


def table():
    """name -> coefficients, lowest degree first, under the names and in the forms of convert.COEFFICIENTS."""
    with mp.workdps(DIGITS):
        third = mp.mpf(1) / 3  # |f| <= 1/3
        z_end = mp.mpf(1) / 4  # z = y^2, |y| <= 1/2 quarter turn
        s_end = third / (2 - third)  # s = f/(2+f) at f = -1/3
        tiny = mp.mpf(10) ** -6  # the quotients are 0/0 at 0, and smooth around it
        result = {}
        for name, dtype, sine_terms, cosine_terms in (("f32", np.float32, 3, 4), ("f64", np.float64, 6, 7)):
            half_pi, ln2 = _nearest(mp.pi / 2, dtype), _nearest(mp.log(2), dtype)
            result[f"half_pi_{name}"] = [half_pi, _nearest(mp.pi / 2 - half_pi, dtype)]
            result[f"ln2_{name}"] = [ln2] if name == "f32" else [ln2, _nearest(mp.log(2) - ln2, dtype)]
            result[f"sine_{name}"] = fit(_sine, _sine_weight, sine_terms, tiny, z_end, dtype)
            result[f"cosine_{name}"] = fit(_cosine, _cosine_weight, cosine_terms, tiny, z_end, dtype)
        result["log_f32"] = fit(_log, _log_weight, 8, -third, third, np.float32)
        result["exp2_f32"] = fit(_exp2, _exp2_weight, 6, -mp.mpf(1) / 2, mp.mpf(1) / 2, np.float32)
        erfc_end = 1 / (1 + _ERFC_STEP * mp.mpf("9.4"))  # exp(-9.4^2) is below 2^-126
        result["erfc_f32"] = fit(_erfc, _erfc_weight, 9, erfc_end, mp.mpf(1), np.float32)
        result["log_f64"] = fit(_atanh, _atanh_weight, 7, tiny, s_end**2, np.float64)
        return result


if __name__ == "__main__":
    for key, values in table().items():
        print(key, " ".join(v.hex() for v in values))
