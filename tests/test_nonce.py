"""Nonces: how torch's generators stand afterwards, where an op may go direct, functorch, fake tensors, compilation."""

import ctypes
import os
import threading

import numpy as np
import pytest
import torch

from everett_cuda import keys, nonce
from everett_cuda.errors import (
    EverettError,
)


def test_nonce_advances_torchs_generator_as_random_does(ring):
    ring.put(bytes(64))
    torch.manual_seed(3)
    torch.empty(2, dtype=torch.int64).random_(-(2**63), None)
    after_one = torch.get_rng_state()
    torch.manual_seed(3)
    keys.draw_record()
    assert torch.equal(torch.get_rng_state(), after_one)


def test_nonces_have_128_bits(ring):
    ring.put(os.urandom(32 * 400))
    seen = []
    for _ in range(400):
        keys.draw_record()
        seen.append(ctypes.string_at(keys._nonce.address, 16))
    bits = np.unpackbits(np.frombuffer(b"".join(seen), np.uint8).reshape(400, 16), axis=1).mean(0)
    # 128 bits, 400 draws: each frequency within 6 standard deviations (0.025 each); a constant bit is 20 away.
    assert abs(bits - 0.5).max() < 6 * 0.025


def test_nonce_buffer_made_in_inference_mode_serves_outside(ring):
    """In a thread of its own, so that its buffer is made here; also under a default device that holds no data."""
    ring.put(bytes(96))
    result = []

    def draws():
        with torch.inference_mode(), torch.device("meta"):
            result.append(keys.draw_record())
        result.append(keys.draw_record())

    thread = threading.Thread(target=draws)
    thread.start()
    thread.join()
    assert len(set(result)) == 2


def test_direct_path_takes_only_plain_memory():
    from torch._subclasses import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    x = torch.ones(3)
    assert nonce.can_go_direct(x)
    assert nonce.can_go_direct(torch.nn.Parameter(x))
    assert nonce.can_go_direct(x[::2])
    assert not nonce.can_go_direct(torch.ones(3, device="meta"))
    assert not nonce.can_go_direct(torch.ones(2, dtype=torch.complex64).conj())
    assert not nonce.can_go_direct(torch.ones(2, dtype=torch.complex64).conj().imag)
    assert not nonce.can_go_direct(torch.eye(2).to_sparse())
    assert not nonce.can_go_direct(torch.nested.nested_tensor([x, x], layout=torch.jagged))
    with FakeTensorMode() as mode:
        assert not nonce.can_go_direct(mode.from_tensor(x))

    class Passing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Passing():
        assert not nonce.can_go_direct(x)
    seen = []
    torch.func.vmap(lambda row: (seen.append(nonce.can_go_direct(row)), row)[1])(torch.ones(2, 3))
    torch.func.grad(lambda v: (seen.append(nonce.can_go_direct(x)), v.sum())[1])(x)
    assert seen == [False, False]


def test_nonce_tensor_follows_vmap_randomness_and_fake_tensors(ring):
    from torch._subclasses import FakeTensorMode

    def f(_):
        return nonce.nonce_tensor()

    rows = torch.ones(3, 1)
    with pytest.raises(RuntimeError, match="random"):
        torch.func.vmap(f, randomness="error")(rows)
    assert len({tuple(r.tolist()) for r in torch.func.vmap(f, randomness="different")(rows)}) == 3
    assert len({tuple(r.tolist()) for r in torch.func.vmap(f, randomness="same")(rows).expand(3, 2)}) == 1
    with FakeTensorMode():
        fake = nonce.nonce_tensor()
    assert (fake.shape, fake.dtype) == ((2,), torch.int64)
    with pytest.raises(TypeError, match="FakeTensor"):
        keys.record_from_nonce(fake)


def test_compiled_nonces_differ_and_have_64_bits_a_word():
    drawn = torch.compile(
        lambda: torch.stack([nonce.nonce_tensor() for _ in range(50)]), backend="aot_eager", fullgraph=True
    )
    words = torch.cat([drawn() for _ in range(4)]).view(-1, 2)
    assert len({tuple(w) for w in words.tolist()}) == 200
    bits = np.unpackbits(words.numpy().view(np.uint8), axis=1).mean(0)
    assert abs(bits - 0.5).max() < 6 * 0.5 / 200**0.5


def test_record_from_nonce_rejects_what_has_no_nonce(ring):
    ring.put(bytes(32))
    for wrong in (torch.zeros(2), torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)[::2]):
        with pytest.raises(ValueError, match="int64, shape"):
            keys.record_from_nonce(wrong)
    with pytest.raises(EverettError, match="not from that of meta"):
        keys.record_from_nonce(torch.zeros(2, dtype=torch.int64, device="meta"))
    with pytest.raises(EverettError, match="not from that of xpu"):
        nonce.nonce_tensor("xpu")
    with pytest.raises(ValueError, match="no memory"):
        keys._keyring.draw(0, False)
    assert ring.unread == 32
