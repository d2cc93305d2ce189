"""Source: from a URI to bits and back to nothing; alarms, exhaustion, unplugging, forks, threads, and honest words."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time

import alarm_inputs
import numpy as np
import pytest
from alarm_inputs import good_bytes
from processes import in_forked_child
from source_checks import wait_until

from everett_cuda import _C, source
from everett_cuda.drivers import DeviceFault, DeviceLost, Driver, MinEntropy, TransportError
from everett_cuda.errors import (
    BadParameter,
    ForkedError,
    HealthAlarm,
    SourceError,
    SourceExhausted,
    StartupTestFailed,
    Starved,
    UnknownScheme,
)
from everett_cuda.reference import health as reference
from everett_cuda.source import Source

N = 80


def hashes(raw, start=0, n=N):
    return b"".join(hashlib.sha256(raw[i : i + n]).digest() for i in range(start, len(raw) - n + 1, n))


def take_all(opened, piece=32):
    """Everything until the source ends, and the exception that ended it."""
    out = b""
    try:
        while True:
            out += opened.take(piece, timeout_s=20)
    except (SourceError, HealthAlarm) as error:
        return out, error


def pumps():
    return [t for t in threading.enumerate() if t.name.startswith("everett pump")]


@pytest.fixture(autouse=True)
def nothing_left_running():
    yield
    assert pumps() == []


@pytest.fixture
def recording(tmp_path):
    def write(data, name="r.bin"):
        (tmp_path / name).write_bytes(bytes(data))
        return f"replay:{tmp_path / name}"

    return write


class Scripted(Driver):
    """A device that gives a script's pieces: bytes, or an exception to raise; `back`: those after a reconnection."""

    scheme = "scripted"
    kind = "quantum"
    name = "scripted device"
    serial = "S1"

    def __init__(self, *script, back=None):
        self.script, self.back, self.closed, self.told = list(script), back, 0, 0

    open = classmethod(lambda cls, uri: cls())

    def readinto(self, buffer, timeout_s):
        if not self.script:
            time.sleep(min(timeout_s, 0.01))
            return 0
        if isinstance(self.script[0], Exception):
            raise self.script.pop(0)
        n = min(len(buffer), len(self.script[0]))
        buffer[:n] = bytes(self.script[0][:n])
        self.script[0] = self.script[0][n:]
        if not len(self.script[0]):
            self.script.pop(0)
        return n

    def reconnect(self, timeout_s):
        if self.back is None:
            super().reconnect(timeout_s)
        self.script, self.back = self.back, None

    def startup_passed(self):
        self.told += 1

    def close(self):
        self.closed += 1


def scripted(*script, uri="scripted:", **more):
    driver = Scripted(*script, **more)
    return driver, lambda: Source(uri, lambda: driver)


# --- bits ---


def test_bits_are_the_hashes_of_the_recording(recording):
    raw = good_bytes(1 << 20).tobytes()
    with Source.open(recording(raw)) as opened:
        out, error = take_all(opened, 4096)
        out += opened.take(opened.ring.unread)
        assert isinstance(error, SourceExhausted)
        status = opened.status()
    blocks = (2048 - 1) * 512 // N
    assert out == hashes(raw)[: 32 * blocks]
    assert status.raw_bytes_in == len(raw) == status.raw_bytes_held_back + N * blocks
    assert status.conditioned_bytes_out == status.bytes_handed_out == 32 * blocks
    assert (status.state, status.health, status.raw_bytes_dropped) == ("exhausted", "ok", 0)


def test_direct_words_are_the_same_bits(recording):
    raw = good_bytes(100_000).tobytes()
    with Source.open(recording(raw)) as opened:
        words = opened.direct_words(100)
        assert words.dtype == np.uint64 and words.shape == (100,)
        assert words.tobytes() + opened.take(100) == hashes(raw)[:900]
        assert opened.direct_words(0).shape == (0,) and opened.take(0) == b""


def test_takes_larger_than_the_ring_come_in_pieces(recording):
    raw = good_bytes(1 << 20).tobytes()
    with Source.open(recording(raw), ring_bytes=16384) as opened:
        assert opened.take(100_000) == hashes(raw)[:100_000]
        with pytest.raises(SourceExhausted):
            opened.take(1 << 20)
        assert opened.ring.all_zero() or opened.ring.unread


