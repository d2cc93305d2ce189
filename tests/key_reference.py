"""What the tests of keys share: a second implementation of the record, in numpy over many keys, and small helpers."""

import hashlib

import numpy as np
import torch

from everett_cuda import _C, keys

CPU = -1
OUTSIDE = dict(inference=False, in_backward=False, grad_enabled=True, keep_graph=False, nested=False, node=2**64 - 1)


def chacha20_rounds(x):
    def quarter(a, b, c, d):
        for u, v, w, r in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[u] = x[u] + x[v]
            t = x[w] ^ x[u]
            x[w] = (t << np.uint32(r)) | (t >> np.uint32(32 - r))

    for _ in range(10):
        for column in ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)):
            quarter(*column)
        for diagonal in ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)):
            quarter(*diagonal)
    return x


def reference_records(keys_bytes, nonces_bytes):
    """Records (n, 12) uint32 of n keys of 32 bytes and n nonces of 16 bytes, joined."""
    key = np.frombuffer(keys_bytes, "<u4").reshape(-1, 8).T
    nonce = np.frombuffer(nonces_bytes, "<u4").reshape(-1, 4).T
    constants = np.repeat(np.frombuffer(b"expand 32-byte k", "<u4")[:, None], key.shape[1], axis=1)
    x = chacha20_rounds(np.concatenate([constants, key, nonce]))
    subkey = np.concatenate([x[:4], x[12:]])
    last_block = np.zeros((4, key.shape[1]), np.uint32)
    last_block[:2] = 0xFFFFFFFF
    dither = chacha20_rounds(np.concatenate([constants, subkey, last_block]))[:1] + constants[:1]
    return np.concatenate([subkey, dither, np.zeros((3, key.shape[1]), np.uint32)]).T


def reference_record(key, nonce):
    return reference_records(key, nonce).astype("<u4").tobytes()


def nonce_bytes_of(seed, count=1):
    """The nonces of the first `count` draws after manual_seed(seed); leaves torch's generator seeded anew."""
    torch.manual_seed(seed)
    drawn = [torch.empty(2, dtype=torch.int64).random_(-(2**63), None).numpy().tobytes() for _ in range(count)]
    torch.manual_seed(seed)
    return drawn


def numbered_keys(n):
    return [hashlib.sha256(b"key %d" % i).digest() for i in range(n)]


def ratchet(key):
    return hashlib.sha256(b"everett/1/stretch\0" + key).digest()


def kind():
    return _C.Keyring.last_draw()[0]


def fresh_record():
    with torch.inference_mode():
        return keys.draw_record()
