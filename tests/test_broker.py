"""The broker and its clients: bits, kinds, alarms, restarts, forks, quotas, and what is said of all that."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from broker_rig import BrokerProcess, check_no_block_twice, client, socket_folder
from devices.quantis_usb import QuantisUsb
from devices.seeded_bytes import Seeded
from processes import in_forked_child
from source_checks import blocks, cut, nothing_left, wait_until

import everett_cuda as ev
from everett_cuda import _C, drivers, session
from everett_cuda.broker import Broker, BrokerConfig
from everett_cuda.drivers import DeviceBusy
from everett_cuda.drivers import broker as broker_driver
from everett_cuda.drivers.broker import look
from everett_cuda.drivers.sim import SimulatedDriver
from everett_cuda.errors import BadParameter, DeviceNotFound, ForkedError, HealthAlarm, SourceError, SourceExhausted, Starved
from everett_cuda.source import Source

pytestmark = pytest.mark.filterwarnings("ignore:everett. the broker is gone")


@pytest.fixture(autouse=True)
def _no_thread_stays():
    yield
    ev.close()
    wait_until(lambda: not [t.name for t in threading.enumerate() if t.name.startswith("everett")])


@pytest.fixture
def folder():
    path = socket_folder()
    yield path
    shutil.rmtree(path)


class Running:
    """A broker in this process, turned by a thread; `events` is what it had to log."""

    def __init__(self, path: Path, *sources, **settings):
        self.broker = Broker(BrokerConfig(sources=sources, socket=path, group="", **settings))
        self.uri = f"broker:{path}"
        self.events, self._stop = [], threading.Event()
        self._thread = threading.Thread(target=self._turn, name="turns")
        self._thread.start()

    def _turn(self):
        while not self._stop.is_set():
            self.events += self.broker.turn(0.02)

    def kinds(self):
        return [event.kind for event in self.events]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self.broker.close()


def raw_of(seed: int, n: int) -> bytes:
    """The first n raw bytes of sim:seed=..."""
    return SimulatedDriver(seed).bytes_at(0, n).tobytes()


# --- bits ---


def test_clients_get_the_hashes_of_the_raw_bytes_each_once(folder):
    with Running(folder / "s", "sim:seed=7") as running:
        with Source.open(running.uri) as one, Source.open(running.uri) as two:
            got = [cut(s.take(n, 5)) for s in (one, two, one, two) for n in (32, 96, 65504, 4096)]
        conn = look(folder / "s")
        got.append(cut(conn.draw(2048, 5)) + cut(conn.draw(32, 5)))
        conn.close()
    got = [block for piece in got for block in piece]
    made = {block: i for i, block in enumerate(blocks(raw_of(7, 8 << 20)))}
    positions = [made[block] for block in got]  # KeyError: a block that the device never gave
    assert len(set(positions)) == len(positions) and len(got) > 8000
    assert positions[:4] == sorted(positions[:4])


def test_a_client_in_pieces_gets_what_a_client_in_one_gets(folder):
    """One client alone has the blocks in order, however it cuts them; odd lengths shift nothing."""
    with Running(folder / "s", "sim:seed=3") as running, Source.open(running.uri) as source:
        out = b"".join(source.take(n, 5) for n in (1, 7, 8, 32, 31, 65504, 1000, 65504, 64, 3, 200_000))
        words = source.direct_words(4, 5)
    expected = b"".join(blocks(raw_of(3, 2 << 20)))
    assert out == expected[: len(out)]
    assert words.tolist() == np.frombuffer(expected[len(out) : len(out) + 32], "<u8").tolist()


def test_drawn_bytes_are_zero_in_the_shared_memory_and_counts_add_up(folder):
    with Running(folder / "s", "sim:seed=7") as running, Source.open(running.uri) as source:
        source.take(4096, 5)
        source.take(17, 5)
        wait_until(lambda: source.ring.unread > 40_000)
        assert source.ring.bytes_out == 4113
        assert source.ring.bytes_in == source.ring.bytes_out + source.ring.unread
        wait_until(lambda: running.broker.stats().clients[0].bytes == source.ring.bytes_in)
        (facts,) = running.broker.stats().clients
        assert (facts.pid, facts.uid, facts.ring) == (os.getpid(), os.getuid(), True)


def test_threads_of_a_client_share_its_ring(folder):
    with Running(folder / "s", "sim:seed=7") as running, Source.open(running.uri) as source:
        drawn = [[] for _ in range(4)]
        threads = [
            threading.Thread(target=lambda mine=mine: [mine.append(source.take(32, 5)) for _ in range(2000)])
            for mine in drawn
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    everything = [block for mine in drawn for block in mine]
    assert len(set(everything)) == 8000 and set(everything) <= set(blocks(raw_of(7, 2 << 20)))


# --- honest words ---


def test_a_client_says_what_the_broker_serves(folder):
    with Running(folder / "s", "sim:seed=7,rate=1MB/s?h=2") as running, Source.open(running.uri) as source:
        wait_until(lambda: source.status().raw_bytes_in > 0)
        status = source.status()
        assert (status.kind, status.label, status.serial) == ("simulated", "NOT QUANTUM (simulated)", "seed-7")
        assert (status.min_entropy, status.min_entropy_origin, status.raw_bytes_per_block) == (2.0, "claimed by user", 160)
        assert status.conditioner.startswith("by the broker: SHA-256") and status.health == "by the broker: ok"
        assert f"by the broker at {folder / 's'}" in status.name and str(os.getpid()) in status.device["broker"]
        assert "health:       by the broker: ok" in str(status)
        with pytest.raises(SourceError, match="the device is the broker's"):
            source.reopen()
    assert source.status().state == "closed"
    with pytest.raises(SourceError, match="closed"):
        source.take(32)


def test_kinds_are_not_mixed_unless_allowed_and_then_count_as_the_weakest(folder, tmp_path):
    (tmp_path / "r.bin").write_bytes(raw_of(1, 1 << 20))
    sources = (f"replay:{tmp_path / 'r.bin'}?loop=1&h=3", "sim:seed=7")
    with nothing_left(), pytest.raises(SourceError, match="different kinds.*NOT QUANTUM NOW .*--mix-kinds"):
        Running(folder / "s", *sources)
    with Running(folder / "s", *sources, mix_kinds=True) as running, Source.open(running.uri) as source:
        status = source.status()
        assert (status.kind, status.min_entropy) == ("simulated", 3.0)
        assert status.label == "NOT QUANTUM (simulated), REPEATS (loop=1)"
        assert status.serial == "r.bin + seed-7"


def test_pooled_sources_take_turns_and_failover_takes_the_first(folder):
    of = {block: 1 for block in blocks(raw_of(1, 4 << 20))} | {block: 2 for block in blocks(raw_of(2, 4 << 20))}
    for failover, expected in ((False, {1, 2}), (True, {1})):
        with Running(folder / "s", "sim:seed=1", "sim:seed=2", failover=failover) as running:
            with Source.open(running.uri) as source:
                assert {of[block] for block in cut(source.take(640_000, 5))} == expected


def test_failover_when_the_first_source_stops(folder):
    of = {block: 1 for block in blocks(raw_of(1, 1 << 20))} | {block: 2 for block in blocks(raw_of(2, 4 << 20))}
    with Running(folder / "s", "sim:seed=1,fault=stuck@600KiB", "sim:seed=2", failover=True) as running:
        with Source.open(running.uri) as source:
            served = [of[block] for block in cut(source.take(640_000, 5))]
            assert served == sorted(served) and set(served) <= {1, 2} and served[-1] == 2
            wait_until(lambda: source.status().alarms and "sim:seed=1" in running.broker.stats().why)
            assert source.status().state == "flowing"


def test_there_is_no_raw_byte_to_be_had_and_no_parameter(folder, tmp_path):
    with Running(folder / "s", "sim:seed=7") as running:
        for parameter in ("h=8", "condition=none"):
            with pytest.raises(SourceError, match="conditioned already"):
                Source.open(f"{running.uri}?{parameter}")
        with pytest.raises(BadParameter):
            Source.open(f"{running.uri}?x=1")
        driver = drivers.open_driver(running.uri)
        with pytest.raises(SourceError, match="conditioned bits only"):
            driver.readinto(memoryview(bytearray(32)), 0.1)
        driver.close()


# --- alarms and ends ---


def test_an_alarm_destroys_what_clients_have_and_they_hear_of_it(folder):
    # 1 MiB + 64 KiB of conditioned bytes are 2.8 MB raw: the alarm comes after the client's ring has been refilled.
    with Running(folder / "s", "sim:seed=7,fault=stuck@3MB") as running, Source.open(running.uri) as source:
        good = set(blocks(raw_of(7, 3_000_000)))
        assert source.take(65504, 5) and source.ring.destructions == 0
        with pytest.raises(HealthAlarm, match=r"repetition count .*(sim:seed=7|seed-7).*SIGHUP"):
            while True:
                assert set(cut(source.take(32, 5))) <= good
        wait_until(lambda: source.status().alarms)
        status = source.status()
        assert status.state == "alarm" and status.alarms[-1].permanent and status.alarms[-1].offset >= 3_000_000
        assert status.health.startswith("by the broker: PERMANENT ALARM: repetition count")
        assert source.ring.destructions >= 1 and source.ring.unread == 0
        wait_until(lambda: "destroyed" in running.kinds())
        assert running.broker.stats().supply == "alarm"
        with Source.open(running.uri) as later, pytest.raises(HealthAlarm):  # who comes later hears the same
            later.take(32, 1)


def test_a_transient_alarm_destroys_and_the_flow_resumes(folder):
    with Running(folder / "s", "sim:seed=7,rate=2MB/s,fault=duplicate@1MiB") as running:
        with Source.open(running.uri) as source:
            wait_until(lambda: source.ring.unread >= 49152)  # a client is left alone once it has three quarters
            before = source.ring.unread
            wait_until(lambda: source.ring.destructions == 1)
            raw = raw_of(7, 8 << 20)
            segment = (1 << 20) + 512
            after = set(blocks(raw[segment:]))
            assert set(cut(source.take(65504, 10))) <= after  # nothing from before the alarm
            wait_until(lambda: source.status().transient_alarms == 1)
            status = source.status()
            assert (status.state, status.alarms[-1].test, status.alarms[-1].permanent) == (
                "flowing",
                "duplicate unit",
                False,
            )
            assert status.bytes_destroyed >= before


def test_reload_opens_a_stopped_source_again(folder):
    with Running(folder / "s", "sim:seed=7,fault=duplicate@3000320+duplicate@3100160") as running:
        with Source.open(running.uri) as source:
            with pytest.raises(HealthAlarm):
                while True:
                    source.take(4096, 5)
            running.broker.reload(running.broker.config)
            wait_until(lambda: source.status().state == "flowing")
            assert len(source.take(65504, 5)) == 65504
            wait_until(lambda: "reopened" in running.kinds())


def test_an_exhausted_recording_ends_clients_with_its_last_byte(folder, tmp_path):
    raw = raw_of(5, 100_000)
    (tmp_path / "r.bin").write_bytes(raw)
    with Running(folder / "s", f"replay:{tmp_path / 'r.bin'}") as running, Source.open(running.uri) as source:
        out = []
        with pytest.raises(SourceExhausted, match="r.bin"):
            while True:
                out.append(source.take(32, 5))
        assert out == blocks(raw)[: len(out)] and len(out) > 1200
        assert source.status().state == "exhausted" and source.ring.unread < 32


def test_a_slow_device_starves_clients_in_their_turn(folder):
    """8 hungry clients of a device of 40 kB/s raw share it evenly, and one waits for its bytes without polling."""
    with Running(folder / "s", "sim:seed=7,rate=40kB/s", ring_bytes=4096) as running:
        sources = [Source.open(running.uri) for _ in range(8)]
        before = [facts.bytes for facts in running.broker.stats().clients]  # the first had the start-up test's bytes
        time.sleep(0.5)
        given = [facts.bytes - b for facts, b in zip(running.broker.stats().clients, before, strict=True)]
        assert min(given[1:]) > 0 and max(given[1:]) - min(given[1:]) <= 128, given
        with pytest.raises(Starved, match="gave no 4064 bytes within 0.1 s"):
            sources[0].take(4064, 0.1)
        for source in sources:
            source.close()


# --- restarts, forks, leaving ---


def test_a_client_follows_its_policy_while_the_broker_is_away_and_comes_back(folder):
    path = folder / "s"
    with BrokerProcess(path, "sim:seed=7,rate=1MB/s") as broker, Source.open(f"broker:{path}") as source:
        before = cut(source.take(4096, 5))
        broker.kill()
        wait_until(lambda: source.status().state == "reconnecting")
        rest = source.take(source.ring.unread, 1)  # its own since they were there
        with pytest.raises(Starved, match="the broker is gone"):
            source.take(65504, 0.2)
        assert "the broker is gone" in str(source.status()) and rest
        broker.sources = ("sim:seed=8,rate=1MB/s",)
        broker.start()
        after = cut(source.take(32768, 10))
        assert source.status().state == "flowing" and source.status().device["reconnections"] == "1"
        assert source.status().serial == "seed-8"
        assert set(after) <= set(blocks(raw_of(8, 4 << 20))) and not set(before) & set(after)


def test_a_broker_of_another_kind_is_no_substitute(folder, tmp_path):
    path = folder / "s"
    (tmp_path / "r.bin").write_bytes(raw_of(1, 1 << 20))
    with Running(path, "sim:seed=7") as running:
        source = Source.open(running.uri)
    with Running(path, f"replay:{tmp_path / 'r.bin'}"):
        with pytest.raises(SourceError, match="serves recorded bits now"):
            while True:
                source.take(65504, 10)
        assert source.status().state == "failed"
    source.close()


def test_keys_and_direct_words_come_from_a_broker_and_a_forked_child_is_another_client(folder):
    import torch

    with Running(folder / "s", "sim:seed=7") as running:
        ev.open(running.uri)
        try:
            x = torch.ones(64)
            ev.dropout(x, 0.5)
            assert ev.status().draws["fresh"] == 1
            source = session.current_source()

            def in_child():
                try:
                    source.take(32)
                    return "the parent's bits"
                except ForkedError:
                    pass
                y = ev.dropout(x, 0.5)
                mine = session.current_source()
                mine.take(32, 5)
                assert mine is not source and not mine.ring.forked and y.shape == x.shape
                return ev.status().draws["fresh"]

            assert in_forked_child(in_child) == "1"
            wait_until(lambda: running.kinds() == ["connected", "connected", "disconnected"])
            ev.dropout(x, 0.5)
            assert ev.status().draws["fresh"] == 2
        finally:
            ev.close()


def test_stretching_bridges_a_restart_and_says_why_when_it_is_over(folder):
    import torch

    try:
        with Running(folder / "s", "sim:seed=7") as running:
            ev.open(running.uri)
            ev.configure(max_stretch=3, timeout_s=0.3)
            ev.dropout(torch.ones(4), 0.5)
        with pytest.raises(Starved, match="no fresh key arrived.*Now: the broker is gone"):
            for _ in range(3000):
                ev.dropout(torch.ones(4), 0.5)
        assert ev.status().draws["stretched"] == 3 and ev.status().source.state == "reconnecting"
        with Running(folder / "s", "sim:seed=8") as running:
            wait_until(lambda: ev.status().source.state == "flowing")
            ev.configure(timeout_s=10.0)
            ev.dropout(torch.ones(4), 0.5)
    finally:
        ev.configure(max_stretch=2**16, timeout_s=60.0)
        ev.close()


def test_a_dead_clients_bytes_go_to_the_grave(folder, tmp_path):
    with Running(folder / "s", "sim:seed=7,rate=2MB/s") as running:
        process = client(folder / "s", tmp_path / "one", 60, (32,))
        wait_until(lambda: (tmp_path / "one").exists() and (tmp_path / "one").stat().st_size > 3200, 20)
        process.kill()
        process.communicate()
        wait_until(lambda: not running.broker.stats().clients)
        with Source.open(running.uri) as source:
            (tmp_path / "two").write_bytes(source.take(262_144, 10))
        assert check_no_block_twice([tmp_path / "one", tmp_path / "two"]) > 8000
    assert any("process has ended" in e.text or "closed the connection" in e.text for e in running.events)


def test_nothing_is_left_after_close(folder):
    with nothing_left():
        with Running(folder / "s", "sim:seed=7") as running, Source.open(running.uri) as source:
            source.take(32, 5)
    assert not (folder / "s").exists()


# --- who may ---


def test_quotas_of_a_client_and_of_a_user(folder):
    with Running(folder / "s", "sim:seed=7", quota=20_000.0, user_quota=30_000.0, ring_bytes=4096) as running:
        sources = [Source.open(running.uri) for _ in range(2)]
        for source in sources:
            threading.Thread(target=source.ring.discard, args=(1 << 30, 2.0)).start()
        time.sleep(2.2)
        given = sorted(facts.bytes for facts in running.broker.stats().clients)
        # A second's worth at once, then two seconds.
        assert given[1] <= 20_000 * 3.5 and sum(given) <= 30_000 * 3.5 and given[0] > 5_000, given
        assert running.broker.stats().counts["throttled"] > 0
        for source in sources:
            source.close()


def test_connection_limits_and_the_list_of_users(folder, monkeypatch):
    with Running(folder / "s", "sim:seed=7", max_clients_per_user=2) as running:
        kept = [Source.open(running.uri) for _ in range(2)]
        with pytest.raises(SourceError, match="has 2 connections, and gets no more"):
            Source.open(running.uri)
        kept.pop().close()
        wait_until(lambda: len(running.broker.stats().clients) == 1)
        kept.append(Source.open(running.uri))
        for source in kept:
            source.close()
    if os.getuid() == 0:
        with Running(folder / "s", "sim:seed=7", allow_users=("1",)) as running:
            os.chmod(folder, 0o755)
            os.chmod(folder / "s", 0o666)
            code = (
                "import os, socket, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
                "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1])\n"
                "print(s.recv(4096)[24:].decode())"
            )
            said = subprocess.run([sys.executable, "-c", code, folder / "s"], capture_output=True, text=True).stdout
            assert "user 65534 is not on the broker's list" in said
            wait_until(lambda: "refused" in running.kinds())


def test_auto_takes_a_broker_of_quantum_bits_only_and_first(folder, machine, monkeypatch):
    path = folder / "s"
    monkeypatch.setattr(broker_driver, "DEFAULT_PATH", path)
    with pytest.raises(DeviceNotFound, match="broker: an entropy broker"):
        Source.open("auto")
    with Running(path, "sim:seed=7"):
        (row,) = drivers.attached()[0]
        assert (row.uri, row.kind, row.serial, row.state) == ("broker:", "simulated", "seed-7", "ready")
        with pytest.raises(DeviceNotFound, match="Attached, but not quantum:\n  broker:"):
            Source.open("auto")


def test_auto_takes_a_brokers_device_and_who_finds_it_busy_is_told_so(folder, machine, monkeypatch):
    monkeypatch.setattr(broker_driver, "DEFAULT_PATH", folder / "s")
    machine.bus.gadgets.append(QuantisUsb(Seeded(7), "1000231A410"))
    with Source.open("quantis-usb:"), pytest.raises(DeviceBusy, match="in use by .*`everett serve URI`"):
        Source.open("quantis-usb:")
    with Running(folder / "s", "quantis-usb:"):
        with Source.open("auto") as source:
            status = source.status()
            assert (status.by_broker, status.kind, status.serial) == (True, "quantum", "1000231A410")
            assert len(source.take(64, 5)) == 64
        with pytest.raises(DeviceBusy, match="in use by .*A broker serves .*: open broker: instead"):
            Source.open("quantis-usb:")


def test_no_broker_and_no_second_broker(folder):
    with pytest.raises(DeviceNotFound, match="no broker at .*everett serve"):
        Source.open(f"broker:{folder / 's'}")
    with Running(folder / "s", "sim:seed=7"):
        with pytest.raises(SourceError, match=rf"another broker \(pid {os.getpid()}\) serves"):
            Broker(BrokerConfig(sources=("sim:seed=8",), socket=folder / "s", group=""))
        with Source.open(f"broker:{folder / 's'}") as source:
            assert source.status().serial == "seed-7"


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"sources": ()}, "at least one source"),
        ({"sources": ("auto",)}, "sources are named"),
        ({"sources": ("broker:",)}, "cannot serve another broker"),
        ({"sources": ("sim:seed=1", "sim:seed=1")}, "named twice"),
        ({"sources": ("sim:sed=1",)}, "unknown parameter"),
        ({"sources": ("sim:",), "ring_bytes": 5000}, "power of two"),
        ({"sources": ("sim:",), "allow_users": ("nobody-of-that-name",)}, "there is no user"),
    ],
)
def test_bad_configurations_are_refused(settings, says):
    with pytest.raises(BadParameter, match=says):
        BrokerConfig(**settings)


def test_waiting_for_bits_wakes_when_they_come(folder):
    """A take that waits is answered by the broker's wake-up: 30 ms are enough, not a slice of waiting."""
    with Running(folder / "s", "sim:seed=7,rate=400kB/s", ring_bytes=4096) as running, Source.open(running.uri) as source:
        started = time.monotonic()
        for _ in range(20):
            source.take(4064, 10)
        assert time.monotonic() - started < 10
        assert _C.Take.empty == source.ring.take_into(bytearray(4064), 0.0)


