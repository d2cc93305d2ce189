"""Cutoffs of the four continuous health tests, computed exactly, and a committed table of them that checks itself.

Tests (NIST SP 800-90B 4.4, on the raw bits and on the raw bytes, always all four; see csrc/health.h):

- repetition count: a value occurs C times running, C = 1 + ceil(a / H);
- adaptive proportion: the first sample of a window of W occurs C times in it. The first sample is given, so only W - 1
  are random: C = 2 + critbinom(W - 1, 2^-H, 1 - 2^-a). (The printed formula has W instead of W - 1; jitterentropy and
  the kernel use the corrected one, as here.)

There is one alpha, 2^-60, at every rate. At 125 MB/s a source that is exactly as good as its claim then raises a false
alarm of a bit test once in 36 years, while 2^-40 would raise one every 18 minutes; and the power lost is nil, because a
broken source fails by far more (H = 4: byte repetition 11 -> 16, byte proportion 79 -> 92).

`python -m everett_cuda.health --check` recomputes the table and exits with 1 when a value differs.
"""

import math
import sys
from dataclasses import astuple, dataclass
from fractions import Fraction
from functools import lru_cache
from numbers import Rational

UNIT_BYTES = 512  # one byte window, four bit windows, one block of the duplicate test
BIT_WINDOW = 1024
BYTE_WINDOW = 512
ALPHA_BITS = 60
# Fewer bits than this in a unit, and two units could be equal by chance (2^-256 per pair is out of reach).
MIN_UNIT_ENTROPY = 256

_P_BITS = 256  # fractional bits of the probability 2^-H
_TERM_BITS = 6144  # fractional bits of a binomial term; the smallest first term is 2^-(511*8)


@dataclass(frozen=True)
class Cutoffs:
    """Counts at which each test alarms: a count that reaches its cutoff is an alarm."""

    rct_bytes: int
    apt_bytes: int
    rct_bits: int
    apt_bits: int


# H (bits of min-entropy a byte) -> cutoffs at alpha = 2^-60; bit tests take H/8.
TABLE = {
    8: Cutoffs(9, 26, 61, 653),
    7: Cutoffs(10, 33, 70, 697),
    6: Cutoffs(11, 45, 81, 745),
    5: Cutoffs(13, 63, 97, 795),
    4: Cutoffs(16, 92, 121, 847),
    3: Cutoffs(21, 140, 161, 901),
    2: Cutoffs(31, 221, 241, 955),
    1: Cutoffs(61, 355, 481, 1005),
}


def exact(h: float | str | Rational) -> Fraction:
    """A min-entropy as the fraction its decimal digits say: 6.4 is 32/5, not the nearest double."""
    return Fraction(h) if isinstance(h, (Rational, str)) else Fraction(repr(float(h)))


def _two_to_minus(h: Fraction) -> tuple[int, int]:
    """Bounds (low, high) of 2^-h, as integers scaled by 2^256. Square roots give 2^-(1/2), 2^-(1/4), ..."""
    steps = 160
    low = high = 1 << _P_BITS  # 2^-floor(h) comes last, as a shift
    root_low = root_high = 1 << (_P_BITS - 1)  # 2^-1
    whole = math.floor(h)
    fraction = h - whole
    for _ in range(steps):
        if fraction == 0:
            break
        root_low = math.isqrt(root_low << _P_BITS)
        root_high = math.isqrt((root_high << _P_BITS) - 1) + 1
        fraction *= 2
        if fraction >= 1:
            fraction -= 1
            low = (low * root_low) >> _P_BITS
            high = ((high * root_high) >> _P_BITS) + 1
    if fraction:  # what is left multiplies by something between 2^-(2^-steps) and 1
        low = (low * root_low) >> _P_BITS
    return low >> whole, -(-high >> whole)


