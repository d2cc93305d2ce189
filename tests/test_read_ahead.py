"""The read-ahead: order, the dropped first read, checks before hand-out, halts, time-outs, closing, forks."""

import errno
import fcntl
import os
import stat
import termios
import threading
import time

import numpy as np
import pytest
from processes import in_forked_child
from source_checks import nothing_left, wait_until

from everett_cuda import _C

FIRST = 16


@pytest.fixture
def pipe():
    """(reading end, writing end); the test closes the writing end itself where that matters."""
    reading, writing = os.pipe()
    yield reading, writing
    for fd in (reading, writing):
        try:
            os.close(fd)
        except OSError:
            pass


def reader_of(fd, slot_bytes=512, slots=8, **more):
    return _C.ReadAhead(fd, slot_bytes=slot_bytes, slots=slots, first_read_bytes=FIRST, lock=False, **more)


def take(reader, n, timeout_s=5.0):
    """n bytes by as many takes as it needs."""
    out, at = bytearray(n), 0
    deadline = time.monotonic() + timeout_s
    while at < n:
        assert time.monotonic() < deadline
        at += reader.take_into(memoryview(out)[at:], 0.2)
    return bytes(out)


@pytest.mark.parametrize("slot_bytes, slots", [(512, 8), (1000, 2), (1, 16), (65536, 4)])
def test_bytes_come_in_order_after_the_first_read(pipe, slot_bytes, slots):
    data, rng = np.random.default_rng(3).bytes(200_000 if slot_bytes > 1 else 2000), np.random.default_rng(4)
    reading, writing = pipe
    os.write(writing, b"x" * FIRST)
    reader = reader_of(reading, slot_bytes, slots)
    sender = threading.Thread(target=lambda: [os.write(writing, data[i : i + 777]) for i in range(0, len(data), 777)])
    sender.start()
    at = 0
    while at < len(data):
        n = int(min(rng.integers(1, 3 * slot_bytes + 50), len(data) - at))
        assert take(reader, n) == data[at : at + n]
        at += n
    sender.join()
    assert reader.halted.why == _C.Halt.running and reader.close(5.0)


def test_the_first_read_is_dropped_however_short_it_is(pipe):
    reading, writing = pipe
    reader = reader_of(reading)
    os.write(writing, b"old")
    wait_until(lambda: fcntl.ioctl(reading, termios.FIONREAD, bytes(4)) == bytes(4))
    os.write(writing, b"new")
    assert take(reader, 3) == b"new"
    reader.close(5.0)


def test_a_take_answers_within_its_time_and_loses_nothing(pipe):
    reading, writing = pipe
    os.write(writing, bytes(FIRST))
    reader = reader_of(reading)
    buffer = bytearray(10)
    start = time.monotonic()
    assert reader.take_into(buffer, 0.0) == 0 and reader.take_into(buffer, 0.1) == 0
    assert time.monotonic() - start >= 0.1
    os.write(writing, b"abc")
    assert take(reader, 3) == b"abc"
    reader.close(5.0)


def test_at_most_all_slots_are_read_ahead(pipe):
    reading, writing = pipe
    os.write(writing, bytes(FIRST))
    reader = reader_of(reading, 16, 4)
    os.write(writing, bytes(range(200)))
    left = 200 - 64
    waiting = lambda: int.from_bytes(fcntl.ioctl(reading, termios.FIONREAD, bytes(4)), "little")  # noqa: E731
    wait_until(lambda: waiting() == left)
    time.sleep(0.05)
    assert waiting() == left
    assert take(reader, 200) == bytes(range(200))
    reader.close(5.0)


# --- checks: FIONREAD, a pipe's own ioctl that answers a word (the bytes that wait in it), stands for a device's status ---


def test_bytes_are_handed_out_when_the_check_after_them_is_well(pipe):
    reading, writing = pipe
    os.write(writing, bytes(FIRST))
    reader = reader_of(reading, 16, 4, checks=[(termios.FIONREAD, 1 << 31, 0)], check_bytes=48, check_s=3600.0)
    os.write(writing, bytes(range(32)))
    assert reader.take_into(bytearray(99), 0.2) == 0  # read, and not yet checked
    os.write(writing, bytes(range(32, 48)))
    assert take(reader, 48) == bytes(range(48))
    reader.close(5.0)


def test_checks_are_due_when_all_slots_are_full_and_after_their_time(pipe):
    reading, writing = pipe
    os.write(writing, bytes(FIRST))
    never = dict(checks=[(termios.FIONREAD, 1 << 31, 0)], check_bytes=1 << 30)
    reader = reader_of(reading, 16, 4, check_s=3600.0, **never)
    os.write(writing, bytes(range(64)))
    assert take(reader, 64) == bytes(range(64))
    assert reader.close(5.0)
    os.write(writing, bytes(FIRST))
    reader = reader_of(reading, 16, 4, check_s=0.0, **never)
    os.write(writing, bytes(16))
    assert take(reader, 16) == bytes(16)
    reader.close(5.0)


