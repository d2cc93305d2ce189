"""Keys: the record of a draw, freshness, counts, size of the tape, devices, threads, forks, hashing by hashlib."""

import ctypes
import hashlib
import os
import re
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from key_reference import (
    CPU,
    OUTSIDE,
    chacha20_rounds,
    fresh_record,
    kind,
    nonce_bytes_of,
    numbered_keys,
    ratchet,
    reference_record,
    reference_records,
)
from processes import in_forked_child

import everett_cuda
from everett_cuda import _C, keys
from everett_cuda.errors import EverettError, ForkedError, HealthAlarm, SourceNotOpen, Starved

# --- published vectors and the reference --------------------------------------------------------------------------


def test_subkey_is_the_xchacha_drafts_hchacha20(ring):
    ring.put(bytes(range(32)))
    nonce = bytes.fromhex("000000090000004a0000000031415927")
    record = keys.record_from_nonce(torch.frombuffer(bytearray(nonce), dtype=torch.int64))
    assert record[:32].hex() == "82413b4227b27bfed30e42508a877d73a0f9e4d58a74a853c12ec41326d3ecdc"
    assert record == reference_record(bytes(range(32)), nonce)


def test_reference_dither_uses_rfc8439_block():
    # RFC 8439 2.3.2: key 00..1f, words 12-15 = 1, 0x09000000, 0x4a000000, 0; first word of the block e4e7f110.
    key = np.frombuffer(bytes(range(32)), "<u4")[:, None]
    constants = np.frombuffer(b"expand 32-byte k", "<u4")[:, None]
    tail = np.array([[1], [0x09000000], [0x4A000000], [0]], np.uint32)
    assert (chacha20_rounds(np.concatenate([constants, key, tail]))[0] + constants[0])[0] == 0xE4E7F110


def test_records_match_reference_in_ring_order(ring):
    n = 1000
    supply = numbered_keys(n)
    nonces = nonce_bytes_of(5, n)
    ring.put(b"".join(supply))
    got = [keys.draw_record() for _ in range(n)]
    assert got == [r.astype("<u4").tobytes() for r in reference_records(b"".join(supply), b"".join(nonces))]
    counters = keys.counters()
    assert (counters["draws"], counters["fresh"], ring.unread) == (n, n, 0)


def test_a_graphs_key_is_the_rings_next_and_nobody_elses(ring):
    ring.put(bytes(range(96)))
    memory = (ctypes.c_uint8 * 32)()
    keyring = keys._keyring
    keyring.new_graph_key(ctypes.addressof(memory))
    assert bytes(memory) == bytes(range(32))
    torch.manual_seed(1)
    assert keys.draw_record() == _C.derive_record(bytes(range(32, 64)), ctypes.string_at(keys._nonce.address, 16))
    for freshness in ("step", "op"):  # a step's key is not for graphs, nor a graph's for the step
        keys.set_freshness(freshness)
        ring.put(os.urandom(64))
        keys.draw_record()
    keyring.new_graph_key(ctypes.addressof(memory))
    assert keys.counters()["fresh"] == keys.counters()["draws"] == 5 and keys.counters()["tape_entries"] == 3


def test_a_graphs_key_is_stretched_and_refused_by_the_policy(ring):
    memory = (ctypes.c_uint8 * 32)(*[7] * 32)
    address = ctypes.addressof(memory)
    keys.configure(timeout_s=0)
    with pytest.raises(Starved):
        keys._keyring.new_graph_key(address)
    assert bytes(memory) == bytes([7] * 32)
    key = os.urandom(32)
    ring.put(key)
    keys._keyring.new_graph_key(address)
    keys._keyring.new_graph_key(address)
    assert bytes(memory) == _C.stretched_key(key)
    ring.end(_C.Take.alarm)
    with pytest.raises(HealthAlarm):
        keys._keyring.new_graph_key(address)
    with pytest.raises(ValueError, match="32 bytes of memory"):
        keys._keyring.new_graph_key(0)


def test_labels_keep_ratchet_and_commitment_apart():
    key = bytes(range(32))
    assert _C.stretched_key(key) == hashlib.sha256(b"everett/1/stretch\0" + key).digest()
    assert _C.key_commitment(key) == hashlib.sha256(b"everett/1/commit\0" + key).digest()
    with pytest.raises(ValueError, match="32 bytes"):
        _C.stretched_key(key[:31])


