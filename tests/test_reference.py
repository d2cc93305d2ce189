"""The numpy reference: published vectors, what its parts promise, accuracy and limits of conversions, statistics."""

import json
from fractions import Fraction
from pathlib import Path

import mpmath as mp
import numpy as np
import pytest
from vectors import make_law_v1

from everett_cuda.reference import chacha, convert, fill, fit, gelu, ieee, keepdrop, layout, philox, stream

VECTORS = Path(__file__).parent / "vectors"
PUBLISHED = json.loads((VECTORS / "published.json").read_text())
RECORD = stream.derive(bytes(range(32)), bytes(range(16)))
LONG = np.longdouble
ALPHA_SIGMAS = 4.9  # two-sided alpha of 1e-6 for a statistic that is normal under the law


def _words(text):
    return np.frombuffer(bytes.fromhex(text), "<u4")


def _chacha_keystream(row, length, rounds, key):
    first = _words(row)
    last = np.tile(first, (-(-length // 64), 1))
    last[:, 0] += np.arange(len(last), dtype=np.uint32)
    return chacha.blocks(_words(key), last, rounds).astype("<u4").tobytes()[:length]


# ---- published vectors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v", PUBLISHED["chacha"], ids=lambda v: f"{v['source']} ({v['rounds']})")
def test_chacha_matches_published_vectors(v):
    if "keystream" in v:
        expected = bytes.fromhex(v["keystream"])
    else:
        expected = bytes(a ^ b for a, b in zip(v["plaintext"].encode(), bytes.fromhex(v["ciphertext"]), strict=True))
    assert len(expected) >= 64
    assert _chacha_keystream(v["row"], len(expected), v["rounds"], v["key"]) == expected


@pytest.mark.parametrize("v", PUBLISHED["hchacha20"], ids=lambda v: v["source"])
def test_hchacha20_matches_published_vectors(v):
    out = chacha.hchacha20(_words(v["key"]), _words(v["nonce"]))
    assert out.astype("<u4").tobytes().hex() == v["subkey"]


def test_philox_matches_published_vectors():
    rows = PUBLISHED["philox4x32_10"]
    assert len(rows) == 3
    for v in rows:
        counter, key, words = ([int(w, 16) for w in v[k].split()] for k in ("counter", "key", "words"))
        assert philox.philox4x32_10([counter], key)[0].tolist() == words


def test_chacha20_matches_cryptography():
    algorithms = pytest.importorskip("cryptography.hazmat.primitives.ciphers.algorithms", reason="needs cryptography")
    from cryptography.hazmat.primitives.ciphers import Cipher

    # The law's layout: the 64-bit block number crosses 2^32, tag and s fill the nonce.
    numbers = np.arange(2**32 - 3, 2**32 + 3, dtype=np.uint64)
    ours = stream.blocks(RECORD, numbers, 3, 0x01020304, "chacha20")
    for number, block in zip(numbers, ours, strict=True):
        row = int(number).to_bytes(8, "little") + (3).to_bytes(4, "little") + (0x01020304).to_bytes(4, "little")
        cipher = Cipher(algorithms.ChaCha20(RECORD[:8].astype("<u4").tobytes(), row), None).encryptor()
        assert cipher.update(bytes(64)) == block.astype("<u4").tobytes()


@pytest.mark.parametrize("rounds", [8, 12, 20])
def test_reduced_rounds_match_randomgen(rounds):
    randomgen = pytest.importorskip("randomgen", reason="needs randomgen (extra `bench`)")
    key = RECORD[:8].astype("<u4").tobytes()
    rival = randomgen.ChaCha(key=int.from_bytes(key, "little"), counter=0, rounds=rounds)
    ours = stream.blocks(RECORD, np.arange(64), 0, 0, f"chacha{rounds}").reshape(-1)
    raw = rival.random_raw(512)
    assert (raw & np.uint64(0xFFFFFFFF)).tolist() == ours[0::2].tolist()
    assert (raw >> np.uint64(32)).tolist() == ours[1::2].tolist()


def test_law_vectors_are_reproduced():
    assert make_law_v1.build() == make_law_v1.PATH.read_text(), "the law is frozen: a change is law 2, not new vectors"


# ---- streams and draws -----------------------------------------------------------------------------------------------


def test_record_layout():
    key, nonce = bytes(range(32)), bytes(range(16))
    assert RECORD[:8].tolist() == chacha.hchacha20(_words(key.hex()), _words(nonce.hex())).tolist()
    assert RECORD[8] == stream.blocks(RECORD, [2**64 - 1], 0, 0, "chacha20")[0, 0]
    assert RECORD[9:].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="32 bytes"):
        stream.derive(key[:31], nonce)


@pytest.mark.parametrize("generator", stream.GENERATORS)
@pytest.mark.parametrize("width", [16, 32, 64])
def test_draws_are_the_keystream(generator, width):
    # Draw e is bits [e*w, (e+1)*w) of the blocks put one after the other.
    first = 2**33 - 2
    text = stream.blocks(RECORD, np.arange(first, first + 4, dtype=np.uint64), 5, 9, generator).astype("<u4").tobytes()
    size, e0 = width // 8, first * 512 // width
    whole = [int.from_bytes(text[i : i + size], "little") for i in range(0, len(text), size)]
    e = np.arange(e0, e0 + len(whole), dtype=np.uint64)
    assert stream.draws(RECORD, width, e, 5, 9, generator).tolist() == whole
    order = np.random.default_rng(0).permutation(len(e)).reshape(8, -1)
    assert stream.draws(RECORD, width, e[order], 5, 9, generator).tolist() == np.array(whole, np.uint64)[order].tolist()


def test_philox_calls_are_counted_over_64_bits():
    call = 2**34 - 2
    block = stream.blocks(RECORD, [call // 4], 6, 11, "philox")[0]
    w = [int(x) for x in RECORD]
    expected = philox.philox4x32_10([[call % 2**32, call >> 32, w[2] ^ 6, w[3] ^ 11]], w[:2])[0]
    assert block[8:12].tolist() == expected.tolist()


@pytest.mark.parametrize("generator", stream.GENERATORS)
def test_tag_and_s_and_subkey_separate_streams(generator):
    other = stream.derive(bytes(range(1, 33)), bytes(range(16)))
    e = np.arange(64)
    rows = [stream.draws(*args, generator).tobytes() for args in
            ((RECORD, 64, e, 1, 0), (RECORD, 64, e, 2, 0), (RECORD, 64, e, 1, 1), (other, 64, e, 1, 0))]  # fmt: skip
    assert len(set(rows)) == 4


def test_rejects_unknown_generator_width_and_rounds():
    with pytest.raises(ValueError, match="chacha8, chacha12"):
        stream.blocks(RECORD, [0], 1, 0, "chacha10")
    with pytest.raises(ValueError, match="16, 32 or 64"):
        stream.draws(RECORD, 8, [0], 1)
    with pytest.raises(ValueError, match="8, 12 or 20"):
        chacha.permute(np.zeros((16, 1)), 10)


# ---- keep and drop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [-1e-9, 1.0000001, float("nan"), float("inf")])
def test_rejects_p_outside_unit_interval(p):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        keepdrop.threshold(p)


@pytest.mark.parametrize("p", sorted(make_law_v1.P_VALUES.values()))
def test_drop_probability_is_exact_over_the_dither(p):
    # Over a uniform draw and a uniform x: (T * 2^32 + F) / (values of h * 2^32) = P / 2^47, with nothing rounded.
    h = keepdrop.threshold(p)
    values = 2**32 if h.wide else 2**15
    assert Fraction(h.t * 2**32 + h.f, values * 2**32) == Fraction(h.p47, 2**47)
    assert abs(Fraction(h.p47, 2**47) - Fraction(p)) <= Fraction(1, 2**48)
    assert h.wide == (not 1 / 256 <= p <= 31 / 32)


def test_threshold_is_compared_without_wrapping():
    # P = 2^47 - 1: T = 2^32 - 1 and F = 2^32 - 2^17; where x < F the threshold is 2^32 and every draw is dropped.
    record = RECORD.copy()
    record[8] = 0
    assert not keepdrop.keep_mask(record, 1 - 2**-47, np.arange(32)).any()
    assert keepdrop.dither(record, [0, 31, 32, 2**37 - 1, 2**37, 2**37 + 32]).tolist() == [
        0, 0, 0x9E3779B9, 2**32 - 0x9E3779B9, 0, 0x9E3779B9]  # fmt: skip


@pytest.mark.parametrize("p", [0.004, 0.1, 0.5, 0.9])
def test_drop_rate(p):
    n = 2**20
    dropped = n - keepdrop.keep_mask(RECORD, p, np.arange(n)).sum()
    assert abs(dropped - n * p) < ALPHA_SIGMAS * (n * p * (1 - p)) ** 0.5
    # Negative control: the same bound refuses a p that is 20 % larger.
    assert abs(dropped - n * p * 1.2) > ALPHA_SIGMAS * (n * p * (1 - p)) ** 0.5


def test_a_larger_p_drops_a_superset():
    e = np.arange(4096)
    a, b = (keepdrop.keep_mask(RECORD, p, e) for p in (0.1, 0.12))
    assert np.all(a >= b) and a.sum() > b.sum()


def test_dropout_edges():
    x = np.array([np.nan, np.inf, -np.inf, -0.0, 1.0], np.float32)
    e = np.arange(5)
    assert keepdrop.dropout(x, RECORD, 0.0, e).tobytes() == x.tobytes()
    ones = keepdrop.dropout(x, RECORD, 1.0, e)
    assert ones.tobytes() == np.zeros(5, np.float32).tobytes()
    many = np.tile(x, 100)
    y = keepdrop.dropout(many, RECORD, 0.5, np.arange(500))
    keep = keepdrop.keep_mask(RECORD, 0.5, np.arange(500))
    assert y[~keep].tobytes() == np.zeros((~keep).sum(), np.float32).tobytes()
    assert np.array_equal(y[keep], many[keep] * 2, equal_nan=True)


def test_dropout_rounds_to_nearest_even():
    # c of p = 1/3 is 1.5: products of odd 16-bit significands are ties.
    x, e = np.arange(0x3F80, 0x3FC0, dtype=np.uint16), np.arange(64)
    y = keepdrop.dropout(x, RECORD, 1 / 3, e, "bfloat16")
    keep = keepdrop.keep_mask(RECORD, 1 / 3, e)
    assert 0 < keep.sum() < 64 and not y[~keep].any()
    ties = 0
    for before, after in zip(x[keep], y[keep], strict=True):
        exact = Fraction(float(ieee.from_bf16(before))) * Fraction(3, 2)
        below, value, above = (Fraction(float(v)) for v in ieee.from_bf16(np.array([after - 1, after, after + 1])))
        half = (above - value) / 2 if exact > value else (value - below) / 2
        assert abs(value - exact) < half or (abs(value - exact) == half and after % 2 == 0)
        ties += abs(value - exact) == half
    assert ties > 5


# ---- logical indices -------------------------------------------------------------------------------------------------


def test_shard_indices_are_those_of_the_whole():
    whole = layout.logical_indices((6, 10, 14))
    assert whole.ravel().tolist() == list(range(840))
    assert np.array_equal(layout.shard_indices((6, 10, 14), (1, 2, 3), (4, 5, 6)), whole[1:5, 2:7, 3:9])
    assert layout.row_indices(3, 33)[:, 0].tolist() == [0, 64, 128] and layout.row_indices(2, 64)[1, 5] == 69
    assert layout.logical_indices((2, 3), 2**40, (5, 0)).tolist() == [[2**40] * 3, [2**40 + 5] * 3]


# ---- exact arithmetic ------------------------------------------------------------------------------------------------


def _round_to_float(x, dtype):
    """Nearest float of a Fraction, by exact comparison with the neighbours of a first guess."""
    guess = dtype(float(x))
    around = [np.nextafter(guess, dtype(-np.inf)), guess, np.nextafter(guess, dtype(np.inf))]
    bits = {np.float32: np.uint32, np.float64: np.uint64}[dtype]
    return min(around, key=lambda v: (abs(Fraction(float(v)) - x), int(np.array(v).view(bits)) & 1))


@pytest.mark.parametrize("dtype,fma", [(np.float32, ieee.fma32), (np.float64, ieee.fma64)])
def test_fma_rounds_once(dtype, fma):
    rng = np.random.default_rng(5)
    n = 3000
    a, b, c = (rng.standard_normal(n).astype(dtype) for _ in range(3))
    c[: n // 2] = -(a * b)[: n // 2]  # cancellation
    steps = rng.integers(-2, 3, n // 4)
    c[: n // 4] = (c[: n // 4] * (1 + steps * np.finfo(dtype).eps)).astype(dtype)
    c[n // 2 : 3 * n // 4] *= dtype(np.finfo(dtype).eps)  # c near half an ulp of the product
    short = slice(3 * n // 4, n)  # short factors: ties in the sum
    a[short], b[short] = rng.integers(1, 64, n // 4), rng.integers(1, 64, n // 4)
    c[short] = 2 ** (np.finfo(dtype).nmant + 2)
    got = fma(a, b, c)
    expected = [_round_to_float(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), dtype)
                for x, y, z in zip(a, b, c, strict=True)]  # fmt: skip
    assert np.array_equal(got, np.array(expected, dtype))
    assert np.count_nonzero(got != (a * b + c)) > 100  # the test sees the difference that one rounding makes


def test_bf16_rounds_to_nearest_even():
    bits = np.concatenate([np.arange(0x3F7F0000, 0x3F820000, 0x11, dtype=np.uint32),
                           np.array([0x7F7F7FFF, 0x7F7F8000, 0x7F800000, 0xFF800000, 0x00007FFF, 0x00008000, 0x00018000,
                                     0x80008001], np.uint32)])  # fmt: skip
    got = ieee.bf16_of(bits.view(np.float32))
    low, high = bits >> 16, bits & 0xFFFF
    up = (high > 0x8000) | ((high == 0x8000) & (low & 1 == 1))
    assert np.array_equal(got, np.where((bits & 0x7FFFFFFF) == 0x7F800000, low, low + up))
    assert np.isnan(ieee.from_bf16(ieee.bf16_of(np.array([np.nan, -np.nan], np.float32)))).all()
    assert np.isnan(ieee.from_bf16(ieee.bf16_of(np.array([0x7F800001], np.uint32).view(np.float32)))).all()


# ---- conversions: coefficients, limits, accuracy ---------------------------------------------------------------------


def test_coefficients_are_the_fitted_ones():
    assert fit.table() == convert.COEFFICIENTS | gelu.COEFFICIENTS


def _sides(bits, n=100_000):
    """Draws of `bits` bits: random, next to 0, next to 1/2, next to 1, next to the ends of each binade."""
    rng = np.random.default_rng(11)
    top = 2**bits
    parts = [rng.integers(0, top, n, dtype=np.uint64)]
    near = rng.integers(0, 20_000, 20_000, dtype=np.uint64)
    parts += [near, np.uint64(top - 1) - near, np.uint64(top // 2) + near, np.uint64(top // 2 - 1) - near]
    for third in (top // 3, 2 * top // 3):
        parts += [np.uint64(third) + near, np.uint64(third) - near]
    powers = np.uint64(1) << np.arange(bits, dtype=np.uint64)
    for d in (-1, 0, 1):
        parts += [powers + np.uint64(d % 2**64), np.uint64(top - 1) - powers + np.uint64(d % 2**64)]
    mask = np.uint64(top - 1)
    return np.concatenate(parts) & mask


def _minus_ln_u(c, bits):
    """-ln((c + 1/2) * 2^-bits) in 80-bit arithmetic, from whichever side loses nothing."""
    upper = c >= np.uint64(2 ** (bits - 1))
    near = np.where(upper, np.uint64(2**bits - 1) - c, c)
    t = (near.astype(LONG) + LONG(0.5)) * LONG(2) ** -bits
    return np.where(upper, -np.log1p(-t), -np.log(t))


def _ulps(values, exact):
    spacing = np.spacing(np.abs(exact).astype(values.dtype)).astype(LONG)
    return float(np.max(np.abs(values.astype(LONG) - exact) / spacing))


@pytest.fixture(autouse=True)
def _needs_long_double(request):
    if "accuracy" in request.node.name and np.finfo(LONG).nmant < 63:
        pytest.skip("numpy's longdouble has no more than 53 bits on this machine")


def test_accuracy_of_fp32_normals():
    a = _sides(32)
    b = np.random.default_rng(12).integers(0, 2**32, len(a), dtype=np.uint64)
    x = _minus_ln_u((a << np.uint64(8)) | (b & np.uint64(255)), 40)
    even, odd = convert.normal(a, b)
    turns = (b >> np.uint64(8)).astype(np.int64)
    quadrant = (turns + 2**21) >> 22
    angle = (turns - (quadrant << 22)).astype(LONG) * LONG(2) ** -22 * (LONG("3.14159265358979323846264338") / 2)
    cosine, sine = convert._rotate(np.cos(angle), np.sin(angle), quadrant)
    r = np.sqrt(2 * x)
    worst = max(_ulps(even, r * cosine), _ulps(odd, r * sine))
    assert 2.0 < worst < 3.6  # measured 3.4; below 2 would mean that the comparison sees nothing


def test_accuracy_of_fp32_exponentials_and_gumbels():
    draws = _sides(64)
    exact = _minus_ln_u(draws, 64)
    e = convert.exponential(draws)
    assert _ulps(e, exact) < 1.8  # measured 1.7, of which the logarithm itself 1.0
    g = convert.gumbel(draws)
    assert _ulps(g, -np.log(e.astype(LONG))) < 1.1
    assert float(np.max(np.abs(g.astype(LONG) + np.log(exact)))) < 2.1e-6  # absolute, at |g| up to 45


def test_accuracy_of_fp64_conversions():
    draws = _sides(64, 600)[::157]
    draws = np.concatenate([draws, np.array([0, 1, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)])
    turns = np.random.default_rng(13).integers(0, 2**64, len(draws), dtype=np.uint64)
    turns[:8] = np.arange(8, dtype=np.uint64) << np.uint64(61)  # multiples of an eighth
    e, g = convert.exponential(draws, "float64"), convert.gumbel(draws, "float64")
    even, odd = convert.normal(draws, turns, "float64")
    worst = {"exponential": 0.0, "gumbel": 0.0, "normal": 0.0}
    with mp.workdps(50):
        for i, (w, b) in enumerate(zip(draws.tolist(), turns.tolist(), strict=True)):
            u = mp.ldexp(w + mp.mpf(1) / 2, -64)
            exact = -mp.log(u)
            r, angle = mp.sqrt(2 * exact), 2 * mp.pi * mp.ldexp(b >> 11, -53)
            for name, value, true in (("exponential", e[i], exact), ("gumbel", g[i], -mp.log(mp.mpf(float(e[i])))),
                                      ("normal", even[i], r * mp.cospi(angle / mp.pi)),
                                      ("normal", odd[i], r * mp.sinpi(angle / mp.pi))):  # fmt: skip
                error = float(abs(mp.mpf(float(value)) - true) / float(np.spacing(abs(float(true)))))
                if abs(true) > mp.mpf(10) ** -40:
                    worst[name] = max(worst[name], error)
                else:
                    assert value == 0  # multiples of a quarter turn are exact
    assert 0.5 < worst["exponential"] < 1.6 and worst["gumbel"] < 0.9 and 0.9 < worst["normal"] < 3.1, worst


def test_quarter_turns_are_exact():
    quarters = np.arange(4, dtype=np.uint64) << np.uint64(30)
    a = np.full(4, 12345, np.uint64)
    even, odd = convert.normal(a, quarters)
    r = even[0]
    assert even.tolist() == [r, 0, -r, 0] and odd.tolist() == [0, r, 0, -r]
    even, odd = convert.normal(a, quarters << np.uint64(32), "float64")
    r = even[0]
    assert even.tolist() == [r, 0, -r, 0] and odd.tolist() == [0, r, 0, -r]


def test_limits():
    zero, top = np.uint64(0), np.uint64(2**64 - 1)
    ends, ends32 = np.array([zero, top]), np.array([0, 2**32 - 1], np.uint64)
    for dtype in ("float32", "float64"):
        e = convert.exponential(ends, dtype)
        assert e[1] == 2.0**-65 and abs(e[0] - 65 * np.log(2)) < 4e-6
        assert e.max() < 45.06
        g = convert.gumbel(ends, dtype)
        assert abs(g[1] - 65 * np.log(2)) < 4e-6 and abs(g[0] + np.log(65 * np.log(2))) < 1e-6
    # The largest radius: U = 2^-41, and the smallest: 1 - U = 2^-41.
    largest, smallest = convert.normal(ends32, np.array([0, 255], np.uint64))[0]
    assert abs(largest - np.sqrt(82 * np.log(2))) < 1e-6 and largest < 7.54
    assert abs(smallest / np.sqrt(2.0**-40) - 1) < 1e-6
    largest, smallest = convert.normal(ends, np.zeros(2, np.uint64), "float64")[0]
    assert 9.492 < largest < 9.493 and abs(smallest / 2.0**-32 - 1) < 1e-9
    # fp16 cannot hold 2^-65, but 0 stays impossible.
    assert convert.exponential(ends, "float16").tolist() == [np.float16(45.05), 2.0**-24]
    assert convert.exponential(np.array([top]), "bfloat16")[0] > 0
    for dtype, bits in convert.UNIFORM_BITS.items():
        draws = ends if dtype == "float64" else ends32
        low, high = (np.asarray(convert.uniform(draws, dtype, above)) for above in (False, True))
        if dtype == "bfloat16":
            low, high = ieee.from_bf16(low), ieee.from_bf16(high)
        assert low.tolist() == [0, 1 - 2.0**-bits] and high.tolist() == [2.0**-bits, 1]


def test_bernoulli_threshold():
    draws = np.array([0, 1, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)
    assert not convert.bernoulli(draws, 0.0).any() and convert.bernoulli(draws, 1.0).all()
    assert convert.bernoulli(draws, 0.5).tolist() == [True, True, True, False, False]
    assert convert.bernoulli(draws, 2.0**-64).tolist() == [True, False, False, False, False]
    assert convert.bernoulli(draws, 1 - 2.0**-53).tolist() == [True, True, True, True, False]


# ---- statistics, fixed key, alpha 1e-6 a statement -------------------------------------------------------------------


@pytest.mark.parametrize("generator", stream.GENERATORS)
def test_moments(generator):
    n = 2**18
    z = fill.normal(RECORD, np.arange(n), "float64", generator)
    for k, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**k).mean() - mean) < ALPHA_SIGMAS * (variance / n) ** 0.5, k
    assert abs((z[0::2] * z[1::2]).mean()) < ALPHA_SIGMAS * (2 / n) ** 0.5
    e = fill.exponential(RECORD, np.arange(n), "float64", generator)
    assert abs(e.mean() - 1) < ALPHA_SIGMAS / n**0.5
    u = fill.uniform(RECORD, np.arange(n), "float64", generator)
    assert abs(u.mean() - 0.5) < ALPHA_SIGMAS * (1 / 12 / n) ** 0.5
    # Negative control: the same bound must refuse normals that are 2 % too wide.
    assert abs(((1.02 * z) ** 2).mean() - 1) > ALPHA_SIGMAS * (2 / n) ** 0.5


def test_normals_pair_by_logical_index():
    e = np.array([7, 6, 101, 2**33 + 1], np.uint64)
    whole = fill.normal(RECORD, np.arange(128))
    assert fill.normal(RECORD, e)[:3].tolist() == whole[[7, 6, 101]].tolist()
    a, b = stream.draws(RECORD, 32, [2**33, 2**33 + 1], stream.NORMAL)
    assert fill.normal(RECORD, e)[3] == convert.normal(a, b)[1]
