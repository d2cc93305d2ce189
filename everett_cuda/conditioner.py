"""Which hash the conditioner uses: libcrypto from C++ where one opens, else Python's hashlib; the bytes are the same.

The construction (csrc/conditioner.h): block = SHA-256(raw[0:n]), n = ceil(320 / H), nothing chained.
"""

import hashlib  # before the C++ side looks for a libcrypto, so that it finds the one Python has loaded

from . import _C


def hash_blocks(raw: bytes, block_bytes: int) -> bytes:
    """SHA-256 of each piece of `block_bytes` raw bytes, concatenated: the slow twin of the C++ conditioner."""
    return b"".join(hashlib.sha256(raw[i : i + block_bytes]).digest() for i in range(0, len(raw), block_bytes))


def choose(condition: str) -> tuple[object, str]:
    """(the `hash` argument of `_C.Pipeline`, what the status says) for `condition` = "sha256" or "none"."""
    if condition == "none":
        return "none", "none (the source declares full entropy)"
    library = _C.sha256_library()
    if library:
        return None, f"SHA-256, {library}"
    return hash_blocks, "SHA-256, hashlib (slow)"
