"""Elements for kernel tests: stored patterns that stress the arithmetic, buffers that notice a stray write, and equality
bit for bit but for NaNs."""

import functools

import numpy as np
from vectors.make_law_v1 import STORAGE as LAW_STORAGE

STORAGE = {**LAW_STORAGE, "float8_e4m3fn": np.uint8, "float8_e5m2": np.uint8}
GUARD = 96  # bytes of poison on either side of an output
POISON = 0xA5
# Values that stress the arithmetic: signed zeros, subnormals, ties, the largest number (times c: Inf), Inf.
SPECIAL = {
    "float32": "00000000 80000000 00000001 807fffff 00800000 7f7fffff ff7fffff 7f800000 ff800000 3f800001",
    "float64": "0000000000000000 8000000000000000 0000000000000001 800fffffffffffff 0010000000000000 7fefffffffffffff "
    "ffefffffffffffff 7ff0000000000000 fff0000000000000 3ff0000000000001",
    "bfloat16": "0000 8000 0001 807f 0080 7f7f ff7f 7f80 ff80 3f81",
    "float16": "0000 8000 0001 83ff 0400 7bff fbff 7c00 fc00 3c01",
    "float8_e4m3fn": "00 80 01 87 08 7e fe 39",
    "float8_e5m2": "00 80 01 83 04 7b fb 7c fc 3d",
}


def bits(values):
    return values.view(f"<u{values.itemsize}")


def from_hex(text, dtype):
    size = np.dtype(STORAGE[dtype]).itemsize
    return np.array([int(t, 16) for t in text.split()], f"<u{size}").view(STORAGE[dtype])


# The exponent's bits, all of which are set in a NaN; in e4m3 the whole magnitude's.
_EXPONENT = {"float32": 0x7F800000, "float64": 0x7FF0000000000000, "bfloat16": 0x7F80, "float16": 0x7C00,
             "float8_e4m3fn": 0x7F, "float8_e5m2": 0x7C}  # fmt: skip


@functools.cache
def values(dtype, n, seed=0):
    """n values without NaN: mostly random bit patterns, every fourth a special one."""
    size = np.dtype(STORAGE[dtype]).itemsize
    patterns = np.random.default_rng(seed).integers(0, 256, n * size, dtype=np.uint8).view(f"<u{size}").copy()
    exponent = _EXPONENT[dtype]
    patterns[patterns & exponent == exponent] ^= np.array(exponent & -exponent, patterns.dtype)
    patterns[seed % 4 :: 4] = np.resize(from_hex(SPECIAL[dtype], dtype).view(patterns.dtype), len(patterns[seed % 4 :: 4]))
    result = patterns.view(STORAGE[dtype])
    result.flags.writeable = False
    return result


class Guarded:
    """A poisoned buffer with room for n items between two guard zones; `shift` items more in front misalign it."""

    def __init__(self, n, dtype, shift=0):
        size = np.dtype(dtype).itemsize
        self.head, self.bytes = GUARD + shift * size, n * size
        self.memory = np.full(self.head + self.bytes + GUARD, POISON, np.uint8)
        self.address = self.memory.ctypes.data + self.head
        self.values = self.memory[self.head : self.head + self.bytes].view(dtype)

    def holds_only(self, expected):
        """Whether exactly `expected` lies inside, bit for bit, and nothing was written around it."""
        return self.memory.tobytes() == (
            bytes([POISON]) * self.head + expected.tobytes() + bytes([POISON]) * (len(self.memory) - self.head - self.bytes)
        )


def is_nan(stored, dtype):
    if dtype == "float8_e4m3fn":
        return stored & 0x7F == 0x7F
    if stored.dtype.kind == "f":
        return np.isnan(stored)
    return stored & ((1 << 8 * stored.itemsize - 1) - 1) > _EXPONENT[dtype]


def same(got, expected, dtype):
    """Bit for bit, but a NaN (Inf - Inf here) is any NaN: its sign and payload differ between instruction sets."""
    nan = is_nan(expected, dtype)
    return np.array_equal(is_nan(got, dtype), nan) and bits(got)[~nan].tobytes() == bits(expected)[~nan].tobytes()