def _smallest_count(n: int, h: Fraction, alpha_bits: int) -> int:
    """The smallest j with P(Binomial(n, 2^-h) >= j) <= 2^-alpha_bits, by interval arithmetic on integers."""
    p_low, p_high = _two_to_minus(h)
    one = 1 << _P_BITS
    alpha = 1 << (_TERM_BITS - alpha_bits)

    def first_term(p, round_up):
        term = 1 << _TERM_BITS
        for _ in range(n):
            term = -(-term * p >> _P_BITS) if round_up else term * p >> _P_BITS
        return term

    term_low, term_high = first_term(p_low, False), first_term(p_high, True)
    tail_low = tail_high = 0
    for k in range(n, -1, -1):  # the terms P(X = n), P(X = n-1), ... are added until the tail exceeds alpha
        tail_low += term_low
        tail_high += term_high
        if tail_low > alpha:
            return k + 1
        if tail_high > alpha:
            raise ArithmeticError(f"precision does not decide the cutoff for n={n}, H={h}")
        if k:
            term_low = term_low * k * (one - p_high) // ((n - k + 1) * p_high)
            term_high = -(-term_high * k * (one - p_low) // ((n - k + 1) * p_low))
    raise ArithmeticError(f"the tail of Binomial({n}, 2^-{h}) never exceeds 2^-{alpha_bits}")


def repetition_cutoff(h: float | str | Rational, alpha_bits: int = ALPHA_BITS) -> int:
    """Repetition count cutoff (SP 800-90B 4.4.1) for h bits of min-entropy a sample."""
    return 1 + math.ceil(alpha_bits / exact(h))


@lru_cache(maxsize=256)
def proportion_cutoff(h: float | str | Rational, window: int, alpha_bits: int = ALPHA_BITS) -> int:
    """Adaptive proportion cutoff (SP 800-90B 4.4.2, corrected) for h bits of min-entropy a sample and a window."""
    return 1 + _smallest_count(window - 1, exact(h), alpha_bits)


def cutoffs(h: float | str | Rational) -> Cutoffs:
    """All four cutoffs for a claim of h bits of min-entropy a raw byte, at alpha = 2^-60.

    Raises ValueError for a claim outside (0, 8], one whose unit holds under 256 bits (two 512-byte units could be equal by chance), and one
    for which a test could never fire.
    """
    claim = exact(h)
    if not 0 < claim <= 8:
        raise ValueError(f"claimed min-entropy {h} bits a byte is outside (0, 8]; give the source's own claim as h=")
    if claim * UNIT_BYTES < MIN_UNIT_ENTROPY:
        raise ValueError(
            f"claimed entropy too low to be tested: {float(claim):g} bits a byte are {float(claim * UNIT_BYTES):g} in a unit of "
            f"{UNIT_BYTES} bytes, and the duplicate test needs {MIN_UNIT_ENTROPY}; claim at least h=0.52"
        )
    found = Cutoffs(
        rct_bytes=repetition_cutoff(claim),
        apt_bytes=proportion_cutoff(claim, BYTE_WINDOW),
        rct_bits=repetition_cutoff(claim / 8),
        apt_bits=proportion_cutoff(claim / 8, BIT_WINDOW),
    )
    for name, cutoff, window in (("byte", found.apt_bytes, BYTE_WINDOW), ("bit", found.apt_bits, BIT_WINDOW)):
        if cutoff >= window:
            raise ValueError(
                f"claimed entropy too low to be tested: at h={float(claim):g} the {name} proportion cutoff {cutoff} is not below "
                f"its window of {window} samples; claim at least h=0.52"
            )
    return found


def raw_bytes_per_block(h: float | str | Rational) -> int:
    """Raw bytes that one conditioned block of 32 bytes takes: ceil((256 + 64) / h), as SP 800-90C asks for full entropy."""
    return math.ceil(320 / exact(h))


def check_table() -> list[str]:
    """Recomputes the committed table; returns one line for each value that differs."""
    return [
        f"H={h}: committed {astuple(committed)}, computed {astuple(cutoffs(h))}"
        for h, committed in TABLE.items()
        if cutoffs(h) != committed
    ]


def _main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print("usage: python -m everett_cuda.health [--check]", file=sys.stderr)
        return 2
    if arguments:
        wrong = check_table()
        print("\n".join(wrong) or f"all {4 * len(TABLE)} cutoffs at alpha = 2^-{ALPHA_BITS} recomputed: equal")
        return 1 if wrong else 0
    print("H    bytes: repetition proportion   bits: repetition proportion   raw bytes a block")
    for h in TABLE:
        c = cutoffs(h)
        print(f"{h:<4} {c.rct_bytes:17} {c.apt_bytes:10} {c.rct_bits:18} {c.apt_bits:10} {raw_bytes_per_block(h):19}")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
