"""Ring: at most once, all or nothing, zeroed behind, answers after every end, many threads, forks, Ctrl-C."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from processes import in_forked_child

from everett_cuda import _C

Take = _C.Take


def take(ring, n, timeout_s=0.0):
    out = bytearray(b"\xee" * n)
    answer = ring.take_into(out, timeout_s)
    return answer, bytes(out)


def test_bytes_come_out_in_order_once_and_are_zeroed():
    ring = _C.Ring(4096)
    data = os.urandom(4096)
    assert ring.put(data)
    got = b"".join(take(ring, n)[1] for n in (1, 31, 64, 1000, 3000))
    assert got == data
    assert ring.unread == 0 and ring.all_zero()
    assert take(ring, 1) == (Take.empty, b"\xee")
    assert (ring.bytes_in, ring.bytes_out, ring.bytes_destroyed) == (4096, 4096, 0)


def test_takes_across_the_edge_at_every_place():
    for start in range(4096 - 33, 4097):
        ring = _C.Ring(4096)
        ring.put(bytes(start))
        assert ring.discard(start, 0) == start
        data = os.urandom(64)
        ring.put(data)
        assert take(ring, 33) == (Take.ok, data[:33])
        assert take(ring, 31) == (Take.ok, data[33:])
        assert ring.all_zero()


def test_a_take_is_all_or_nothing():
    ring = _C.Ring(64)
    ring.put(b"x" * 10)
    assert take(ring, 11) == (Take.empty, b"\xee" * 11)
    assert take(ring, 11, 0.05) == (Take.empty, b"\xee" * 11)
    assert take(ring, 10) == (Take.ok, b"x" * 10)


def test_bad_sizes_are_refused():
    for capacity in (0, 3, 4095):
        with pytest.raises(ValueError, match="power of two"):
            _C.Ring(capacity)
    with pytest.raises(ValueError, match="more bytes"):
        take(_C.Ring(64), 65)
    with pytest.raises(ValueError, match="not a number"):
        take(_C.Ring(64), 1, float("nan"))
    with pytest.raises((BufferError, ValueError, TypeError)):
        _C.Ring(64).take_into(b"read-only")


def test_a_full_ring_makes_the_producer_wait():
    ring = _C.Ring(1024)
    data = os.urandom(10_000)
    producer = threading.Thread(target=ring.put, args=(data,))
    producer.start()
    got = b"".join(take(ring, 100, 5.0)[1] for _ in range(100))
    producer.join(5)
    assert not producer.is_alive() and got == data and ring.all_zero()


def test_reader_of_a_whole_ring_and_a_sleeping_producer_do_not_wait_for_each_other():
    # The producer found the ring full and sleeps until a quarter is free; the reader wants all of it.
    ring = _C.Ring(1024)
    data = os.urandom(3000)
    producer = threading.Thread(target=ring.put, args=(data,))
    producer.start()
    while ring.unread < 1024:
        time.sleep(0.001)
    assert take(ring, 32) == (Take.ok, data[:32])
    assert take(ring, 1024, 5.0) == (Take.ok, data[32:1056])
    assert take(ring, 1024, 5.0) == (Take.ok, data[1056:2080])
    producer.join(5)
    assert not producer.is_alive()


def test_bytes_that_arrive_at_the_deadline_are_taken_once():
    # A take that times out looks once more; it must not take twice.
    ring = _C.Ring(64)
    got, stop = [], threading.Event()

    def consume():
        while not stop.is_set() or ring.unread:
            answer, data = take(ring, 8, 0.001)
            if answer == Take.ok:
                got.append(int.from_bytes(data, "little"))

    consumers = [threading.Thread(target=consume) for _ in range(2)]
    for c in consumers:
        c.start()
    for i in range(1, 1500):
        ring.put(i.to_bytes(8, "little"))
        if i % 3 == 0:
            time.sleep(0.0009)
    stop.set()
    for c in consumers:
        c.join(10)
    assert sorted(got) == list(range(1, 1500))
    assert ring.bytes_out == 8 * 1499


def test_many_threads_never_get_a_byte_twice():
    ring = _C.Ring(1 << 14)
    words = 300_000
    numbers = np.arange(1, words + 1, dtype="<u8")
    got = [[] for _ in range(8)]

    def consume(k):
        rng = np.random.default_rng(k)
        while True:
            n = int(rng.integers(1, 60))
            out = np.zeros(n, dtype="<u8")
            answer = ring.take_into(out.view(np.uint8), 0.01 if k % 2 else -1.0)
            if answer == Take.ok:
                got[k].append(out)
            elif answer != Take.empty:
                return

    threads = [threading.Thread(target=consume, args=(k,)) for k in range(8)]
    for t in threads:
        t.start()
    data, at = numbers.view(np.uint8), 0
    rng = np.random.default_rng(99)
    while at < len(data):
        n = int(rng.integers(1, 3000))
        assert ring.put(data[at : at + n])
        at += n
    ring.end(Take.ended)
    for t in threads:
        t.join(20)
        assert not t.is_alive()
    taken = np.concatenate([w for lists in got for w in lists])
    left = ring.unread // 8
    assert len(np.unique(taken)) == len(taken) == words - left
    for lists in got:  # each consumer sees the order of the ring
        assert (np.diff(np.concatenate(lists).astype(np.int64)) > 0).all()
    rest = np.zeros(left, dtype="<u8")
    assert left == 0 or ring.take_into(rest.view(np.uint8), 0) == Take.ok
    assert set(rest.tolist()) | set(taken.tolist()) == set(numbers.tolist())
    assert ring.all_zero()


@pytest.mark.parametrize("why", [Take.ended, Take.failed])
def test_what_is_left_at_the_end_can_still_be_taken(why):
    ring = _C.Ring(64)
    ring.put(b"0123456789")
    ring.end(why)
    assert not ring.put(b"more")
    assert take(ring, 11)[0] == why
    assert take(ring, 10) == (Take.ok, b"0123456789")
    assert take(ring, 1, -1)[0] == why


@pytest.mark.parametrize("why", [Take.alarm, Take.closed])
def test_nothing_is_handed_out_after_an_alarm_or_a_close(why):
    ring = _C.Ring(64)
    ring.put(b"0123456789")
    ring.end(why)
    assert take(ring, 1) == (why, b"\xee")
    assert ring.destroy_unread() == 10
    assert ring.all_zero() and ring.bytes_destroyed == 10 and ring.bytes_out == 0


def test_a_weaker_end_does_not_hide_a_stronger_one():
    ring = _C.Ring(64)
    for why, answer in ((Take.ended, Take.ended), (Take.alarm, Take.alarm), (Take.failed, Take.alarm),
                        (Take.closed, Take.closed), (Take.alarm, Take.closed)):  # fmt: skip
        ring.end(why)
        assert take(ring, 1)[0] == answer


def test_reopen_starts_over_except_after_a_close():
    ring = _C.Ring(64)
    ring.put(b"old")
    ring.end(Take.alarm)
    assert ring.reopen()
    assert take(ring, 1)[0] == Take.empty and ring.bytes_destroyed == 3
    ring.put(b"new")
    assert take(ring, 3) == (Take.ok, b"new")
    ring.end(Take.closed)
    assert not ring.reopen() and take(ring, 1)[0] == Take.closed


@pytest.mark.parametrize("why", [Take.ended, Take.failed, Take.alarm, Take.closed])
def test_an_end_wakes_readers_and_the_producer(why):
    empty, full = _C.Ring(64), _C.Ring(64)
    full.put(bytes(64))
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(take(empty, 8, -1)[0])) for _ in range(3)]
    threads.append(threading.Thread(target=lambda: answers.append(full.put(b"x"))))
    for t in threads:
        t.start()
    time.sleep(0.05)
    empty.end(why)
    full.end(why)
    for t in threads:
        t.join(5)
        assert not t.is_alive()
    assert sorted(map(str, answers)) == sorted(map(str, [why, why, why, False]))


def test_destroying_makes_room_for_a_waiting_producer():
    ring = _C.Ring(64)
    producer = threading.Thread(target=ring.put, args=(b"a" * 64 + b"b" * 64,))
    producer.start()
    while ring.unread < 64:
        time.sleep(0.001)
    assert ring.destroy_unread() == 64
    producer.join(5)
    assert not producer.is_alive() and take(ring, 64) == (Take.ok, b"b" * 64)


# --- forks ---


def test_a_forked_child_gets_nothing_and_sees_no_bytes():
    ring = _C.Ring(4096)
    ring.put(os.urandom(1000))
    assert not ring.all_zero()
    assert in_forked_child(lambda: (take(ring, 8), ring.all_zero(), ring.unread, ring.put(b"x"), ring.destroy_unread())) == str(
        ((Take.forked, b"\xee" * 8), True, 0, False, 0)
    )
    assert ring.unread == 1000 and take(ring, 8)[0] == Take.ok


def test_a_child_may_drop_a_ring_that_its_parent_waits_on():
    # Destroying a condition variable waits for its waiters, and those are threads that the child does not have.
    rings = [_C.Ring(64)]
    waiter = threading.Thread(target=take, args=(rings[0], 8, -1))
    waiter.start()
    time.sleep(0.05)

    def drop():
        rings.clear()
        return gc.collect() >= 0

    assert in_forked_child(drop) == "True"
    rings[0].end(Take.closed)
    waiter.join(5)
    assert not waiter.is_alive()


# --- Ctrl-C ---


def test_ctrl_c_ends_a_wait():
    code = (
        "from everett_cuda import _C\n"
        "print('waiting', flush=True)\n"
        "try:\n"
        "    _C.Ring(64).take_into(bytearray(8), -1)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "waiting\n"
    time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=20)
    assert (out, child.returncode) == ("interrupted\n", 0)