@pytest.mark.parametrize("care, expected, well", [(0xFF, 16, True), (0xFF, 17, False), (0xF, 0, True), (0x1F, 0, False)])
def test_a_deviating_answer_halts_and_destroys_what_was_read(pipe, care, expected, well):
    reading, writing = pipe
    os.write(writing, bytes(FIRST) + bytes(range(32)))  # 16 bytes are left when the first slot is checked
    good = (termios.FIONREAD, 1 << 31, 0)
    reader = reader_of(reading, 16, 1, checks=[good, (termios.FIONREAD, care, expected)])
    out = bytearray(16)
    if well:
        assert take(reader, 16) == bytes(range(16))
    else:
        wait_until(lambda: reader.halted.why != _C.Halt.running)
        halted = reader.halted
        assert (halted.why, halted.check, halted.answer) == (_C.Halt.deviation, 1, 16)
        assert reader.take_into(out, 0.0) == 0 and out == bytes(16)
    reader.close(5.0)


def test_a_check_that_is_not_answered_halts(pipe):
    reading, writing = pipe
    os.write(writing, bytes(FIRST + 16))
    reader = reader_of(reading, 16, 1, checks=[(0x80047108, 1, 1)])
    wait_until(lambda: reader.halted.why != _C.Halt.running)
    assert (reader.halted.why, reader.halted.code) == (_C.Halt.error, errno.ENOTTY)
    reader.close(5.0)


# --- ends ---


def test_the_end_halts_and_drops_what_was_not_taken(pipe):
    reading, writing = pipe
    os.write(writing, bytes(FIRST) + b"abc")
    reader = reader_of(reading)
    os.close(writing)
    wait_until(lambda: reader.halted.why == _C.Halt.end_of_file)
    assert reader.take_into(bytearray(3), 1.0) == 0
    assert reader.close(5.0)


def test_an_error_is_named_by_its_number(tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    reader = reader_of(folder)
    wait_until(lambda: reader.halted.why != _C.Halt.running)
    assert (reader.halted.why, reader.halted.code) == (_C.Halt.error, errno.EISDIR)
    reader.close(5.0)
    os.close(folder)


def test_close_wakes_a_take_and_gives_the_descriptor_back(pipe):
    reading, writing = pipe
    with nothing_left():
        reader = reader_of(reading)
        got = []
        taker = threading.Thread(target=lambda r: got.append(r.take_into(bytearray(3), 60.0)), args=(reader,))
        taker.start()
        time.sleep(0.05)
        assert reader.close(5.0) and reader.close(5.0)
        taker.join(5.0)
        assert got == [0] and reader.halted.why == _C.Halt.closed
        assert reader.take_into(bytearray(3), 0.0) == 0
        del reader, taker
    assert stat.S_ISFIFO(os.fstat(reading).st_mode)  # the caller's own descriptor stays open


def test_nothing_leaks_over_many_readers(pipe):
    reading, writing = pipe
    with nothing_left():
        tasks = len(os.listdir("/proc/self/task"))
        for k in range(200):
            os.write(writing, bytes(FIRST) + b"abc")
            reader = reader_of(reading)
            assert take(reader, 3) == b"abc"
            if k % 2:
                assert reader.close(5.0)
            del reader
        wait_until(lambda: len(os.listdir("/proc/self/task")) <= tasks)


def test_a_forked_child_takes_nothing(pipe):
    reading, writing = pipe
    os.write(writing, bytes(FIRST) + b"secret")
    reader = reader_of(reading)
    wait_until(lambda: fcntl.ioctl(reading, termios.FIONREAD, bytes(4)) == bytes(4))

    def child():
        out = bytearray(6)
        answer = reader.take_into(out, 0.0), bytes(out), reader.halted.why == _C.Halt.closed, reader.close(1.0)
        return answer

    assert in_forked_child(child) == str((0, bytes(6), True, True))
    assert take(reader, 6) == b"secret"
    reader.close(5.0)


def test_arguments_are_checked(pipe):
    for plan in ({"slot_bytes": 0, "slots": 1}, {"slot_bytes": 1, "slots": 0}):
        with pytest.raises(ValueError, match="at least one slot"):
            _C.ReadAhead(pipe[0], first_read_bytes=1, **plan)
    for first in (0, 17):  # more than the slots hold
        with pytest.raises(ValueError, match="the first read takes"):
            _C.ReadAhead(pipe[0], slot_bytes=4, slots=4, first_read_bytes=first)
    with pytest.raises(RuntimeError, match="descriptor"):
        _C.ReadAhead(-1, slot_bytes=4, slots=4, first_read_bytes=1)
    reader = reader_of(pipe[0])
    for timeout_s in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="timeout_s"):
            reader.take_into(bytearray(3), timeout_s)
    with pytest.raises(ValueError, match="contiguous"):
        reader.take_into(memoryview(bytearray(6))[::2], 0.0)
    reader.close(5.0)
