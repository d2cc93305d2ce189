"""What the tests of noise share: the record that a draw will have, and tests of frequencies and distributions.

Keys are fixed, so the tests are deterministic; ALPHA is what a correct implementation would have failed with, had it been
drawn anew. Every test of a distribution has a negative control that must fail.
"""

import math

import numpy as np
import torch

from everett_cuda import keys

ALPHA = 1e-6


def record_of_next_draw(seed=99, world=True):
    """The record that the next draw of the family will have in this step: the same torch RNG state finds the same key
    (counted `reused`), so that a function's own record is known without a hook into it."""
    torch.manual_seed(seed)
    record = np.frombuffer(keys.draw_record(world), "<u4")
    torch.manual_seed(seed)
    return record


def as_numpy(t):
    """numpy values of a tensor, bf16 as patterns."""
    t = t.detach().contiguous()
    return t.view(torch.uint16).numpy() if t.dtype == torch.bfloat16 else t.numpy()


def same_bits(t, expected):
    return as_numpy(t).tobytes() == np.ascontiguousarray(expected).tobytes()


def _log_gamma_tail(a, x):
    """The regularised upper incomplete gamma function Q(a, x): a series below a + 1, a continued fraction above."""
    if x <= 0:
        return 1.0
    front = math.exp(-x + a * math.log(x) - math.lgamma(a))
    if x < a + 1:
        term = total = 1 / a
        k = a
        while abs(term) > 1e-16 * abs(total):
            k += 1
            term *= x / k
            total += term
        return 1 - total * front
    tiny = 1e-300
    b = x + 1 - a
    c, d = 1 / tiny, 1 / b
    h = d
    for i in range(1, 10_000):
        an = -i * (i - a)
        b += 2
        d = 1 / (an * d + b or tiny)
        c = b + an / c or tiny
        h *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return front * h


def chi_square_p(counts, probabilities):
    """p-value of Pearson's test that counts come from probabilities. Bins of probability 0 must be empty."""
    counts, probabilities = np.asarray(counts, float), np.asarray(probabilities, float)
    if counts[probabilities == 0].any():
        return 0.0
    counts, probabilities = counts[probabilities > 0], probabilities[probabilities > 0]
    expected = counts.sum() * probabilities / probabilities.sum()
    assert expected.min() >= 5, "bins too small for Pearson's test"
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return _log_gamma_tail((len(counts) - 1) / 2, statistic / 2)


def ks_p(values, cdf):
    """p-value of Kolmogorov's test that values have the distribution function cdf (Smirnov's limit, with Stephens's
    correction for finite n)."""
    x = np.sort(np.asarray(values, float))
    n = len(x)
    u = np.array([cdf(v) for v in x])
    distance = max((np.arange(1, n + 1) / n - u).max(), (u - np.arange(n) / n).max())
    lam = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * distance
    terms = (2 * (-1) ** (k - 1) * math.exp(-2 * k * k * lam * lam) for k in range(1, 101))
    return min(1.0, max(0.0, sum(terms))) if lam > 0.2 else 1.0
