"""Keys into streams: the subkey record, the keystream of (record, tag, s), and draw e of 16, 32 or 64 bits in it.

The keystream is blocks 0, 1, 2, ... of 16 words, little endian; draw e of w bits is its bits [e*w, (e+1)*w). So a
random decision is a pure function of (record, tag, s, e), and never of who computes it.
"""

import numpy as np

from everett_cuda.reference import chacha
from everett_cuda.reference.philox import philox4x32_10

GENERATORS = ("chacha8", "chacha12", "chacha20", "philox")
# Purpose tags.
DERIVATION, KEEP, UNIFORM, NORMAL, EXPONENTIAL, ATTENTION, BERNOULLI, ROUNDING, INTEGER, GAMMA = range(10)
_LOW = np.uint64(0xFFFFFFFF)


def derive(key, nonce):
    """Subkey record uint32[12] of a 32-byte key and a 16-byte nonce (bytes, read as little-endian words).

    Words 0-7: HChaCha20(key, nonce), as in XChaCha. Word 8: the dither d, word 0 of the ChaCha20 block with number
    2^64-1, tag 0 and s 0 under words 0-7. Words 9-11: zero.
    """
    if len(key) != 32 or len(nonce) != 16:
        raise ValueError(f"a key has 32 bytes and a nonce 16, not {len(key)} and {len(nonce)}")
    subkey = chacha.hchacha20(np.frombuffer(key, "<u4"), np.frombuffer(nonce, "<u4"))
    record = np.zeros(12, np.uint32)
    record[:8] = subkey
    record[8] = chacha.blocks(subkey, [[0xFFFFFFFF, 0xFFFFFFFF, DERIVATION, 0]], 20)[0, 0]
    return record


def blocks(record, numbers, tag, s=0, generator="chacha8"):
    """Keystream blocks uint32 (n, 16) with the given numbers (uint64 array).

    ChaCha: state words 4-11 subkey, 12-13 block number (low word first), 14 tag, 15 s. Philox4x32-10: key = subkey
    words 0-1; call i has the counter (i low, i high, w2^tag, w3^s), w2 and w3 = subkey words 2 and 3; block b is calls
    4b ... 4b+3.
    """
    numbers = np.atleast_1d(np.asarray(numbers, np.uint64))
    if generator == "philox":
        calls = (numbers[:, None] * np.uint64(4) + np.arange(4, dtype=np.uint64)).ravel()
        return philox4x32_10(_last_row(calls, int(record[2]) ^ tag, int(record[3]) ^ s), record[:2]).reshape(-1, 16)
    if generator not in GENERATORS:
        raise ValueError(f"unknown generator {generator!r}; one of {', '.join(GENERATORS)}")
    return chacha.blocks(record[:8], _last_row(numbers, tag, s), int(generator.removeprefix("chacha")))


def _last_row(numbers, word2, word3):
    row = np.empty((len(numbers), 4), np.uint32)
    row[:, 0], row[:, 1] = numbers & _LOW, numbers >> np.uint64(32)
    row[:, 2], row[:, 3] = word2, word3
    return row


def draws(record, width, e, tag, s=0, generator="chacha8"):
    """Draws of `width` bits (16, 32 or 64) at the logical indices e: uint64, in the shape of e.

    16 bits: block e>>5, half-word e&31; 32: block e>>4, word e&15; 64: block e>>3, words 2(e&7) (low) and 2(e&7)+1.
    """
    if width not in (16, 32, 64):
        raise ValueError(f"a draw has 16, 32 or 64 bits, not {width}")
    e = np.asarray(e, np.uint64)
    per_block = 512 // width
    needed, place = np.unique(e.ravel() // np.uint64(per_block), return_inverse=True)
    stream = blocks(record, needed, tag, s, generator).astype("<u4", copy=False).view(f"<u{width // 8}")
    picked = stream[place.ravel(), (e.ravel() % np.uint64(per_block)).astype(np.int64)]
    return picked.astype(np.uint64).reshape(e.shape)
