"""ChaCha with 8, 12 or 20 rounds (Bernstein 2008; RFC 8439 for the 20 rounds) and HChaCha20 (the XChaCha draft)."""

import numpy as np

CONSTANTS = np.array([0x61707865, 0x3320646E, 0x79622D32, 0x6B206574], np.uint32)  # "expand 32-byte k"
COLUMNS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))


def _rotate(x, bits):
    return (x << np.uint32(bits)) | (x >> np.uint32(32 - bits))


def permute(state, rounds):
    """The rounds alone, without the final addition. state: uint32 (16, ...), one column a block; returns a copy."""
    if rounds not in (8, 12, 20):
        raise ValueError(f"ChaCha has 8, 12 or 20 rounds here, not {rounds}")
    x = np.array(state, np.uint32)
    for _ in range(rounds // 2):
        for a, b, c, d in COLUMNS + DIAGONALS:
            x[a] += x[b]
            x[d] = _rotate(x[d] ^ x[a], 16)
            x[c] += x[d]
            x[b] = _rotate(x[b] ^ x[c], 12)
            x[a] += x[b]
            x[d] = _rotate(x[d] ^ x[a], 8)
            x[c] += x[d]
            x[b] = _rotate(x[b] ^ x[c], 7)
    return x


def blocks(key, words_12_to_15, rounds):
    """Keystream blocks, uint32 (n, 16); as little-endian bytes they are the keystream.

    key: uint32[8]. words_12_to_15: uint32 (n, 4), the last row of the state. RFC 8439 puts a 32-bit block number and a
    96-bit nonce there, Bernstein a 64-bit block number and a 64-bit nonce; the stream law block number, tag and s.
    """
    last = np.asarray(words_12_to_15, np.uint32)
    state = np.empty((16, len(last)), np.uint32)
    state[:4] = CONSTANTS[:, None]
    state[4:12] = np.asarray(key, np.uint32)[:, None]
    state[12:] = last.T
    return np.ascontiguousarray((permute(state, rounds) + state).T)


def hchacha20(key, nonce):
    """Subkey uint32[8] of key uint32[8] and 128-bit nonce uint32[4]: first and last row after 20 rounds."""
    state = np.concatenate([CONSTANTS, np.asarray(key, np.uint32), np.asarray(nonce, np.uint32)])
    x = permute(state[:, None], 20)[:, 0]
    return np.concatenate([x[:4], x[12:]])