def test_hashlib_serves_where_no_libcrypto_opens(recording, monkeypatch):
    raw = good_bytes(200_000).tobytes()
    monkeypatch.setattr(_C, "sha256_library", lambda: "")
    with Source.open(recording(raw)) as opened:
        assert opened.take(50_000) == hashes(raw)[:50_000]
        assert opened.status().conditioner == "SHA-256, hashlib (slow)"
        assert "hashlib (slow)" in str(opened.status())


def test_claims_set_block_and_cutoffs(recording):
    raw = good_bytes(100_000).tobytes()
    with Source.open(recording(raw) + "?h=8") as opened:
        assert opened.take(3200) == hashes(raw, n=40)[:3200]
        status = opened.status()
        assert (status.min_entropy, status.min_entropy_origin) == (8.0, "claimed by user")
        assert status.raw_bytes_per_block == 40
    with pytest.raises(SourceError, match="claimed entropy too low to be tested"):
        Source.open(recording(raw) + "?h=0.51")


def test_unconditioned_bits_need_a_source_that_declares_full_entropy(recording):
    raw = good_bytes(100_000).tobytes()
    with pytest.raises(SourceError, match="condition=none is for a source that declares full entropy"):
        Source.open(recording(raw) + "?condition=none")
    driver, connect = scripted(raw, uri="scripted:?condition=none")
    driver.full_entropy, driver.min_entropy = True, MinEntropy(8, "certified, X-1")
    with connect() as opened:
        assert opened.take(5000) == raw[:5000]
        assert opened.status().conditioner.startswith("none")
        assert "8 bits a raw byte (certified, X-1)" in str(opened.status())


def test_metered_sources_start_with_fewer_bytes_and_keep_fewer_unread():
    driver, connect = scripted(good_bytes(1024))
    driver.metered = True
    with connect() as opened:
        assert opened.status().state == "flowing" and opened.take(32)
        assert opened.ring.capacity == 16384
    with scripted(good_bytes(8192))[1]() as opened:
        assert opened.ring.capacity == 1 << 20


