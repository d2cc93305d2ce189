"""A seeded noise source for emulated devices, which a test may spoil at any moment."""

import numpy as np


class NoiseSource:
    """Bytes that pass every test until `fault` is set: "stuck" (all 0x00) or "biased" (each bit 1 once in eight)."""

    def __init__(self, seed: int):
        self._rng = np.random.Generator(np.random.Philox(seed))
        self.fault = ""

    def make(self, n: int) -> bytes:
        """The next n bytes."""
        if self.fault == "stuck":
            return bytes(n)
        made = np.frombuffer(self._rng.bytes(n), dtype=np.uint8)
        if self.fault == "biased":
            for _ in range(2):
                made = made & np.frombuffer(self._rng.bytes(n), dtype=np.uint8)
        return made.tobytes()