# --- freshness --------------------------------------------------------------------------------------------------------


def test_freshness_step_keeps_the_key_until_a_boundary(ring):
    keys.set_freshness("step")
    supply = numbered_keys(4)
    ring.put(b"".join(supply))
    nonces = nonce_bytes_of(8, 5)
    got = [keys.draw_record(), keys.draw_record()]
    keys.step()
    assert ring.unread == 3 * 32  # a boundary only marks; the next draw takes
    got += [keys.draw_record(), keys.draw_record()]
    keys.step()
    keys.step()
    got.append(keys.draw_record())
    used = [supply[0], supply[0], supply[1], supply[1], supply[2]]
    assert got == [reference_record(k, n) for k, n in zip(used, nonces, strict=True)]
    counters = keys.counters()
    assert (counters["fresh"], counters["shared"], counters["boundaries"]) == (3, 2, 3)


def test_step_keys_are_per_device_and_generator(ring):
    keys.set_freshness("step")
    ring.put(os.urandom(32 * 80))
    nonce = torch.tensor([1, 2])
    at = [(CPU, 0), (0, 0), (1, 0), (0, 7)]
    records = [keys._keyring.draw_at(nonce.data_ptr(), d, g, **OUTSIDE) for d, g in at]
    assert len(set(records)) == 4 and ring.unread == 76 * 32
    other = torch.tensor([3, 4])
    for device, generator in at:
        keys._keyring.draw_at(other.data_ptr(), device, generator, **OUTSIDE)
        assert kind() == "shared"
    # More generators than there are places for: fresh keys, never another generator's.
    many = [keys._keyring.draw_at(nonce.data_ptr(), 0, 100 + g, **OUTSIDE) for g in range(70)]
    assert len(set(many)) == 70 and keys.counters()["fresh"] == 74


def test_starving_generators_leave_the_step_keys_of_others_alone(ring):
    keys.set_freshness("step")
    keys.configure(on_starved="wait", timeout_s=0.0)
    ring.put(bytes(32))
    nonces = torch.tensor([[1, 2], [3, 4]])
    keys._keyring.draw_at(nonces[0].data_ptr(), 0, 0, **OUTSIDE)
    for _ in range(100):
        with pytest.raises(Starved):
            keys.draw_record()
    keys._keyring.draw_at(nonces[1].data_ptr(), 0, 0, **OUTSIDE)
    assert kind() == "shared"


def test_inference_mode_is_fresh_in_every_freshness_and_unrecorded(ring):
    supply = numbered_keys(4)
    ring.put(b"".join(supply))
    (nonce,) = nonce_bytes_of(4)
    got = []
    for freshness in ("op", "step"):
        keys.set_freshness(freshness)
        for _ in range(2):
            torch.manual_seed(4)
            got.append(fresh_record())
    assert got == [reference_record(k, nonce) for k in supply]
    assert keys.counters()["tape_entries"] == 0


def test_a_steps_key_serves_no_new_nonce_under_an_alarm(ring):
    keys.set_freshness("step")
    ring.put(bytes(32))
    keys.draw_record()
    ring.end(_C.Take.alarm)
    with pytest.raises(HealthAlarm):
        keys.draw_record()
    assert keys.counters()["shared"] == 0


