"""SP 800-90B estimators: NIST's own results, slow twins written from the standard's text, and degenerate data."""

import itertools
import math
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from everett_cuda import _C
from everett_cuda.entropy_estimate import NAMES, Estimates, estimate

# --- NIST's tool ---

_NIST_NAMES = {
    "Most Common Value": "most_common_value", "Collision Test": "collision", "Markov Test": "markov",
    "Compression Test": "compression", "T-Tuple Test": "t_tuple", "LRS Test": "lrs", "(MultiMCW)": "multi_mcw",
    "Lag Prediction": "lag", "(MultiMMC)": "multi_mmc", "LZ78Y": "lz78y",
}  # fmt: skip


def nist_results(text):
    """File name to ({estimator: value}, {estimator: value of the bit string}, the least in bits a symbol)."""
    results = {}
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        symbols, bits, least = {}, {}, None
        for line in section.splitlines():
            found = re.search(r"(?:= |H_original: |H_bitstring\): )([\d.]+)", line)
            name = next((ours for theirs, ours in _NIST_NAMES.items() if theirs in line), None)
            if found and name:
                (bits if "bit string" in line else symbols)[name] = float(found[1])
            elif found:
                least = float(found[1])
        results[section.split()[0]] = symbols, bits, least
    return results


FILES = [
    ("sp800_90b/truerand_8bit.bin", 8),
    ("sp800_90b/biased-random-bytes.bin", 8),
    ("sp800_90b/biased-random-bits.bin", 1),
    ("quantum/humboldt-photon-1MiB.bin", 8),
]


@pytest.mark.parametrize("path, width", FILES)
def test_estimates_are_those_of_nists_tool(shared_data, path, width):
    expected = nist_results((shared_data / "sp800_90b" / "expected.md").read_text())
    name = path.split("/")[1]
    symbols, bits, least = expected[name]
    found = estimate(np.fromfile(shared_data / path, np.uint8), width)
    assert len(symbols) == (10 if width == 1 else 7) and len(bits) == (0 if width == 1 else 10)
    assert found.symbols == pytest.approx(symbols, abs=1e-6)
    assert found.bits == pytest.approx(bits, abs=1e-6)
    assert found.min_entropy == pytest.approx(least, abs=4e-6 if width == 8 else 1e-6)  # 8 times a rounded bit's


# --- slow twins, written from the standard's text ---

Z = 2.5758293035489008


def bound(p, n):
    return min(1.0, p + Z * math.sqrt(p * (1 - p) / (n - 1)))


