"""Conditioner: SHA-256 by libcrypto against published vectors and against hashlib."""

import hashlib

import pytest
from alarm_inputs import good_bytes

from everett_cuda import _C, conditioner, health

needs_libcrypto = pytest.mark.skipif(not _C.sha256_library(), reason="no libcrypto opens here; hashlib serves")


@needs_libcrypto
@pytest.mark.parametrize(
    "message, digest",
    [  # FIPS 180-4 examples
        (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (
            b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
        ),
        (b"a" * 1_000_000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
        # NIST CAVP SHA256ShortMsg, 8 and 512 bits
        (bytes.fromhex("d3"), "28969cdfa74a12c82f3bad960b0b000aca2ac329deea5c2328ebc6f2ba9802c1"),
        (
            bytes.fromhex(
                "5a86b737eaea8ee976a0a24da63e7ed7eefad18a101c1211e2b3650c5187c2a8"
                "a650547208251f6d4237e661c7bf4c77f335390394c37fa1a9f9be836ac28509"
            ),
            "42e61e174fbb3897d6dd6cef3dd2802fe67b331953b06114a65c772859dfc1aa",
        ),
    ],
)
def test_sha256_published_vectors(message, digest):
    assert _C.sha256_blocks(message, len(message)).hex() == digest


@needs_libcrypto
@pytest.mark.parametrize("block_bytes", [32, 40, 54, 55, 56, 63, 64, 65, 80, 107, 119, 120, 320, 616])
def test_libcrypto_equals_hashlib(block_bytes):
    raw = good_bytes(block_bytes * 37, block_bytes).tobytes()
    expected = b"".join(hashlib.sha256(raw[i : i + block_bytes]).digest() for i in range(0, len(raw), block_bytes))
    assert _C.sha256_blocks(raw, block_bytes) == conditioner.hash_blocks(raw, block_bytes) == expected


@needs_libcrypto
def test_partial_blocks_are_refused():
    for n, block in ((79, 80), (81, 80), (80, 0)):
        with pytest.raises(ValueError, match="whole blocks"):
            _C.sha256_blocks(bytes(n), block)


def test_raw_bytes_a_block_give_64_bits_more_than_come_out():
    for h in ("8", "7.1", "4", "3.3", "1", "0.52"):
        n = health.raw_bytes_per_block(h)
        assert n * health.exact(h) >= 320 > (n - 1) * health.exact(h)


def test_choice_and_its_words(monkeypatch):
    assert conditioner.choose("none") == ("none", "none (the source declares full entropy)")
    monkeypatch.setattr(_C, "sha256_library", lambda: "libcrypto.so.3")
    assert conditioner.choose("sha256") == (None, "SHA-256, libcrypto.so.3")
    monkeypatch.setattr(_C, "sha256_library", lambda: "")
    assert conditioner.choose("sha256") == (conditioner.hash_blocks, "SHA-256, hashlib (slow)")
