"""A source slower than the draws: the ratchet, its limit, waiting, errors; and a source that is over."""

import os
import signal
import threading
import time

import pytest
import torch
from key_reference import fresh_record, kind, nonce_bytes_of, numbered_keys, ratchet, reference_record

from everett_cuda import _C, keys
from everett_cuda.errors import HealthAlarm, SourceError, SourceExhausted, Starved


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
    "reason, error",
    [("ended", SourceExhausted), ("failed", SourceError), ("alarm", HealthAlarm), ("closed", SourceError)],
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
