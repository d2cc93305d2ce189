"""Keys: the record of a draw, nonces, the ratchet, freshness, starvation, counters, threads and forks."""

import ctypes
import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import torch

import everett_cuda
from everett_cuda import _C, keys
from everett_cuda.errors import (
    EverettError,
    ForkedError,
    HealthAlarm,
    SourceError,
    SourceExhausted,
    SourceNotOpen,
    Starved,
)

CPU = -1
OUTSIDE = dict(inference=False, in_backward=False, grad_enabled=True, keep_graph=False, nested=False, node=2**64 - 1)


# A second implementation of the record, over many keys at once.


def _rounds(x):
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
    x = _rounds(np.concatenate([constants, key, nonce]))
    subkey = np.concatenate([x[:4], x[12:]])
    last_block = np.zeros((4, key.shape[1]), np.uint32)
    last_block[:2] = 0xFFFFFFFF
    dither = _rounds(np.concatenate([constants, subkey, last_block]))[:1] + constants[:1]
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


@pytest.fixture
def ring():
    """An empty ring (1 MiB) behind the process's keys, with default settings."""
    ring = _C.Ring(1 << 20)
    keys.set_freshness("op")
    keys.configure(on_starved="stretch", max_stretch=2**16, timeout_s=60.0)
    keys.attach(ring)
    yield ring
    keys.detach()
    keys.set_freshness("op")
    keys.configure(on_starved="stretch", max_stretch=2**16, timeout_s=60.0)


def kind():
    return _C.Keyring.last_draw()[0]


def fresh_record():
    with torch.inference_mode():
        return keys.draw_record()


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
    assert (_rounds(np.concatenate([constants, key, tail]))[0] + constants[0])[0] == 0xE4E7F110


def test_records_match_reference_in_ring_order(ring):
    n = 1000
    supply = numbered_keys(n)
    nonces = nonce_bytes_of(5, n)
    ring.put(b"".join(supply))
    got = [keys.draw_record() for _ in range(n)]
    assert got == [r.astype("<u4").tobytes() for r in reference_records(b"".join(supply), b"".join(nonces))]
    counters = keys.counters()
    assert (counters["draws"], counters["fresh"], ring.unread) == (n, n, 0)


def test_labels_keep_ratchet_and_commitment_apart():
    key = bytes(range(32))
    assert _C.stretched_key(key) == hashlib.sha256(b"everett/1/stretch\0" + key).digest()
    assert _C.key_commitment(key) == hashlib.sha256(b"everett/1/commit\0" + key).digest()
    with pytest.raises(ValueError, match="32 bytes"):
        _C.stretched_key(key[:31])


# --- nonces -----------------------------------------------------------------------------------------------------------


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
    assert keys.can_go_direct(x)
    assert keys.can_go_direct(torch.nn.Parameter(x))
    assert keys.can_go_direct(x[::2])
    assert not keys.can_go_direct(torch.ones(3, device="meta"))
    assert not keys.can_go_direct(torch.ones(2, dtype=torch.complex64).conj())
    assert not keys.can_go_direct(torch.ones(2, dtype=torch.complex64).conj().imag)
    assert not keys.can_go_direct(torch.eye(2).to_sparse())
    assert not keys.can_go_direct(torch.nested.nested_tensor([x, x], layout=torch.jagged))
    with FakeTensorMode() as mode:
        assert not keys.can_go_direct(mode.from_tensor(x))

    class Passing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Passing():
        assert not keys.can_go_direct(x)
    seen = []
    torch.func.vmap(lambda row: (seen.append(keys.can_go_direct(row)), row)[1])(torch.ones(2, 3))
    torch.func.grad(lambda v: (seen.append(keys.can_go_direct(x)), v.sum())[1])(x)
    assert seen == [False, False]


def test_nonce_tensor_follows_vmap_randomness_and_fake_tensors(ring):
    from torch._subclasses import FakeTensorMode

    def f(_):
        return keys.nonce_tensor()

    rows = torch.ones(3, 1)
    with pytest.raises(RuntimeError, match="random"):
        torch.func.vmap(f, randomness="error")(rows)
    assert len({tuple(r.tolist()) for r in torch.func.vmap(f, randomness="different")(rows)}) == 3
    assert len({tuple(r.tolist()) for r in torch.func.vmap(f, randomness="same")(rows).expand(3, 2)}) == 1
    with FakeTensorMode():
        fake = keys.nonce_tensor()
    assert (fake.shape, fake.dtype) == ((2,), torch.int64)
    with pytest.raises(TypeError, match="FakeTensor"):
        keys.record_from_nonce(fake)


def test_compiled_nonces_differ_and_have_64_bits_a_word():
    drawn = torch.compile(lambda: torch.stack([keys.nonce_tensor() for _ in range(50)]), backend="aot_eager", fullgraph=True)
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
    with pytest.raises(EverettError, match="not from that of cuda"):
        keys.nonce_tensor("cuda")
    with pytest.raises(ValueError, match="no memory"):
        keys._keyring.draw(0, False)
    assert ring.unread == 32


# --- stretching and starvation ----------------------------------------------------------------------------------------