def slow_tuples(s):
    """6.3.5 and 6.3.6, counting every tuple."""
    n = len(s)
    t_tuple = lrs = 0.0
    often = True
    for w in itertools.count(1):
        counts = Counter(tuple(s[i : i + w]) for i in range(n - w + 1))
        most = max(counts.values())
        often = often and most >= 35
        if often:
            t_tuple = max(t_tuple, (most / (n - w + 1)) ** (1 / w))
        elif most > 1:
            places = n - w + 1
            pairs = sum(c * (c - 1) // 2 for c in counts.values())
            lrs = max(lrs, (pairs / (places * (places - 1) / 2)) ** (1 / w))
        else:
            return [-math.log2(bound(p, n)) if p else math.nan for p in (t_tuple, lrs)]


def slow_prediction(guesses, k):
    """The steps that 6.3.7 to 6.3.10 share; guesses: whether each one was right."""
    n, right = len(guesses), sum(guesses)
    longest = max((len(list(run)) for good, run in itertools.groupby(guesses) if good), default=0)
    p = max(1 / k, bound(right / n, n) if right else 1 - 0.01 ** (1 / n))
    r = longest + 1

    def log_no_run(p):
        x = 1.0
        for _ in range(200):
            x = 1 + (1 - p) * p**r * x ** (r + 1)
        return math.log(1 - p * x) - math.log((r + 1 - r * x) * (1 - p)) - (n + 1) * math.log(x)

    if p < 1 and log_no_run(p) > math.log(0.99):
        high = 1 - 1e-12
        for _ in range(100):
            middle = (p + high) / 2
            p, high = (middle, high) if log_no_run(middle) > math.log(0.99) else (p, middle)
    return -math.log2(p)


def follow_the_leader(n, first, predictors, s):
    """Each round the guess of the predictor with most right guesses so far (the last to get there) counts."""
    points, winner, guesses = [0] * len(predictors), 0, []
    for i in range(first, n):
        said = [predict(i) for predict in predictors]
        guesses.append(said[winner] == s[i])
        for j, value in enumerate(said):
            if value == s[i]:
                points[j] += 1
                if points[j] >= points[winner]:
                    winner = j
    return guesses


def slow_multi_mcw(s, k):
    def most_common(width):
        def predict(i):
            if i < width:
                return None
            window = s[i - width : i]
            counts = Counter(window)
            most = max(counts.values())
            return next(v for v in reversed(window) if counts[v] == most)

        return predict

    return slow_prediction(follow_the_leader(len(s), 63, [most_common(w) for w in (63, 255, 1023, 4095)], s), k)


def slow_lag(s, k):
    lags = [lambda i, lag=lag: s[i - lag] if i >= lag else None for lag in range(1, 129)]
    return slow_prediction(follow_the_leader(len(s), 1, lags, s), k)


def greatest(counts):
    return max(counts, key=lambda y: (counts[y], y)) if counts else None


def slow_multi_mmc(s, k):
    models = [defaultdict(Counter) for _ in range(17)]

    def predictor(d):
        def predict(i):
            if i - 1 >= d:  # learn what followed the context of the symbol before
                models[d][tuple(s[i - 1 - d : i - 1])][s[i - 1]] += 1
            seen = models[d].get(tuple(s[i - d : i])) if i >= d else None
            return greatest(seen)

        return predict

    predictors = [predictor(d) for d in range(1, 17)]
    return slow_prediction(follow_the_leader(len(s), 2, predictors, s), k)


def slow_lz78y(s, k):
    seen, guesses = defaultdict(Counter), []
    for i in range(17, len(s)):
        for d in range(16, 0, -1):
            seen[tuple(s[i - 1 - d : i - 1])][s[i - 1]] += 1
        said, most = None, 0
        for d in range(16, 0, -1):
            counts = seen.get(tuple(s[i - d : i]))
            if counts and counts[greatest(counts)] > most:
                said, most = greatest(counts), counts[greatest(counts)]
        guesses.append(said == s[i])
    return slow_prediction(guesses, k)


def sources():
    rng = np.random.default_rng(7)
    yield "fair bits", rng.integers(0, 2, 3000), 2
    yield "biased bits", (rng.random(3000) < 0.9).astype(int), 2
    yield "bytes", rng.integers(0, 256, 3000), 256
    yield "few symbols", rng.integers(0, 5, 3000), 5
    yield "sticky symbols", np.repeat(rng.integers(0, 4, 600), 5), 4
    yield "a period", np.tile(rng.integers(0, 7, 50), 12), 7


@pytest.mark.parametrize("name, samples, k", list(sources()), ids=lambda v: v if isinstance(v, str) else "")
def test_estimates_are_those_of_the_slow_twins(name, samples, k):
    s = [int(v) for v in samples]
    found = _C.entropy_estimates(samples.astype(np.uint8), k)
    assert [found["t_tuple"], found["lrs"]] == pytest.approx(slow_tuples(s), abs=1e-9, nan_ok=True)
    assert found["multi_mcw"] == pytest.approx(slow_multi_mcw(s, k), abs=1e-6)
    assert found["lag"] == pytest.approx(slow_lag(s, k), abs=1e-6)
    assert found["multi_mmc"] == pytest.approx(slow_multi_mmc(s, k), abs=1e-6)
    assert found["lz78y"] == pytest.approx(slow_lz78y(s, k), abs=1e-6)


# --- properties and degenerate data ---


@pytest.mark.parametrize("width", [1, 3, 8])
def test_a_fair_source_is_rated_near_its_width_and_a_biased_one_below(width):
    rng = np.random.default_rng(3)
    fair = estimate(rng.integers(0, 1 << width, 100_000).astype(np.uint8), width)
    assert 0.65 * width < fair.min_entropy <= width and not fair.enough
    assert set(fair.symbols) == set(NAMES) - (set() if width == 1 else {"collision", "markov", "compression"})
    assert set(fair.bits) == (set() if width == 1 else set(NAMES))
    p = 0.75
    biased = np.where(rng.random(100_000) < p, 0, rng.integers(0, 1 << width, 100_000)).astype(np.uint8)
    likeliest = p + (1 - p) / (1 << width)
    assert estimate(biased, width).min_entropy < -math.log2(likeliest) + 0.02


@pytest.mark.parametrize("value", [0, 1, 255])
def test_a_constant_source_has_no_entropy(value):
    assert estimate(np.full(5000, value, np.uint8)).min_entropy == 0.0


def test_a_predictable_source_is_caught_by_predictors_only_where_counts_are_even():
    counter = np.arange(100_000).astype(np.uint8)
    found = estimate(counter)
    assert found.symbols["most_common_value"] > 7.5  # every value equally often
    assert found.min_entropy < 0.01 and found.symbols["multi_mmc"] < 0.01


@pytest.mark.parametrize("n", [100, 127, 1000, 5999])
def test_short_recordings_leave_out_what_they_cannot_tell(n):
    found = estimate(np.random.default_rng(n).integers(0, 256, n).astype(np.uint8))
    assert 0 < found.min_entropy <= 8
    assert ("compression" in found.bits) == (8 * n >= 6 * 1002)
    assert "t_tuple" not in found.symbols or n > 1000  # no byte comes 35 times among few


def test_wrong_samples_are_refused():
    for samples in (b"abc" * 100, np.zeros(1000), np.zeros((10, 100), np.uint8)):
        with pytest.raises(TypeError, match="numpy array of uint8"):
            estimate(samples)
    with pytest.raises(ValueError, match="at least 100"):
        estimate(np.zeros(99, np.uint8))
    with pytest.raises(ValueError, match="4 does not fit in bits_per_symbol=2"):
        estimate(np.arange(200, dtype=np.uint8) % 5, 2)
    for width in (0, 9):
        with pytest.raises(ValueError, match="from 1 to 8"):
            estimate(np.zeros(1000, np.uint8), width)
    with pytest.raises(ValueError, match="below k"):
        _C.entropy_estimates(np.full(100, 2, np.uint8), 2)


def test_the_least_of_all_estimates_counts():
    assert Estimates(10, 8, {"lag": 5.0}, {"markov": 0.5}).min_entropy == 4.0
    assert Estimates(10, 8, {"lag": 3.0}, {"markov": 0.5}).min_entropy == 3.0
