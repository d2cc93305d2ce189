"""Pipeline: units, quarantine, start-up test, alarms, transport errors; every block against hashlib over its raw bytes."""

import hashlib
import threading
import time

import alarm_inputs
import pytest
from alarm_inputs import CUTOFFS, good_bytes

from everett_cuda import _C, conditioner, health

Flow, Take = _C.Flow, _C.Take
DAY_S = 24 * 3600
N = 80  # raw bytes a block at H = 4


def make(ring=None, **changes):
    ring = ring or _C.Ring(1 << 20)
    settings = dict(fingerprint_key=bytes(16), block_bytes=N, startup_bytes=4096) | changes
    return ring, _C.Pipeline(ring, CUTOFFS, **settings)


def push(pipeline, raw, now_s=0.0):
    buffer = bytearray(raw)
    flows = pipeline.push(buffer, now_s)
    assert not any(buffer)  # raw bytes are zeroed whatever happened
    return flows


def drain(ring):
    out = bytearray(ring.unread)
    assert not out or ring.take_into(out, 0) == Take.ok
    return bytes(out)


def hashes(raw, start=0, n=N):
    return b"".join(hashlib.sha256(raw[i : i + n]).digest() for i in range(start, len(raw) - n + 1, n))


# --- blocks ---


def test_every_block_is_the_hash_of_its_raw_bytes():
    raw = good_bytes(100_000).tobytes()
    ring, pipeline = make()
    assert push(pipeline, raw)
    out = drain(ring)
    proven = (100_000 // 512 - 1) * 512
    assert out == hashes(raw[:proven])
    blocks = len(out) // 32
    for b in (0, 1, blocks // 2, blocks - 1):
        at = pipeline.raw_offset(b)
        assert at == N * b
        assert out[32 * b : 32 * b + 32] == hashlib.sha256(raw[at : at + N]).digest()
    with pytest.raises(IndexError):
        pipeline.raw_offset(blocks)
    counts = pipeline.counts
    assert (counts["raw_in"], counts["blocks_out"], counts["raw_dropped"]) == (100_000, blocks, 0)
    assert counts["raw_held"] == 100_000 - blocks * N
    assert not any(counts["alarms"].values())


@pytest.mark.parametrize("h", [8, "7.1", 4, 1, "0.52"])
def test_block_sizes_follow_the_claim(h):
    raw = good_bytes(50_000).tobytes()
    n = health.raw_bytes_per_block(h)
    ring = _C.Ring(1 << 20)
    pipeline = _C.Pipeline(ring, health.cutoffs(h), fingerprint_key=bytes(16), block_bytes=n)
    push(pipeline, raw)
    assert drain(ring) == hashes(raw[: (50_000 // 512 - 1) * 512], n=n)


@pytest.mark.parametrize("sizes", [[1], [511], [512], [513], [4096], [16384, 1], [16385], [40_000], [7, 5000, 80, 512]])
def test_cutting_into_pushes_does_not_matter(sizes):
    raw = good_bytes(40_000).tobytes()
    ring, pipeline = make()
    at = k = 0
    out = b""
    while at < len(raw):
        n = sizes[k % len(sizes)]
        push(pipeline, raw[at : at + n])
        out += drain(ring)
        at, k = at + n, k + 1
    assert out == hashes(raw[: (40_000 // 512 - 1) * 512])
    assert pipeline.counts["raw_held"] == 40_000 - len(out) // 32 * N


def test_a_unit_leaves_only_when_the_next_has_passed():
    raw = good_bytes(6000).tobytes()
    ring, pipeline = make()
    push(pipeline, raw[:4095])
    assert (pipeline.flow, ring.unread) == (Flow.starting, 0)
    push(pipeline, raw[4095:4096])
    assert (pipeline.flow, ring.unread // 32) == (Flow.flowing, 7 * 512 // N)
    push(pipeline, raw[4096:4607])
    assert ring.unread // 32 == 7 * 512 // N
    push(pipeline, raw[4607:4608])
    assert ring.unread // 32 == 8 * 512 // N


def test_startup_size_is_a_parameter():
    for startup, units in ((1024, 2), (1025, 3), (8192, 16)):
        ring, pipeline = make(startup_bytes=startup)
        assert pipeline.startup_bytes == units * 512
        raw = good_bytes(units * 512).tobytes()
        push(pipeline, raw[:-1])
        assert pipeline.flow == Flow.starting
        push(pipeline, raw[-1:])
        assert pipeline.flow == Flow.flowing and drain(ring) == hashes(raw[:-512])


def test_hashlib_gives_the_same_bytes():
    raw = good_bytes(60_000).tobytes()
    ring, pipeline = make(hash=conditioner.hash_blocks)
    push(pipeline, raw)
    assert drain(ring) == hashes(raw[: (60_000 // 512 - 1) * 512])


def test_pass_through_hands_out_the_raw_bytes():
    raw = good_bytes(8192).tobytes()
    ring, pipeline = make(hash="none", block_bytes=32)
    push(pipeline, raw)
    assert drain(ring) == raw[:-512]
    with pytest.raises(ValueError, match="32 raw bytes"):
        make(hash="none", block_bytes=80)


def test_a_hash_that_fails_lets_nothing_out():
    def broken(raw, n):
        raise OSError("no hash today")

    for hash_, message in ((broken, "no hash today"), (lambda raw, n: b"short", "wrong number")):
        ring, pipeline = make(hash=hash_)
        raw = bytearray(good_bytes(8192))
        with pytest.raises(RuntimeError, match=message):
            pipeline.push(raw, 0.0)
        assert not any(raw) and ring.unread == 0 and ring.all_zero()


# --- alarms ---


@pytest.mark.parametrize("size", [512, 700, 16384])
@pytest.mark.parametrize("make_input", alarm_inputs.ALL, ids=lambda f: f.__name__)
def test_nothing_of_the_alarming_unit_or_the_one_before_is_handed_out(make_input, size):
    case = make_input()
    ring, pipeline = make()
    unit = case.offset // 512 * 512
    out = b""
    raw = case.raw[: unit + 512 + 3000]  # too short for the start-up test after the alarm
    for at in range(0, len(raw), size):
        push(pipeline, raw[at : at + size])
        out += drain(ring)
    (alarm,) = pipeline.alarms
    assert (alarm.test, alarm.offset, alarm.startup, alarm.permanent) == (case.test, case.offset, False, False)
    assert {name: n for name, n in pipeline.counts["alarms"].items() if n} == {case.test: 1}
    proven = hashes(case.raw[: unit - 512])
    if size == 512:  # as much as could ever go out did, and no more
        assert out == proven
    assert proven.startswith(out)


@pytest.mark.parametrize("make_input", alarm_inputs.ALL, ids=lambda f: f.__name__)
def test_an_alarm_empties_the_ring(make_input):
    case = make_input()
    ring, pipeline = make()
    first = case.offset // 512 * 512
    push(pipeline, case.raw[:first])
    unread = ring.unread
    assert unread > 0
    push(pipeline, case.raw[first : first + 512])
    assert ring.unread == 0 and ring.all_zero() and ring.bytes_destroyed == unread
    assert pipeline.flow == Flow.starting and pipeline.counts["raw_held"] == 0


def test_flow_resumes_after_a_transient_alarm_with_the_byte_after_the_alarming_unit():
    case = alarm_inputs.repetition_bytes(n=40_000)
    start = case.offset // 512 * 512 + 512
    for size in (512, 1000, 40_000):
        ring, pipeline = make()
        for at in range(0, len(case.raw), size):
            push(pipeline, case.raw[at : at + size])
            if at + size < start + 4096:
                assert pipeline.flow != Flow.flowing or not pipeline.alarms
        units = (len(case.raw) - start) // 512
        out = drain(ring)
        assert out == hashes(case.raw[: start + (units - 1) * 512], start)
        first = pipeline.counts["blocks_out"] - len(out) // 32
        assert pipeline.raw_offset(first) == start and pipeline.raw_offset(first + 3) == start + 3 * N
        assert first == 0 or pipeline.raw_offset(first - 1) == (first - 1) * N
        assert pipeline.counts["transients"] == 1


def test_an_alarm_that_comes_in_the_same_push_as_a_good_startup_is_transient():
    case = alarm_inputs.repetition_bytes(n=40_000)
    ring, pipeline = make()
    assert push(pipeline, case.raw)
    assert [(a.startup, a.permanent) for a in pipeline.alarms] == [(False, False)]


def _stop(ring, pipeline, offset):
    assert pipeline.flow == Flow.stopped and pipeline.alarms[-1].permanent
    assert pipeline.alarms[-1].offset == offset
    assert ring.unread == 0 and ring.take_into(bytearray(1), 0) == Take.alarm
    before = pipeline.counts["raw_in"]
    assert not push(pipeline, good_bytes(8192))  # nothing flows any more
    assert pipeline.counts["raw_in"] == before + 8192 and ring.unread == 0


def test_second_alarm_within_a_day_is_permanent():
    case = alarm_inputs.repetition_bytes(n=40_000)
    ring, pipeline = make()
    push(pipeline, case.raw, now_s=1000.0)
    good = good_bytes(40_000, 2)
    push(pipeline, good, now_s=2000.0)
    again = good_bytes(8192, 3)
    again[100:116] = 0x5A
    assert not push(pipeline, again, now_s=1000.0 + DAY_S - 1)
    _stop(ring, pipeline, 80_115)
    assert [a.permanent for a in pipeline.alarms] == [False, True]


def test_an_alarm_a_day_later_is_transient_again():
    ring, pipeline = make()
    at = 0
    for day in range(4):
        raw = good_bytes(40_960, day)
        raw[10_000:10_016] = 0x5A
        assert push(pipeline, raw, now_s=day * DAY_S)
        at += 40_960
    assert [a.permanent for a in pipeline.alarms] == [False] * 4
    assert pipeline.counts["transients"] == 4 and pipeline.flow == Flow.flowing


def test_failed_startup_test_after_an_alarm_is_permanent():
    raw = good_bytes(40_000)
    raw[10_000:] = 0
    ring, pipeline = make()
    assert not push(pipeline, raw)
    first, second = pipeline.alarms
    assert (first.startup, first.permanent, second.startup, second.permanent) == (False, False, True, True)
    _stop(ring, pipeline, second.offset)


@pytest.mark.parametrize("at", [0, 1000, 4096 - 16])
def test_failed_startup_test_of_an_opening_is_permanent(at):
    raw = good_bytes(8192)
    raw[at : at + 16] = 0x5A
    if at:
        raw[at - 1] = 1
    ring, pipeline = make()
    assert not push(pipeline, raw)
    assert pipeline.alarms[0].startup
    assert pipeline.counts["blocks_out"] == 0
    _stop(ring, pipeline, at + 15)


def test_device_status_is_an_alarm():
    ring, pipeline = make()
    push(pipeline, good_bytes(10_000))
    assert pipeline.device_alarm(0b0111, 0b1111, 0.0)
    (alarm,) = pipeline.alarms
    assert (alarm.test, alarm.offset, alarm.value, alarm.cutoff) == ("device status", 10_000, 7, 15)
    assert ring.unread == 0 and pipeline.counts["raw_held"] == 0
    assert not pipeline.device_alarm(0b0111, 0b1111, 1.0)
    _stop(ring, pipeline, 10_000)


def test_an_operator_starts_over():
    raw = good_bytes(8192)
    raw[0:100] = 0
    ring, pipeline = make()
    push(pipeline, raw)
    assert pipeline.flow == Flow.stopped
    ring.reopen()
    pipeline.reopen()
    good = good_bytes(8192, 5).tobytes()
    assert push(pipeline, good)
    assert drain(ring) == hashes(good[: 15 * 512])
    assert pipeline.raw_offset(0) == 8192  # offsets count on
    bad = good_bytes(40_960, 6)
    bad[100:116] = 0x5A
    assert push(pipeline, bad)  # the first alarm since the operator: transient
    assert [a.permanent for a in pipeline.alarms] == [True, False]


# --- transport errors ---


def test_a_transport_error_drops_what_was_not_proven_and_is_no_alarm():
    raw = good_bytes(40_000).tobytes()
    ring, pipeline = make()
    push(pipeline, raw[:10_100])
    pipeline.transport_error()
    assert pipeline.flow == Flow.starting and pipeline.counts["transport_errors"] == 1
    unread = ring.unread
    assert unread // 32 == 18 * 512 // N  # blocks that passed stay
    push(pipeline, raw[10_100 : 10_100 + 4095])
    assert ring.unread == unread
    push(pipeline, raw[10_100 + 4095 :])
    units = (40_000 - 10_100) // 512
    assert drain(ring) == hashes(raw[: 18 * 512]) + hashes(raw[: 10_100 + (units - 1) * 512], 10_100)
    assert pipeline.raw_offset(unread // 32) == 10_100
    assert pipeline.raw_offset(unread // 32 - 1) == (unread // 32 - 1) * N
    assert not pipeline.alarms and pipeline.counts["transients"] == 0


def test_a_run_does_not_reach_across_a_transport_error():
    raw = good_bytes(16384)
    raw[8192 - 10 : 8192 + 10] = 0x5A
    ring, pipeline = make()
    push(pipeline, raw[:8192])
    pipeline.transport_error()
    assert push(pipeline, raw[8192:]) and not pipeline.alarms


def test_an_alarm_after_a_reconnection_gets_its_second_startup_test():
    bad = good_bytes(16384, 8)
    bad[0:16] = 0x5A
    ring, pipeline = make()
    push(pipeline, good_bytes(16384))
    pipeline.transport_error()
    assert push(pipeline, bad)
    assert [(a.startup, a.permanent) for a in pipeline.alarms] == [(True, False)]
    assert pipeline.flow == Flow.flowing and pipeline.counts["transients"] == 1


def test_transport_errors_after_a_stop_change_nothing():
    ring, pipeline = make()
    push(pipeline, bytes(8192))
    pipeline.transport_error()
    assert pipeline.flow == Flow.stopped


def test_only_the_last_segments_can_be_located():
    ring, pipeline = make(startup_bytes=1024)
    for k in range(4100):
        push(pipeline, good_bytes(1024, k))
        pipeline.transport_error()
        drain(ring)
    blocks = pipeline.counts["blocks_out"]
    assert blocks == 4100 * 6
    assert pipeline.raw_offset(blocks - 1) == 4099 * 1024 + 5 * N
    assert pipeline.raw_offset(4 * 6) == 4 * 1024
    with pytest.raises(IndexError, match="4096"):
        pipeline.raw_offset(4 * 6 - 1)


# --- waiting and misuse ---


def test_a_full_ring_holds_the_push_until_it_is_read_or_ended():
    raw = good_bytes(100_000).tobytes()
    ring, pipeline = make(_C.Ring(4096))
    flows = []
    pusher = threading.Thread(target=lambda: flows.append(push(pipeline, raw)))
    pusher.start()
    out = bytearray(8000)
    assert ring.take_into(memoryview(out)[:4000], 5) == ring.take_into(memoryview(out)[4000:], 5) == Take.ok
    assert hashes(raw).startswith(out)
    time.sleep(0.02)
    assert pusher.is_alive()
    ring.end(Take.closed)
    pusher.join(5)
    assert not pusher.is_alive() and flows == [False]


def test_feed_processes_in_order_and_reports_errors():
    raw = good_bytes(1 << 20).tobytes()
    ring, pipeline = make()
    feed = _C.Feed(pipeline, 65536)
    for at in range(0, len(raw), 50_000):
        piece = raw[at : at + 50_000]
        memoryview(feed.buffer)[: len(piece)] = piece
        assert feed.submit(len(piece), 0.0)
    assert feed.drain()
    assert drain(ring) == hashes(raw[: (len(raw) // 512 - 1) * 512])
    assert not any(memoryview(feed.buffer))
    feed.stop()
    assert not feed.submit(1, 0.0)

    ring, pipeline = make(hash=lambda raw, n: b"")
    feed = _C.Feed(pipeline, 65536)
    memoryview(feed.buffer)[:] = raw[:65536]
    assert feed.submit(65536, 0.0)
    with pytest.raises(RuntimeError, match="wrong number"):
        feed.drain()
    feed.stop()

    ring, pipeline = make()
    feed = _C.Feed(pipeline, 65536)
    feed.submit(65536, 0.0)  # zeros: a permanent alarm
    assert not feed.drain() and not feed.submit(512, 0.0)
    feed.stop()


def test_dropping_a_feed_that_waits_for_room_closes_the_ring():
    ring, pipeline = make(_C.Ring(4096))
    feed = _C.Feed(pipeline, 65536)
    memoryview(feed.buffer)[:] = good_bytes(65536)
    feed.submit(65536, 0.0)
    while ring.unread < 4096:
        time.sleep(0.001)
    del feed
    assert ring.take_into(bytearray(1), 0) == Take.closed


def test_bad_arguments_are_refused():
    for changes, message in (
        ({"block_bytes": 31}, "32 to 4096"),
        ({"startup_bytes": 1023}, "1024 to"),
        ({"fingerprint_key": b"x"}, "16 bytes"),
        ({"hash": "md5"}, "hash is"),
        ({"bit_order": "middle"}, "bit_order"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**changes)
