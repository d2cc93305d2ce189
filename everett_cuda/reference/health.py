"""The health tests one sample at a time, as SP 800-90B 4.4 writes them: the slow truth beside csrc/health.cpp."""

import numpy as np

ORDER = (
    "repetition count (bits)",
    "repetition count (bytes)",
    "adaptive proportion (bits)",
    "adaptive proportion (bytes)",
    "duplicate unit",
)
UNIT = 512
HISTORY_UNITS = 1 << 16


def bits_of(raw: bytes, bit_order: str = "msb_first") -> np.ndarray:
    """The bits of raw bytes in the order in which the device made them; shape (8*len(raw),), dtype uint8."""
    order = "big" if bit_order == "msb_first" else "little"
    return np.unpackbits(np.frombuffer(raw, dtype=np.uint8), bitorder=order)


def repetition(samples: np.ndarray, cutoff: int) -> tuple[int, int] | None:
    """(index of the sample with which a run reaches the cutoff, the run) of the first such run, or None."""
    run, last = 0, None
    for i, sample in enumerate(samples.tolist()):
        run = run + 1 if sample == last else 1
        last = sample
        if run == cutoff:
            return i, run
    return None


def proportion(samples: np.ndarray, window: int, cutoff: int) -> tuple[int, int] | None:
    """(index of the sample with which the count reaches the cutoff, count of the whole window), or None."""
    for start in range(0, len(samples), window):
        like_first = samples[start : start + window] == samples[start]
        if like_first.sum() >= cutoff:
            return start + int(np.flatnonzero(like_first)[cutoff - 1]), int(like_first.sum())
    return None


def duplicate(raw: bytes) -> tuple[int, int] | None:
    """(index of the last byte of the first unit that repeats one of the last 2^16, units since then), or None."""
    seen: dict[bytes, int] = {}
    for k in range(len(raw) // UNIT):
        unit = raw[k * UNIT : (k + 1) * UNIT]
        if unit in seen and k - seen[unit] <= HISTORY_UNITS:
            return (k + 1) * UNIT - 1, k - seen[unit]
        seen[unit] = k
    return None


def alarms(raw: bytes, cutoffs, bit_order: str = "msb_first") -> dict[str, tuple[int, int, int]]:
    """For each test that would alarm if it were alone: (raw byte offset, value, cutoff). raw: whole units."""
    data, bits = np.frombuffer(raw, dtype=np.uint8), bits_of(raw, bit_order)
    found = {
        ORDER[0]: (repetition(bits, cutoffs.rct_bits), cutoffs.rct_bits, 8),
        ORDER[1]: (repetition(data, cutoffs.rct_bytes), cutoffs.rct_bytes, 1),
        ORDER[2]: (proportion(bits, 1024, cutoffs.apt_bits), cutoffs.apt_bits, 8),
        ORDER[3]: (proportion(data, UNIT, cutoffs.apt_bytes), cutoffs.apt_bytes, 1),
        ORDER[4]: (duplicate(raw), HISTORY_UNITS, 1),
    }
    return {name: (hit[0] // samples, hit[1], cutoff) for name, (hit, cutoff, samples) in found.items() if hit}


def first_alarm(raw: bytes, cutoffs, bit_order: str = "msb_first") -> tuple[str, int, int, int] | None:
    """(test, raw byte offset, value, cutoff) of the first alarm by offset, ties in the order of `ORDER`; or None."""
    found = alarms(raw, cutoffs, bit_order)
    if not found:
        return None
    name = min(found, key=lambda n: (found[n][0], ORDER.index(n)))
    return (name, *found[name])
