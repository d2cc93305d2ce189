"""Group keys: what a family's draws become while a key that a group of processes shares is set."""

import ctypes
import hashlib
import os

import numpy as np
import pytest
import torch
from key_reference import kind, nonce_bytes_of, ratchet, reference_record

from everett_cuda import _C, keys
from everett_cuda.errors import HealthAlarm, RNGDesync

KEY, NEXT = bytes(range(32)), bytes(range(100, 132))


def set_key(key, world=False):
    memory = (ctypes.c_uint8 * 32)(*key)
    keys.set_group_key(world, ctypes.addressof(memory))


def test_draws_of_the_family_take_the_key_under_their_nonces(ring):
    ring.put(os.urandom(320))
    nonces = nonce_bytes_of(3, 4)
    set_key(KEY)
    assert keys.draw_record() == reference_record(KEY, nonces[0]) and kind() == "shared"
    assert keys.draw_record(world=True) != reference_record(KEY, nonces[1]) and kind() == "fresh"
    keys.step()  # a boundary alone changes nothing
    assert keys.draw_record() == reference_record(KEY, nonces[2])
    set_key(NEXT)
    assert keys.draw_record() == reference_record(NEXT, nonces[3])
    assert keys.counters()["shared"] == 3 and ring.unread == 320 - 32


def test_two_families_have_two_keys(ring):
    set_key(KEY, world=False)
    set_key(NEXT, world=True)
    (nonce,) = nonce_bytes_of(9)
    assert keys.draw_record() == reference_record(KEY, nonce)
    torch.manual_seed(9)
    assert keys.draw_record(world=True) == reference_record(NEXT, nonce)


def test_freshness_step_does_not_stand_before_the_group_key(ring):
    ring.put(os.urandom(64))
    keys.set_freshness("step")
    torch.manual_seed(5)
    keys.draw_record()
    set_key(KEY)
    nonces = nonce_bytes_of(6, 2)
    assert keys.draw_record() == reference_record(KEY, nonces[0])
    keys.clear_group_keys()
    keys.draw_record()
    assert kind() == "shared" and ring.unread == 32  # the step's own key again


def test_inference_takes_the_group_key_and_leaves_no_trace(ring):
    set_key(KEY)
    (nonce,) = nonce_bytes_of(4)
    for _ in range(2):
        torch.manual_seed(4)
        with torch.inference_mode():
            assert keys.draw_record() == reference_record(KEY, nonce) and kind() == "shared"
    assert keys.counters()["tape_entries"] == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_after_the_change_finds_the_key_of_its_forward(ring, reentrant):
    from recompute import block, block_gradient, ck, leaf, right

    set_key(KEY)
    x = leaf()
    torch.manual_seed(1)
    y = ck(block, x, reentrant)
    keys.step()
    set_key(NEXT)
    torch.manual_seed(1)
    other = block(x.detach())  # the same nonce in the next step, under the next key
    assert not torch.equal(other, y)
    y.sum().backward()
    assert right(x, y, block_gradient) and keys.counters()["replayed"] == 1


def test_a_withheld_key_refuses_draws_until_it_is_set_or_cleared(ring):
    ring.put(os.urandom(64))
    set_key(KEY)
    torch.manual_seed(2)
    record = keys.draw_record()
    keys.withhold_group_key(world=False)
    with pytest.raises(RNGDesync, match="no key in common"):
        keys.draw_record()
    with pytest.raises(RNGDesync), torch.inference_mode():
        keys.draw_record()
    torch.manual_seed(2)
    assert keys.draw_record() == record  # what was drawn in this step is there
    keys.draw_record(world=True)
    set_key(NEXT)
    (nonce,) = nonce_bytes_of(8)
    assert keys.draw_record() == reference_record(NEXT, nonce)
    keys.withhold_group_key(world=False)
    keys.clear_group_keys()
    keys.draw_record()
    assert kind() == "fresh"


def test_another_source_withholds_the_key(ring):
    set_key(KEY)
    other = _C.Ring(1 << 12)
    other.put(os.urandom(64))
    keys.attach(other)
    with pytest.raises(RNGDesync):
        keys.draw_record()
    keys.draw_record(world=True)  # had none


def test_no_new_bits_from_a_group_key_while_an_alarm_stands(ring):
    set_key(KEY)
    torch.manual_seed(2)
    record = keys.draw_record()
    ring.end(_C.Take.alarm)
    with pytest.raises(HealthAlarm):
        keys.draw_record()
    torch.manual_seed(2)
    assert keys.draw_record() == record


def test_a_key_to_share_is_this_ranks_own_and_graphs_take_the_group_key(ring):
    own = np.random.default_rng(1).bytes(64)
    ring.put(own)
    set_key(KEY)
    memory = (ctypes.c_uint8 * 32)()
    keys.draw_key_to_share(ctypes.addressof(memory))
    assert bytes(memory) == shared(own[:32]) and kind_of_counts() == (1, 0)
    keys.draw_graph_key(ctypes.addressof(memory))
    assert bytes(memory) == KEY and kind_of_counts() == (1, 1)
    keys.withhold_group_key(world=False)
    keys.draw_key_to_share(ctypes.addressof(memory))
    assert bytes(memory) == shared(own[32:])
    with pytest.raises(RNGDesync):
        keys.draw_graph_key(ctypes.addressof(memory))
    with pytest.raises(ValueError, match="32 bytes of memory"):
        keys.set_group_key(False, 0)


def test_what_is_stretched_after_a_shared_key_cannot_be_known_from_it(ring):
    ring.put(KEY)
    memory = (ctypes.c_uint8 * 32)()
    address = ctypes.addressof(memory)
    keys.draw_key_to_share(address)
    assert bytes(memory) == shared(KEY)
    keys.draw_key_to_share(address)  # no fresh key is left
    assert bytes(memory) == shared(ratchet(KEY))
    (nonce,) = nonce_bytes_of(3)
    assert keys.draw_record() == reference_record(ratchet(ratchet(KEY)), nonce)


def shared(key):
    return hashlib.sha256(b"everett/1/share\0" + key).digest()


def kind_of_counts():
    counters = keys.counters()
    return counters["fresh"], counters["shared"]