def test_stretched_keys_are_the_labelled_chain_and_a_fresh_key_replaces_it(ring):
    first, second = numbered_keys(2)
    nonces = nonce_bytes_of(11, 6)
    ring.put(first)
    got = [keys.draw_record() for _ in range(4)]
    ring.put(second)
    got += [keys.draw_record() for _ in range(2)]
    chain = [first, ratchet(first), ratchet(ratchet(first)), ratchet(ratchet(ratchet(first))), second, ratchet(second)]
    assert got == [reference_record(k, n) for k, n in zip(chain, nonces, strict=True)]
    counters = keys.counters()
    assert (counters["fresh"], counters["stretched"], counters["stretched_in_a_row"]) == (2, 4, 1)
    assert kind() == "stretched"


def test_stretching_stops_at_max_stretch_then_waits_then_starves(ring):
    keys.configure(max_stretch=3, timeout_s=0.05)
    ring.put(bytes(32))
    for _ in range(4):
        keys.draw_record()
    with pytest.raises(Starved, match=r"0\.05 s.*3 keys were stretched"):
        keys.draw_record()
    ring.put(bytes(range(32)))
    for _ in range(4):
        keys.draw_record()
    counters = keys.counters()
    assert (counters["fresh"], counters["stretched"], counters["waits"], counters["draws"]) == (2, 6, 1, 8)


@pytest.mark.parametrize("policy", ["stretch", "wait"])
def test_nothing_is_stretched_before_the_first_key(ring, policy):
    keys.configure(on_starved=policy, timeout_s=0.0)
    with pytest.raises(Starved, match="no fresh key arrived"):
        keys.draw_record()
    assert keys.counters()["draws"] == 0


def test_policy_error_raises_at_once_and_never_stretches(ring):
    keys.configure(on_starved="error", timeout_s=None)
    ring.put(bytes(32))
    keys.draw_record()
    with pytest.raises(Starved, match='on_starved="error"'):
        keys.draw_record()
    assert keys.counters()["waits"] == 0


def test_policy_wait_takes_the_key_that_arrives(ring):
    keys.configure(on_starved="wait", timeout_s=None)
    (key,) = numbered_keys(1)
    (nonce,) = nonce_bytes_of(2)

    def feed_when_waiting():
        while keys.counters()["waits"] == 0:
            time.sleep(0.002)
        ring.put(key)

    feeder = threading.Thread(target=feed_when_waiting)
    feeder.start()
    assert keys.draw_record() == reference_record(key, nonce)
    feeder.join()
    assert keys.counters()["waits"] == 1


def test_ctrl_c_ends_a_wait(ring):
    keys.configure(on_starved="wait", timeout_s=30.0)

    def interrupt_when_waiting():
        while keys.counters()["waits"] == 0:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt_when_waiting)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        keys.draw_record()
    thread.join()


@pytest.mark.parametrize(
    "reason, error", [("ended", SourceExhausted), ("failed", SourceError), ("alarm", HealthAlarm), ("closed", SourceError)]
)
def test_a_source_that_is_over_is_an_error_and_never_stretched(ring, reason, error):
    ring.put(bytes(32))
    torch.manual_seed(1)
    first = keys.draw_record()
    ring.end(getattr(_C.Take, reason))
    with pytest.raises(error):
        keys.draw_record()
    with pytest.raises(error):
        fresh_record()
    # What is on the tape hands out nothing new, so it is served on.
    torch.manual_seed(1)
    assert keys.draw_record() == first
    counters = keys.counters()
    assert (counters["fresh"], counters["stretched"], counters["reused"]) == (1, 0, 1)


def test_a_source_that_ends_while_a_draw_waits_raises(ring):
    keys.configure(on_starved="wait", timeout_s=None)

    def end_when_waiting():
        while keys.counters()["waits"] == 0:
            time.sleep(0.002)
        ring.end(_C.Take.alarm)

    thread = threading.Thread(target=end_when_waiting)
    thread.start()
    with pytest.raises(HealthAlarm):
        keys.draw_record()
    thread.join()


def test_the_sources_own_account_of_its_end_is_raised(ring):
    keys.attach(ring, explain=lambda reason: SourceExhausted(f"photon.bin: all 77 bytes used ({reason})"))
    ring.end(_C.Take.ended)
    with pytest.raises(SourceExhausted, match=r"all 77 bytes used \(ended\)"):
        keys.draw_record()


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


# --- the keyring: counts, eviction, threads, forks ----------------------------------------------------------------------


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


def _in_child(work):
    """Runs work() in a forked child; what it returned, as text."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)  # a lock that the parent held would never open here
        try:
            answer = work()
        except BaseException as e:
            answer = f"raised {type(e).__name__}: {e}"
        os.write(write, str(answer).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read().decode()
    os.waitpid(pid, 0)
    return answer


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
        assert "ForkedError" in _in_child(attempt)
    assert _in_child(lambda: (keys.step(), keys.counters()["fresh"])[1]) == "0"
    (nonce,) = nonce_bytes_of(1)
    assert _in_child(with_a_source_of_its_own) == reference_record(bytes(range(32)), nonce).hex()
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


# --- before a source, and the environment ---------------------------------------------------------------------------------


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
assert not _C.sha256_library().startswith("libcrypto")
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
