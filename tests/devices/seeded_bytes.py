"""What the emulated devices give: splitmix64 of a counter, the same in Python here and in C in seeded_bytes.h."""

import numpy as np

_PAGE_WORDS = 1 << 16


def seeded_bytes(seed: int, offset: int, n: int) -> bytes:
    """Bytes [offset, offset + n) of the stream of `seed`: word k, little endian, is splitmix64's k-th output."""
    first, last = offset // 8, -(-(offset + n) // 8)
    with np.errstate(over="ignore"):
        z = np.arange(first + 1, last + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        words = z ^ (z >> np.uint64(31))
    return words.astype("<u8").tobytes()[offset % 8 : offset % 8 + n]


class Seeded:
    """A generator for an emulated device: the stream of a seed from its start, and what may become of it.

    stuck_at: from that byte on all bytes are 0x55. biased_from: from that byte on each bit is 1 with probability 1/8.
    """

    def __init__(self, seed: int, stuck_at: int | None = None, biased_from: int | None = None):
        self.seed, self.stuck_at, self.biased_from = seed, stuck_at, biased_from
        self.offset = 0
        self._page_at, self._page = 0, memoryview(b"")

    def __call__(self, n: int) -> memoryview | bytes:
        """The next n bytes."""
        at = self.offset - self._page_at
        self.offset += n
        if at + n <= len(self._page):
            return self._page[at : at + n]
        rest, missing = bytes(self._page[at:]), n - (len(self._page) - at)
        self._page_at += len(self._page)
        self._page = memoryview(self._made(self._page_at, max(missing, 8 * _PAGE_WORDS)))
        return rest + bytes(self._page[:missing])

    def _made(self, offset: int, n: int) -> bytes:
        made = np.frombuffer(seeded_bytes(self.seed, offset, n), dtype=np.uint8).copy()
        if self.biased_from is not None and self.biased_from < offset + n:
            first = max(self.biased_from - offset, 0)
            for other in (self.seed + 1, self.seed + 2):
                made[first:] &= np.frombuffer(seeded_bytes(other * 7919, offset + first, n - first), dtype=np.uint8)
        if self.stuck_at is not None and self.stuck_at < offset + n:
            made[max(self.stuck_at - offset, 0) :] = 0x55
        return made.tobytes()