@pytest.mark.parametrize("name", ["humboldt-photon-1MiB.bin", "ibm-fez-raw-48kB.bin"])
def test_recorded_quantum_bits_flow_without_alarm(shared_data, name):
    path = shared_data / "quantum" / name
    raw = path.read_bytes()
    with Source.open(f"replay:{path}") as opened:
        out, error = take_all(opened)
        assert isinstance(error, SourceExhausted) and opened.status().alarms == ()
    assert out == hashes(raw)[: 32 * ((len(raw) // 512 - 1) * 512 // N)]


def test_biased_recording_fails_its_startup_test(shared_data):
    with pytest.raises(StartupTestFailed, match="adaptive proportion .* reached cutoff .* nothing was handed out"):
        Source.open(f"replay:{shared_data / 'sp800_90b' / 'biased-random-bytes.bin'}")


# --- ends ---


def test_exhaustion_says_how_many_bytes_were_used(recording):
    with Source.open(recording(good_bytes(10_000))) as opened:
        out, error = take_all(opened)
        assert len(out) == 18 * 512 // N * 32
        text = str(error)
        assert "10000 bytes used" in text and f"last {10_000 - 18 * 512 // N * N}" in text and "loop=1" in text
        with pytest.raises(SourceExhausted):
            opened.take(1)


@pytest.mark.parametrize("n", [1, 511, 4095])
def test_too_short_recordings_are_exhausted_in_the_startup_test(recording, n):
    with pytest.raises(SourceExhausted, match=f"{n} bytes used, and the test takes 4096"):
        Source.open(recording(good_bytes(n)))


def test_loops_only_by_request_are_shown_and_are_no_duplicates(recording):
    raw = good_bytes(20_000).tobytes()
    with Source.open(recording(raw) + "?loop=1") as opened:
        out = opened.take(200_000)
        status = opened.status()
    assert out == hashes(raw * 30)[:200_000]
    assert status.loop and status.passes >= 20 and status.alarms == ()
    assert status.label == "NOT QUANTUM NOW (recorded), REPEATS (loop=1)"
    assert "loop=1, begun again" in str(status)


def test_repeats_inside_a_looped_recording_still_alarm(recording):
    case = alarm_inputs.duplicate_unit(n=20_480)
    with Source.open(recording(case.raw) + "?loop=1") as opened:
        out, error = take_all(opened)
    assert isinstance(error, HealthAlarm) and "duplicate unit" in str(error)
    assert opened.status().alarms[0].offset == case.offset


def test_closing_wakes_a_waiting_take():
    _, connect = scripted(good_bytes(4096))
    opened = connect()
    errors = []

    def wait():
        try:
            opened.take(8192)
        except SourceError as error:
            errors.append(str(error))

    waiters = [threading.Thread(target=wait) for _ in range(3)]
    for w in waiters:
        w.start()
    time.sleep(0.05)
    opened.close()
    for w in waiters:
        w.join(5)
        assert not w.is_alive()
    assert errors == ["scripted: is closed; open it again"] * 3


def test_close_destroys_and_may_be_called_twice():
    driver, connect = scripted(good_bytes(40_960))
    opened = connect()
    opened.take(64)
    opened.close()
    opened.close()
    status = opened.status()
    assert status.state == "closed" and driver.closed == 1
    assert opened.ring.all_zero() and status.bytes_destroyed == status.conditioned_bytes_out - 64
    for draw in (lambda: opened.take(1), lambda: opened.direct_words(1), opened.reopen):
        with pytest.raises(SourceError, match="closed; open it again"):
            draw()


def held():
    """Open files and threads of this process."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def assert_held(expected):
    """A joined thread may take a moment more to leave the kernel's list."""
    deadline = time.monotonic() + 10
    while held() != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    assert held() == expected


def test_fifty_cycles_leave_no_thread_and_no_file(recording):
    uris = [recording(good_bytes(50_000)), "sim:seed=1", "sim:rate=10MB/s"]
    before = held()
    for k in range(50):
        with Source.open(uris[k % 3]) as opened:
            opened.take(100)
    assert_held(before)


def test_failed_openings_leave_nothing_running(recording, machine):
    before = held()
    for uri, error in (
        ("sim:fault=stuck@0", StartupTestFailed),
        ("sim:fault=unplug@100", SourceError),
        (recording(b"x" * 10), SourceExhausted),
        (recording(b""), SourceExhausted),
        ("replay:/no/such/file", SourceError),
        ("nothing:", UnknownScheme),
        ("sim:seed=x", BadParameter),
        ("auto", SourceError),
    ):
        with pytest.raises(error):
            Source.open(uri)
    with pytest.raises(ValueError, match="power of two"):
        Source.open("sim:", ring_bytes=20_000)
    assert_held(before)


# --- alarms ---


@pytest.mark.parametrize("make_input", alarm_inputs.ALL, ids=lambda f: f.__name__)
def test_each_alarm_is_named_at_its_offset_and_nothing_unproven_left(recording, make_input):
    case = make_input(n=16_384)
    with Source.open(recording(case.raw)) as opened:
        out, error = take_all(opened)
        status = opened.status()
    (alarm,) = status.alarms
    assert (alarm.test, alarm.offset, alarm.permanent) == (case.test, case.offset, False)
    assert {k: v for k, v in status.alarm_counts.items() if v} == {case.test: 1}
    unit = case.offset // 512 * 512
    before, after = hashes(case.raw[: unit - 512]), hashes(case.raw, unit + 512)
    blocks = [out[i : i + 32] for i in range(0, len(out), 32)]
    allowed = {h[i : i + 32] for h in (before, after) for i in range(0, len(h), 32)}
    assert set(blocks) <= allowed and len(blocks) > 0
    assert isinstance(error, SourceExhausted)  # transient: the flow resumed
    assert status.transient_alarms == 1 and "1 alarm since open" in status.health and case.test in status.health


def test_permanent_alarm_stops_all_draws_until_reopened():
    with Source.open("sim:seed=7,fault=stuck@100001") as opened:
        out, error = take_all(opened)
        assert isinstance(error, HealthAlarm) and not isinstance(error, StartupTestFailed)
        assert "repetition count (bits) 121 reached cutoff 121 at byte" in str(error)
        assert "on sim:seed=7,fault=stuck@100001" in str(error) and "then reopen the source" in str(error)
        good = np.random.Philox(key=7).random_raw(100_352 // 8).tobytes()
        assert hashes(good[: 100_001 // 512 * 512 - 512]).startswith(out)
        with pytest.raises(HealthAlarm):
            opened.direct_words(1)
        status = opened.status()
        assert status.state == "alarm" and status.health.startswith("PERMANENT ALARM: repetition")
        first, second = status.alarms
        expected = reference.first_alarm(good[:100_001] + bytes(351), alarm_inputs.CUTOFFS)
        assert (first.test, first.offset, first.value, first.cutoff) == expected
        assert (first.permanent, second.startup, second.permanent) == (False, True, True)

        with pytest.raises(StartupTestFailed):  # it goes on where it stopped, and it is still stuck there
            opened.reopen()
        assert opened.status().state == "alarm" and len(opened.status().alarms) == 3


def test_reopening_a_source_that_is_still_bad_fails_and_can_be_tried_again():
    good, other, bad = good_bytes(8192), good_bytes(8192, 2), bytes(8192)
    drivers = [Scripted(good, bad), Scripted(bad), Scripted(good), Scripted(other)]
    opened = Source("scripted:", lambda: drivers.pop(0))
    take_all(opened)
    # The second answer repeats what the device gave before it was reopened: a real device may not.
    for message in ("repetition count", "duplicate unit"):
        with pytest.raises(StartupTestFailed, match=f"{message}.* in the start-up test"):
            opened.reopen()
        with pytest.raises(HealthAlarm):
            opened.take(1)
    ring = opened.ring
    opened.reopen()
    assert opened.ring is ring and opened.status().state == "flowing"
    assert opened.take(320) == hashes(other.tobytes())[:320]
    with pytest.raises(SourceError, match="nothing to reopen"):
        opened.reopen()
    opened.close()


def test_a_reopened_recording_goes_on_and_never_repeats(recording):
    raw = good_bytes(9 << 20)
    raw[100_000:110_000] = 0  # an alarm, and a failed start-up test after it
    with Source.open(recording(raw)) as opened:
        first, error = take_all(opened)
        assert isinstance(error, HealthAlarm)
        opened.reopen()
        second, error = take_all(opened)
        assert isinstance(error, SourceExhausted)
        used = opened.status().raw_bytes_in
        with pytest.raises(SourceExhausted, match="exhausted in the start-up test"):
            opened.reopen()
        assert opened.status().state == "exhausted" and opened.status().raw_bytes_in == used
    assert used == len(raw)
    # After the reads of 4 MiB that were given up, uncut: one, or two where the next was under way.
    starts = (4096 + (4 << 20), 4096 + (8 << 20))
    expected = [hashes(raw.tobytes()[: start + ((len(raw) - start) // 512 - 1) * 512], start) for start in starts]
    assert second in expected and hashes(raw.tobytes()[:99_840]).startswith(first)


def test_tiny_recordings_may_loop(recording):
    raw = good_bytes(1024).tobytes()
    with Source.open(recording(raw) + "?loop=1") as opened:
        assert opened.take(3200) == hashes(raw * 10)[:3200]


def test_reopening_refuses_another_device():
    first, other = Scripted(good_bytes(8192), bytes(8192)), Scripted(good_bytes(8192))
    other.serial = "S2"
    drivers = [first, other]
    opened = Source("scripted:", lambda: drivers.pop(0))
    take_all(opened)
    with pytest.raises(SourceError, match="another device now: S2, not S1"):
        opened.reopen()
    opened.close()
    assert first.closed == 1 and other.closed == 1


def test_device_fault_is_an_alarm():
    fault = DeviceFault("a module is missing", 0b0111, 0b1111)
    driver, connect = scripted(good_bytes(8192), fault, good_bytes(8192, 2), fault)
    with connect() as opened:
        out, error = take_all(opened)
        assert isinstance(error, HealthAlarm)
        assert "device status 0x7 instead of 0xf at byte 16384: a module is missing on scripted:" in str(error)
        assert [a.permanent for a in opened.status().alarms] == [False, True]
    with pytest.raises(StartupTestFailed, match="device status"):
        scripted(DeviceFault("dead", 0, 1))[1]()


# --- transport ---


def test_short_reads_lose_their_data_and_restart_the_startup_test():
    with Source.open("sim:seed=3,fault=short@50000") as opened:
        out = opened.take(100_000)
        status = opened.status()
    raw = np.random.Philox(key=3).random_raw(1 << 17).tobytes()
    before = hashes(raw[: (50_000 // 512 - 1) * 512])
    assert out[: len(before)] == before
    assert out[len(before) :] == hashes(raw, 50_512)[: 100_000 - len(before)]
    assert status.transport_errors == 1 and status.alarms == () and status.health == "ok"


def test_unplugged_for_good_gives_what_is_proven_then_says_so():
    with Source.open("sim:seed=3,fault=unplug@50001") as opened:
        out, error = take_all(opened)
        assert isinstance(error, SourceError) and not isinstance(error, SourceExhausted)
        assert "unplugged at byte 50001" in str(error) and "open the source anew" in str(error)
        assert opened.status().state == "failed"
    raw = np.random.Philox(key=3).random_raw(8192).tobytes()
    assert out == hashes(raw[: (50_001 // 512 - 1) * 512])


def test_a_device_that_comes_back_starts_with_its_startup_test():
    first, second = good_bytes(20_000), good_bytes(20_000, 2)
    _, connect = scripted(first, DeviceLost("gone"), back=[second])
    with connect() as opened:
        before = hashes(first.tobytes()[: 38 * 512])
        assert opened.take(len(before), timeout_s=10) == before
        assert opened.take(3200, timeout_s=10) == hashes(second.tobytes())[:3200]
        assert opened.status().transport_errors == 1


def test_a_device_is_told_each_time_the_startup_test_has_passed():
    driver, connect = scripted(good_bytes(8192), back=[good_bytes(8192, 4)])
    interruptions = (TransportError("short"), DeviceFault("self-test", 1, 0), DeviceLost("gone"))
    with connect() as opened:
        for told, interruption in enumerate(interruptions, 1):
            assert driver.told == told
            driver.script += [interruption, good_bytes(8192, told + 5)]  # a reconnection brings a script of its own
            wait_until(lambda: driver.told > told)  # noqa: B023
        assert opened.status().transport_errors == 2


class Away(Scripted):
    """A device that is lost and looked for without end."""

    details = {"firmware": "3"}

    def reconnect(self, timeout_s):
        time.sleep(timeout_s)
        raise DeviceLost("still away")


def test_a_lost_device_is_looked_for_until_patience_ends_or_the_source_is_closed(monkeypatch):
    opened = Source("away:", lambda: Away(good_bytes(8192), DeviceLost("gone")))
    wait_until(lambda: opened.status().transport_errors == 1)
    assert opened.status().device == {"firmware": "3"} and "firmware 3" in str(opened.status())
    opened.close()  # hangs if the search cannot be broken off
    assert opened.status().state == "closed"
    monkeypatch.setattr(source, "PATIENCE_S", 0.1)
    with Source("away:", lambda: Away(good_bytes(8192), DeviceLost("gone"))) as opened:
        error = take_all(opened)[1]
        assert isinstance(error, SourceError) and "gone; waited 0.1 s for it: still away" in str(error)


def test_a_device_that_only_gives_errors_is_given_up(monkeypatch):
    monkeypatch.setattr(source, "PATIENCE_S", 0.2)
    _, connect = scripted(good_bytes(8192), *[TransportError("noise on the line") for _ in range(100)])
    with connect() as opened:
        assert "noise on the line" in str(take_all(opened)[1])


def test_a_silent_device_is_given_up(monkeypatch):
    monkeypatch.setattr(source, "PATIENCE_S", 0.2)
    _, connect = scripted(good_bytes(8192))
    with connect() as opened:
        assert "gave no bytes for 0.2 s" in str(take_all(opened)[1])
    monkeypatch.setattr(source, "PATIENCE_AT_OPEN_S", 0.1)
    with pytest.raises(SourceError, match="gave no bytes for 0.1 s in the start-up test"):
        scripted(good_bytes(100))[1]()


def test_an_unexpected_error_of_a_driver_ends_the_source_with_its_text():
    _, connect = scripted(good_bytes(8192), ZeroDivisionError("bug in a driver"))
    with connect() as opened:
        error = take_all(opened)[1]
        assert isinstance(error, SourceError) and "bug in a driver" in str(error)


def test_a_transport_error_inside_the_startup_test_begins_it_again():
    good = good_bytes(8192, 4)
    _, connect = scripted(good_bytes(2000), TransportError("short"), good)
    with connect() as opened:
        assert opened.take(320) == hashes(good.tobytes())[:320]


def test_a_slow_source_starves_a_take_with_a_timeout():
    with Source.open("sim:seed=1,fault=slow@8192") as opened:
        opened.take(2816)
        with pytest.raises(Starved, match=r"gave no 65536 bytes within 0.1 s \(\d+ are there"):
            opened.take(65536, timeout_s=0.1)
        assert len(opened.take(64, timeout_s=20)) == 64
        for wrong in (-1, float("nan")):
            with pytest.raises(ValueError, match="timeout_s"):
                opened.take(1, timeout_s=wrong)


# --- words ---


@pytest.mark.parametrize(
    "kind, words",
    [("quantum", "quantum"), ("quantum-remote", "quantum, remote (the provider knows these bits)"),
     ("electronic", "NOT QUANTUM (electronic)"), ("recorded", "NOT QUANTUM NOW (recorded)"),
     ("simulated", "NOT QUANTUM (simulated)")],
)  # fmt: skip
def test_only_quantum_bits_are_called_quantum(kind, words):
    driver, connect = scripted(good_bytes(8192))
    driver.kind = kind
    with connect() as opened:
        assert opened.status().label == words
        assert f"kind:         {words}\n" in str(opened.status())


def test_status_says_what_matters():
    driver, connect = scripted(good_bytes(8192))
    driver.conditioned = True
    with connect() as opened:
        text = str(opened.status())
    for part in ("scripted device, serial S1", "4 bits a raw byte (assumed)", "80 raw bytes to 32", "locked: ",
                 "health:       ok; total-failure only (device output is conditioned)"):  # fmt: skip
        assert part in text


# --- forks, Ctrl-C, exit ---


def test_a_forked_child_is_refused_and_the_parent_goes_on():
    with Source.open("sim:seed=5") as opened:
        first = opened.take(32)

        def child():
            answers = []
            for use in (lambda: opened.take(8), lambda: opened.direct_words(1), opened.status, opened.reopen):
                try:
                    use()
                    answers.append("no error")
                except ForkedError as error:
                    answers.append("opened by the parent" in str(error))
            opened.close()  # does nothing: the device is the parent's
            with Source.open("sim:seed=6") as own:
                answers.append(len(own.take(32)))
            return answers

        assert in_forked_child(child) == "[True, True, True, True, 32]"
        raw = np.random.Philox(key=5).random_raw(4096).tobytes()
        assert first + opened.take(32) == hashes(raw)[:64]


def test_a_forked_child_of_a_waiting_parent_exits_cleanly():
    code = """
import os, sys, threading, time
from everett_cuda.source import Source
opened = Source.open("sim:fault=slow@4096")
threading.Thread(target=lambda: opened.take(60000, timeout_s=3), daemon=True).start()
time.sleep(0.1)
child = os.fork()
if child == 0:
    sys.exit(7)   # with atexit handlers and destructors
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "7\n", done.stderr


def test_ctrl_c_ends_a_take_and_the_interpreter_exits():
    code = """
from everett_cuda.source import Source
opened = Source.open("sim:fault=slow@4096")
print("waiting", flush=True)
try:
    opened.take(1 << 20)
except KeyboardInterrupt:
    print("interrupted", len(opened.take(32)))
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "waiting\n"
    time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=30)
    assert (out, child.returncode) == ("interrupted 32\n", 0)


def test_many_threads_get_disjoint_bits(recording):
    raw = good_bytes(2 << 20).tobytes()
    got = [[] for _ in range(6)]
    with Source.open(recording(raw), ring_bytes=16384) as opened:

        def consume(k):
            try:
                while True:
                    got[k].append(opened.take(32))
            except SourceExhausted:
                pass

        threads = [threading.Thread(target=consume, args=(k,)) for k in range(6)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
            assert not t.is_alive()
        assert opened.ring.all_zero()
    expected = hashes(raw)[: 32 * ((4096 - 1) * 512 // N)]
    taken = sorted(b for blocks in got for b in blocks)
    assert taken == sorted(expected[i : i + 32] for i in range(0, len(expected), 32))