def test_sigterm_is_a_clean_end(folder):
    with BrokerProcess(folder / "s", "sim:seed=7") as broker:
        source = Source.open(f"broker:{folder / 's'}")
        wait_until(lambda: source.ring.unread >= 49152)
        unread = source.ring.unread
        broker.process.send_signal(signal.SIGTERM)
        broker.wait_for("stopped; every buffer was zeroed")
        assert broker.process.wait(10) == 0
        assert source.ring.unread == 0 and source.ring.bytes_destroyed >= unread
        source.close()


def test_the_commands_know_a_broker(folder, tmp_path):
    import json

    from commands import everett

    with Running(folder / "s", "sim:seed=7") as running:
        report = json.loads(everett("doctor", running.uri, "--json").stdout)
        assert report["verdict"] == "usable, NOT QUANTUM (simulated)" and report["min_entropy"]["estimated"] is None
        assert [f["check"] for f in report["findings"]] == ["path", "broker", "source", "opens", "kind", "health tests"]
        seen = json.loads(everett("monitor", running.uri, "--once", "--json", "--seconds", 0.2).stdout)
        assert (seen["state"], seen["label"], seen["histogram"]["bytes"]) == ("flowing", "NOT QUANTUM (simulated)", 0)
        assert seen["conditioned_bytes_destroyed"] > 0
        refused = everett("capture", running.uri, tmp_path / "r.bin", "--bytes", 100)
        assert refused.exit_code == 1 and "conditioned bits only" in refused.stderr
    result = everett("doctor", running.uri, "--json")
    assert result.exit_code == 3 and "nothing is at" in result.stdout


def test_configuration_from_a_file_and_the_command_line(tmp_path):
    from commands import everett

    file = tmp_path / "broker.ini"
    file.write_text("[broker]\nsources = sim:seed=1 sim:seed=2\nfailover = yes\nquota = 1MB/s\nallow_users = root 7\n")
    shown = everett("serve", "--check-config", "--config", file, "--user-quota", "2MB/s").stdout
    assert "sim:seed=1, sim:seed=2 (the first that gives bits)" in shown and "8 Mbit/s a client, 16 Mbit/s a user" in shown
    assert "root, 7; at most" in shown
    for text, says in (
        ("[broker]\nsources = sim:\nquotas = 1\n", "unknown setting 'quotas'"),
        ("[a]\nb = 1\n", "one section"),
        ("[broker]\nsources = sim:\nfailover = maybe\n", "it must be yes or no"),
        ("x", "contains no section"),
    ):
        file.write_text(text)
        refused = everett("serve", "--check-config", "--config", file)
        assert refused.exit_code == 2 and says in refused.stderr, refused.stderr
    assert everett("serve", "--check-config").exit_code == 2
    assert everett("serve", "--check-config", "--config", tmp_path / "none").exit_code == 1
