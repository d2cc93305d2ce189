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


def _sine_rest(y):
    """(sin(pi y/2)/y - pi/2) / y^2, as a function of z = y^2."""
    z = mp.mpf(y)
    y = mp.sqrt(z)
    return (mp.sin(mp.pi * y / 2) / y - mp.pi / 2) / z


def table():
    """name -> list of coefficients, lowest degree first; the names and forms are those of convert.COEFFICIENTS."""
    with mp.workdps(DIGITS):
        third = mp.mpf(1) / 3
        turn = mp.mpf(1) / 4  # z = y^2 with |y| <= 1/2 quarter turn
        tiny = mp.mpf(10) ** -6  # keeps the quotients away from 0/0; the fits are smooth there
        atanh_end = (1 / (mp.mpf(7))) ** 2  # s = f/(2+f), |f| <= 1/3: |s| <= 1/5 below, 1/7 above
        atanh_end = max(atanh_end, (third / (2 - third)) ** 2)
        result = {}
        for name, dtype, log_terms, sine_terms, cosine_terms in (
            ("f32", np.float32, 8, 3, 4),
            ("f64", np.float64, 7, 6, 7),
        ):
            half_pi = _nearest(mp.pi / 2, dtype)
            ln2 = _nearest(mp.log(2), dtype)
            result[f"half_pi_{name}"] = [half_pi, _nearest(mp.pi / 2 - half_pi, dtype)]
            result[f"ln2_{name}"] = [ln2, _nearest(mp.log(2) - ln2, dtype)]
            # sin(pi y/2) = y*pi/2 + y*z*P(z); relative error.
            result[f"sine_{name}"] = fit(
                _sine_rest, lambda z: z * mp.sqrt(z) / mp.sin(mp.pi * mp.sqrt(z) / 2),
                sine_terms, tiny, turn, dtype,
            )  # fmt: skip
            # cos(pi y/2) = 1 + z*P(z); relative error.
            result[f"cosine_{name}"] = fit(
                lambda z: (mp.cos(mp.pi * mp.sqrt(z) / 2) - 1) / z, lambda z: z / mp.cos(mp.pi * mp.sqrt(z) / 2),
                cosine_terms, tiny, turn, dtype,
            )  # fmt: skip
            if name == "f32":
                # -ln(1+f) = -f + f^2*P(f); relative error.
                result["log_f32"] = fit(
                    lambda f: (f - mp.log1p(f)) / (f * f), lambda f: f * f / abs(mp.log1p(f)),
                    log_terms, -third, third, dtype,
                )  # fmt: skip
            else:
                # ln(1+f) = f - (f^2/2 - s*(f^2/2 + R(z))), s = f/(2+f), z = s^2, R = z*P(z) = atanh series less its
                # first term: ln(1+f) = 2s + s*R; relative error.
                result["log_f64"] = fit(
                    lambda z: (2 * mp.atanh(mp.sqrt(z)) / mp.sqrt(z) - 2) / z,
                    lambda z: z * mp.sqrt(z) / (2 * mp.atanh(mp.sqrt(z))),
                    log_terms, tiny, atanh_end, dtype,
                )  # fmt: skip
        return result


if __name__ == "__main__":
    for key, values in table().items():
        print(key, " ".join(v.hex() for v in values))
