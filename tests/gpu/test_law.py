"""The stream law's headers on a real GPU, bit for bit against the numpy reference."""

import numpy as np
import pytest
import torch

from everett_cuda.reference import fill, keepdrop, stream

_cuda = pytest.importorskip("everett_cuda._cuda", reason="built without nvcc")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

BLOCKS = 500
FIRST = [0, 2**32 - 3, 2**40 + 7]
KINDS = {2: (fill.uniform, stream.UNIFORM, 16), 3: (fill.normal, stream.NORMAL, 16),
         4: (fill.exponential, stream.EXPONENTIAL, 8), 5: (fill.gumbel, stream.EXPONENTIAL, 8)}  # fmt: skip
RECORD = stream.derive(bytes(range(32)), bytes(range(16)))


def _on_gpu(generator, tag, what, first, p=0.5):
    return np.frombuffer(_cuda.law(generator, RECORD.tobytes(), tag, 3, p, what, first, BLOCKS), np.uint32)


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("generator", range(4))
def test_words_match_reference(generator, first):
    numbers = np.uint64(first) + np.arange(BLOCKS, dtype=np.uint64)
    expected = stream.blocks(RECORD, numbers, 8, 3, stream.GENERATORS[generator])
    assert np.array_equal(_on_gpu(generator, 8, 0, first), expected.ravel())


@pytest.mark.parametrize("p", [1 / 256, 0.1, 0.5, 31 / 32])
@pytest.mark.parametrize("first", FIRST)
def test_keep_matches_reference(first, p):
    e = np.uint64(first * 32) + np.arange(BLOCKS * 32, dtype=np.uint64)
    expected = keepdrop.keep_mask(RECORD, p, e, "chacha8", stream.KEEP, 3)
    assert np.array_equal(_on_gpu(0, stream.KEEP, 1, first, p), expected.astype(np.uint32))


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("what", KINDS)
def test_values_match_reference(what, first):
    reference, tag, per_block = KINDS[what]
    e = np.uint64(first * per_block) + np.arange(BLOCKS * per_block, dtype=np.uint64)
    expected = reference(RECORD, e, s=3).view(np.uint32)
    assert np.array_equal(_on_gpu(0, tag, what, first), expected)