def test_settings_reject_what_has_no_meaning_and_survive_reopening(ring):
    with pytest.raises(ValueError, match="direct_words"):
        keys.set_freshness("direct")
    with pytest.raises(ValueError, match='"op" or "step"'):
        keys.set_freshness("raw")
    for wrong in (
        dict(on_starved="never"),
        dict(max_stretch=-1),
        dict(max_stretch=2.5),
        dict(max_stretch=True),
        dict(timeout_s=-1),
        dict(timeout_s=float("nan")),
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            keys.configure(**wrong)
    keys.configure(on_starved="error")
    keys.configure(timeout_s=None)
    assert keys.settings() == {"freshness": "op", "on_starved": "error", "max_stretch": 2**16, "timeout_s": None}
    keys.detach()
    keys.attach(ring)
    with pytest.raises(Starved, match='on_starved="error"'):
        keys.draw_record()


# --- the keyring: counts, eviction, threads, forks --------------------------------------------------------------------


def test_no_key_is_used_twice_in_100000_draws():
    n = 100_000
    ring = _C.Ring(1 << 22)
    supply = os.urandom(32 * n)
    ring.put(supply)
    keys.configure(on_starved="error")
    keys.attach(ring)
    try:
        # One and the same nonce each time: the records are equal if and only if the keys are.
        nonce = torch.tensor([7, 9])
        got = [keys._keyring.draw(nonce.data_ptr(), True) for _ in range(n)]
        with pytest.raises(Starved):
            fresh_record()
    finally:
        keys.detach()
        keys.configure(on_starved="stretch")
    assert len(set(got)) == n
    assert b"".join(got) == reference_records(supply, nonce.numpy().tobytes() * n).astype("<u4").tobytes()


def test_the_tape_forgets_by_count_oldest_first(ring):
    keys.detach()
    keys.attach(ring, tape_entries=4)
    ring.put(os.urandom(32 * 20))

    def draw(i):
        nonce = torch.tensor([i, 0])
        return keys._keyring.draw(nonce.data_ptr(), False)

    records = {i: draw(i) for i in range(4)}
    assert all(draw(i) == records[i] for i in range(4)), "within a step nothing is overwritten"
    draw(4)  # drives out 0
    assert [draw(i) == records[i] for i in (1, 2, 3)] == [True] * 3
    assert draw(0) != records[0]  # drives out 1
    assert draw(1) != records[1]
    counters = keys.counters()
    assert (counters["tape_entries"], counters["tape_evicted"], counters["reused"]) == (4, 3, 7)


def test_the_tape_holds_more_than_one_chunk_and_wraps(ring):
    keys.detach()
    keys.attach(ring, tape_entries=5000)
    ring.put(os.urandom(32 * 12000))
    nonces = [torch.tensor([i, -i]) for i in range(12000)]
    records = [keys._keyring.draw(nonce.data_ptr(), False) for nonce in nonces]
    again = [keys._keyring.draw(nonce.data_ptr(), False) for nonce in nonces[7000:]]
    assert again == records[7000:]
    counters = keys.counters()
    assert (counters["reused"], counters["tape_evicted"], counters["fresh"]) == (5000, 7000, 12000)


def test_equal_nonces_on_two_devices_or_generators_are_two_draws(ring):
    keys.detach()
    keys.attach(ring, tape_entries=32)  # a small index, so that several of the names share a bucket
    ring.put(os.urandom(32 * 32))
    nonce = torch.tensor([5, 6])
    at = [(device, generator) for device in range(CPU, 7) for generator in range(4)]
    first = [keys._keyring.draw_at(nonce.data_ptr(), d, g, **OUTSIDE) for d, g in at]
    again = [keys._keyring.draw_at(nonce.data_ptr(), d, g, **OUTSIDE) for d, g in at]
    assert len(set(first)) == 32 and again == first


def test_equal_rng_states_give_equal_bits_and_are_counted(ring):
    ring.put(os.urandom(32 * 4))
    torch.manual_seed(6)
    first = keys.draw_record()
    torch.manual_seed(6)
    assert keys.draw_record() == first and kind() == "reused"
    keys.step()
    torch.manual_seed(6)
    assert keys.draw_record() != first and kind() == "fresh"
    counters = keys.counters()
    assert (counters["reused"], counters["fresh"], counters["draws"]) == (1, 2, 3)


@pytest.mark.parametrize("freshness", ["op", "step"])
def test_the_two_families_never_share_a_key(ring, freshness):
    """Equal torch states, once for masks and once for what may reach weights: two keys, each found again by its own."""
    ring.put(os.urandom(32 * 8))
    keys.set_freshness(freshness)
    records, kinds = [], []
    for world in (False, True, False, True):
        torch.manual_seed(0)
        records.append(keys.draw_record(world))
        kinds.append(kind())
    assert kinds == ["fresh", "fresh", "reused", "reused"]
    assert records[:2] == records[2:] and records[0] != records[1]
    nonce = torch.frombuffer(bytearray(ctypes.string_at(keys._nonce.address, 16)), dtype=torch.int64)
    assert [keys.record_from_nonce(nonce, None, world) for world in (False, True)] == records[:2]


def test_tickets_number_the_draws(ring):
    ring.put(os.urandom(32 * 3))
    seen = []
    for _ in range(3):
        keys.draw_record()
        seen.append(_C.Keyring.last_draw())
    assert seen == [("fresh", 1), ("fresh", 2), ("fresh", 3)]


def test_threads_share_one_keyring_and_no_key(ring):
    keys.configure(on_starved="wait", timeout_s=60.0)
    per_thread, threads = 3000, 4
    total = per_thread * threads
    results = [[] for _ in range(threads)]

    def work(mine):
        with torch.inference_mode():
            nonce = torch.tensor([0, 0])
            for _ in range(per_thread):
                mine.append(keys._keyring.draw(nonce.data_ptr(), True))

    workers = [threading.Thread(target=work, args=(r,)) for r in results]
    for w in workers:
        w.start()
    for _ in range(total // 100):  # in small pieces, so that the threads wait again and again
        ring.put(os.urandom(32 * 100))
    for w in workers:
        w.join()
    assert len({r for mine in results for r in mine}) == total
    counters = keys.counters()
    assert (counters["fresh"], counters["discarded"], ring.unread) == (total, 0, 0)


def test_threads_that_stretch_together_never_get_one_key_twice(ring):
    ring.put(bytes(32))
    results = [[] for _ in range(4)]

    def work(mine):
        nonce = torch.tensor([0, 0])
        for _ in range(2000):
            mine.append(keys._keyring.draw(nonce.data_ptr(), True))

    workers = [threading.Thread(target=work, args=(r,)) for r in results]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert len({r for mine in results for r in mine}) == 8000
    assert keys.counters()["stretched"] == 7999


def test_two_threads_that_wait_for_one_name_get_one_record(ring):
    keys.configure(on_starved="wait", timeout_s=60.0)
    nonce = torch.tensor([1, 1])
    results = []
    workers = [
        threading.Thread(target=lambda: results.append(keys._keyring.draw(nonce.data_ptr(), False))) for _ in range(2)
    ]
    for w in workers:
        w.start()
    while keys.counters()["waits"] < 2:
        time.sleep(0.002)
    ring.put(os.urandom(64))
    for w in workers:
        w.join()
    counters = keys.counters()
    assert results[0] == results[1]
    assert (counters["fresh"], counters["reused"], counters["draws"]) == (1, 1, 2)
    # A key in hand when the other thread had recorded the name is thrown away, not kept for later.
    assert ring.unread == 32 * (1 - counters["discarded"])


def test_a_forked_child_never_shares_keys(ring):
    ring.put(os.urandom(32 * 4))
    torch.manual_seed(1)
    first = keys.draw_record()

    def draw():
        torch.manual_seed(1)
        return keys.draw_record().hex()

    def stretched():
        keys.configure(on_starved="stretch")
        return keys.draw_record().hex()

    def with_a_source_of_its_own():
        own = _C.Ring(4096)
        own.put(bytes(range(32)))
        keys.attach(own)
        torch.manual_seed(1)
        return keys.draw_record().hex()

    for attempt in (draw, stretched):
        assert "ForkedError" in in_forked_child(attempt)
    assert in_forked_child(lambda: (keys.step(), keys.counters()["fresh"])[1]) == "0"
    (nonce,) = nonce_bytes_of(1)
    assert in_forked_child(with_a_source_of_its_own) == reference_record(bytes(range(32)), nonce).hex()
    assert draw() == first.hex()  # the parent is untouched
    assert issubclass(ForkedError, EverettError)


def test_opening_again_keeps_the_tape_but_not_the_ratchet(ring):
    keys.configure(timeout_s=0.0)
    ring.put(bytes(32))
    torch.manual_seed(9)
    first = keys.draw_record()
    keys.draw_record()
    assert kind() == "stretched"
    other = _C.Ring(4096)
    keys.attach(other)
    torch.manual_seed(9)
    assert keys.draw_record() == first
    torch.manual_seed(10)
    with pytest.raises(Starved):  # nothing is stretched from the other source's key
        keys.draw_record()


# --- before a source, and the environment -----------------------------------------------------------------------------


def test_a_draw_before_any_source_says_what_to_do(monkeypatch):
    monkeypatch.delenv("EVERETT_SOURCE", raising=False)
    keys.detach()
    state = torch.get_rng_state()
    with pytest.raises(SourceNotOpen, match=re.escape('ev.open("auto")')):
        keys.draw_record()
    with pytest.raises(SourceNotOpen):
        keys.record_from_nonce(torch.zeros(2, dtype=torch.int64))
    assert torch.equal(torch.get_rng_state(), state)
    assert keys.counters() == {}
    keys.step()  # ends nothing, breaks nothing


def test_the_environment_names_the_source_of_the_first_draw(monkeypatch):
    keys.detach()
    opened = []

    def fake_open(uri):
        opened.append(uri)
        ring = _C.Ring(4096)
        ring.put(bytes(64))
        keys.attach(ring)

    monkeypatch.setattr(everett_cuda, "open", fake_open, raising=False)
    monkeypatch.setenv("EVERETT_SOURCE", "sim:seed=1")
    try:
        keys.draw_record()
        keys.draw_record()
    finally:
        keys.detach()
    assert opened == ["sim:seed=1"]
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)  # a set-uid program
    with pytest.raises(SourceNotOpen):
        keys.draw_record()


def test_the_environment_opens_a_real_source(monkeypatch):
    keys.detach()
    monkeypatch.setenv("EVERETT_SOURCE", "sim:seed=3")
    try:
        assert len({keys.draw_record() for _ in range(100)}) == 100
        assert everett_cuda.current_source().uri == "sim:seed=3"
        assert keys.counters()["fresh"] + keys.counters()["stretched"] == 100
    finally:
        everett_cuda.close()


def test_a_repeat_under_no_grad_warns_once(ring):
    ring.put(os.urandom(32 * 8))

    def repeat():
        torch.manual_seed(0)
        keys.draw_record()
        torch.manual_seed(0)
        keys.draw_record()

    class Function(torch.autograd.Function):  # where a reentrant checkpoint draws
        @staticmethod
        def forward(ctx, x):
            repeat()
            return x.clone()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        repeat()
        Function.apply(torch.ones(1, requires_grad=True))
    with torch.no_grad():
        with pytest.warns(UserWarning, match="repeated under no_grad"):
            repeat()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            repeat()


def _python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def test_without_libcrypto_hashlib_gives_the_same_keys():
    code = """
import threading, torch
from everett_cuda import _C, keys
assert _C.sha256_library() == "", _C.sha256_library()
ring = _C.Ring(4096)
ring.put(bytes(range(32)))
keys.attach(ring)
nonce = torch.tensor([1, 2])
print(*[keys._keyring.draw(nonce.data_ptr(), True).hex() for _ in range(3)])
# Threads that stretch at once need the GIL inside a draw: this must not deadlock, nor hand out a key twice.
got = []
work = lambda: got.extend([keys._keyring.draw(nonce.data_ptr(), True) for _ in range(500)])
threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
print(len(set(got)), keys.counters()["stretched"])
# Another draw turns the ratchet while this one hashes: neither may be given the other's key.
import ctypes
import hashlib
real, inner = hashlib.sha256, []
def sha256(message):
    hashlib.sha256 = real
    inner.append(keys._keyring.draw(nonce.data_ptr(), True))
    return real(message)
hashlib.sha256 = sha256
outer = keys._keyring.draw(nonce.data_ptr(), True)
print(len({*got, *inner, outer}))
"""
    done = _python(code, EVERETT_NO_LIBCRYPTO="1")
    assert done.returncode == 0, done.stderr
    records, counts, after_race = done.stdout.strip().splitlines()
    k0 = bytes(range(32))
    nonce = np.array([1, 2], "<i8").tobytes()
    assert records.split() == [reference_record(k, nonce).hex() for k in (k0, ratchet(k0), ratchet(ratchet(k0)))]
    assert counts == "2000 2002"
    assert after_race == "2002"


@pytest.mark.parametrize("missing", ["_current_graph_task_id", "_current_autograd_node", "_len_torch_dispatch_stack"])
def test_a_torch_without_a_private_call_fails_the_import_by_name(missing):
    done = _python(f"import torch; del torch._C.{missing}; import everett_cuda.keys")
    assert done.returncode != 0 and f"ImportError: everett_cuda needs torch._C.{missing}" in done.stderr
