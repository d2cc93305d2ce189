"""One input for each health alarm, generated: good bytes with one fault that only the named test sees (H = 4)."""

from dataclasses import dataclass

import numpy as np

from everett_cuda.health import cutoffs

H = 4
CUTOFFS = cutoffs(H)  # repetition 16 bytes, 121 bits; proportion 92 bytes of 512, 847 bits of 1,024


@dataclass(frozen=True)
class AlarmInput:
    """raw bytes, the test that must alarm, the raw offset at which it must."""

    test: str
    raw: bytes
    offset: int


def good_bytes(n: int, seed: int = 1) -> np.ndarray:
    """n bytes that pass every test; shape (n,), dtype uint8."""
    return np.frombuffer(np.random.Generator(np.random.Philox(seed)).bytes(n), dtype=np.uint8).copy()


def repetition_bits(at: int = 10_000, n: int = 16384) -> AlarmInput:
    """121 zero bits running: 1 bit, 14 whole bytes (under the 16 of the byte test), 8 bits of which the last is 1."""
    raw = good_bytes(n)
    raw[at - 1] = 0b10101010  # one 0 bit at its end
    raw[at : at + 15] = 0
    raw[at + 15] = 0b11111111
    raw[at + 14] = 0  # 1 + 15 * 8 = 121
    return AlarmInput("repetition count (bits)", raw.tobytes(), at + 14)


def repetition_bytes(at: int = 10_000, n: int = 16384) -> AlarmInput:
    """16 equal bytes whose bits change."""
    raw = good_bytes(n)
    raw[at - 1], raw[at + 16] = 1, 2
    raw[at : at + 16] = 0x5A
    return AlarmInput("repetition count (bytes)", raw.tobytes(), at + 15)


def proportion_bits(unit: int = 19, n: int = 16384) -> AlarmInput:
    """The second bit window of a unit holds 847 zeros in short runs, and no byte value often."""
    raw = good_bytes(n)
    start = unit * 512 + 128
    window = np.zeros(1024, dtype=np.uint8)
    rng = np.random.Generator(np.random.Philox(9))
    window[1 + rng.permutation(1023)[: 1024 - CUTOFFS.apt_bits]] = 1  # the first bit is 0
    raw[start : start + 128] = np.packbits(window)
    last_zero = int(np.flatnonzero(window == 0)[CUTOFFS.apt_bits - 1])
    return AlarmInput("adaptive proportion (bits)", raw.tobytes(), start + last_zero // 8)


def proportion_bytes(unit: int = 19, n: int = 16384) -> AlarmInput:
    """The first byte of a unit, 0x5A, comes 92 times in it, at every fifth place."""
    raw = good_bytes(n)
    start = unit * 512
    window = raw[start : start + 512]
    window[window == 0x5A] = 0x33
    window[: 5 * CUTOFFS.apt_bytes : 5] = 0x5A
    return AlarmInput("adaptive proportion (bytes)", raw.tobytes(), start + 5 * (CUTOFFS.apt_bytes - 1))


def duplicate_unit(unit: int = 19, lag: int = 7, n: int = 16384) -> AlarmInput:
    """A unit equal to the one seven before."""
    raw = good_bytes(n)
    raw[unit * 512 : (unit + 1) * 512] = raw[(unit - lag) * 512 : (unit - lag + 1) * 512]
    return AlarmInput("duplicate unit", raw.tobytes(), unit * 512 + 511)


ALL = (repetition_bits, repetition_bytes, proportion_bits, proportion_bytes, duplicate_unit)
