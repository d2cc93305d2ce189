"""What clients, impostors and dead processes can do to a broker: garbage, lies, floods, kills. It serves on, and nobody gets
a block that somebody else had."""

import array
import ctypes
import fcntl
import os
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from broker_rig import BrokerProcess, check_no_block_twice, client, socket_folder
from source_checks import cut, wait_until
from test_broker import Running

from everett_cuda.broker.listening import Listener
from everett_cuda.drivers import broker_wire as wire
from everett_cuda.drivers.broker_connection import Connection, check_path
from everett_cuda.errors import EverettError, SourceError
from everett_cuda.source import Source

pytestmark = pytest.mark.filterwarnings("ignore:everett. the broker is gone")
HEADER_BYTES = 4096
TAIL = 128  # offset of the client's tail in the shared header
HELLO = wire.message(wire.HELLO, 0, 0)


@pytest.fixture
def folder():
    path = socket_folder()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def running(folder):
    with Running(folder / "s", "sim:seed=7") as running:
        running.path = folder / "s"
        yield running
        # Whatever a test did, an honest client is served.
        with Source.open(running.uri) as source:
            assert len(set(cut(source.take(65504, 5)))) == 2047


def raw_socket(path: Path) -> socket.socket:
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    s.settimeout(5)
    s.connect(str(path))
    return s


def ends(s: socket.socket) -> bool:
    """Whether the broker ends this connection; what it says before is read."""
    try:
        while s.recv(4096):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


class Shared:
    """A client that keeps what the broker sent and does with it what it likes."""

    def __init__(self, path: Path):
        self.connection = Connection(path, shared=True)
        self.memfd, self.eventfd = self.connection.descriptors
        self.bytes = self.connection.ring_bytes
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = ctypes.c_void_p
        self.at = self.libc.mmap(None, ctypes.c_size_t(HEADER_BYTES + self.bytes), 3, 1, self.memfd, ctypes.c_long(0))

    def write(self, offset: int, data: bytes) -> None:
        ctypes.memmove(self.at + offset, data, len(data))

    def wake(self) -> None:
        os.write(self.eventfd, struct.pack("<Q", 1))


# --- the socket ---


def test_malformed_messages_end_their_connection_alone(running):
    good = HELLO
    bad = [
        b"", b"x", good[:-1], good + b"\0", b"\0" * 24, b"\xff" * 4096, b"A" * 60_000,
        good[:4] + b"\x01\x00\x09\x00" + good[8:],  # a type that there is not
        good[:12] + b"\1" + good[13:],  # what must be zero
        good[:16] + b"\2" + good[17:],  # a ring of a kind that there is not
        wire.message(wire.DRAW, 32, 0),  # before hello
        wire.message(wire.WELCOME, 0, 0),  # a broker's
    ]  # fmt: skip
    for packet in bad:
        s = raw_socket(running.path)
        s.send(packet)
        assert ends(s), packet[:32]
        s.close()
    for n in (0, 1, 31, 33, 2080, 2**32 - 1):
        s = raw_socket(running.path)
        s.send(HELLO)
        s.send(wire.message(wire.DRAW, n, 5))
        assert ends(s), n
        s.close()
    wait_until(lambda: not running.broker.stats().clients)


def test_another_version_is_told_which_one_is_spoken(running):
    s = raw_socket(running.path)
    s.send(HELLO[:4] + struct.pack("<H", 2) + HELLO[6:])
    answer = wire.parse(s.recv(4096))
    assert (answer.type, answer.numbers[0]) == (wire.REFUSED, 1) and b"version 1" in answer.rest
    assert ends(s)
    s.close()


def test_random_and_mutated_messages(running):
    rng = random.Random(8)
    for turn in range(300):
        s = raw_socket(running.path)
        s.settimeout(1)
        try:
            for packet in (HELLO, wire.message(wire.DRAW, 32, turn)):
                data = bytearray(packet)
                if turn % 2:
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                else:
                    data = bytearray(rng.randbytes(rng.choice((0, 1, 23, 24, 25, 4095, 4096))))
                s.send(data)
        except OSError:
            pass
        s.close()
    wait_until(lambda: not running.broker.stats().clients)


def test_two_draws_at_once_and_a_reader_that_never_reads(running):
    s = raw_socket(running.path)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    s.send(HELLO)
    sent = 0
    s.settimeout(0.2)
    try:
        while sent < 5000:  # never reads an answer: ends when its answers no longer fit
            s.send(wire.message(wire.DRAW, 2048, sent))
            sent += 1
            time.sleep(0.0005)
    except OSError:
        pass
    wait_until(lambda: not running.broker.stats().clients)
    assert sent < 5000
    s.close()


def test_a_connection_that_says_nothing_is_dropped_and_others_go_on(running):
    silent = [raw_socket(running.path) for _ in range(20)]
    with Source.open(running.uri) as source:
        assert source.take(4096, 5)
    wait_until(lambda: not running.broker.stats().clients, 10)
    for s in silent:
        assert ends(s)
        s.close()


def test_descriptors_that_are_sent_are_not_kept(running):
    before = len(os.listdir("/proc/self/fd"))
    s = raw_socket(running.path)
    r, w = os.pipe()
    for _ in range(20):
        try:
            s.sendmsg([HELLO], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [r] * 100))])
        except OSError:
            break
    s.close()
    os.close(w)
    os.close(r)
    wait_until(lambda: not running.broker.stats().clients)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_connecting_and_leaving_leaves_nothing(running):
    def cycle(n):
        for i in range(n):
            connection = Connection(running.path, shared=bool(i % 2))
            connection.close()
        wait_until(lambda: not running.broker.stats().clients)
        maps = Path("/proc/self/maps").read_text().count("memfd:everett")
        return len(os.listdir("/proc/self/fd")), maps

    assert cycle(20) == cycle(300)


# --- the shared memory ---


@pytest.mark.parametrize("tail", [2**64 - 1, 1 << 20, 65537])
def test_a_tail_that_cannot_be_true_ends_the_client(running, tail):
    liar = Shared(running.path)
    wait_until(lambda: running.broker.stats().clients[0].unread >= 49152)
    liar.write(TAIL, struct.pack("<Q", tail))
    liar.wake()
    wait_until(lambda: not running.broker.stats().clients)
    wait_until(lambda: any("tail cannot be true" in e.text for e in running.events))
    assert ctypes.string_at(liar.at + HEADER_BYTES, liar.bytes) == bytes(liar.bytes)  # zeroed when it was dropped
    liar.connection.close()


def test_a_tail_that_goes_back_ends_the_client(running):
    liar = Shared(running.path)
    wait_until(lambda: running.broker.stats().clients[0].unread >= 49152)
    given = running.broker.stats().clients[0].bytes
    liar.write(TAIL, struct.pack("<Q", 40_000))
    liar.wake()
    wait_until(lambda: running.broker.stats().clients[0].bytes > given)
    liar.write(TAIL, struct.pack("<Q", 0))
    liar.wake()
    wait_until(lambda: not running.broker.stats().clients)
    liar.connection.close()


def test_shared_memory_cannot_be_truncated_grown_or_unsealed(running):
    hostile = Shared(running.path)
    for size in (0, 4096, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(hostile.memfd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(hostile.memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    hostile.connection.close()


def test_scribbling_over_everything_harms_nobody_else(running):
    rng = random.Random(5)
    hostile = Shared(running.path)
    with Source.open(running.uri) as source:
        for _ in range(50):
            hostile.write(0, rng.randbytes(HEADER_BYTES + hostile.bytes))
            hostile.wake()
            assert source.take(2048, 5)
    wait_until(lambda: not running.broker.stats().clients)
    hostile.connection.close()


def test_an_eventfd_that_was_emptied_and_made_to_block_stalls_nobody(running):
    hostile = Shared(running.path)
    flags = fcntl.fcntl(hostile.eventfd, fcntl.F_GETFL)
    fcntl.fcntl(hostile.eventfd, fcntl.F_SETFL, flags & ~os.O_NONBLOCK)
    for _ in range(200):
        hostile.wake()
        os.read(hostile.eventfd, 8)
    with Source.open(running.uri) as source:
        assert source.take(65504, 5)
    hostile.connection.close()


def test_waking_without_end_ends_the_client(running):
    hostile = Shared(running.path)
    wait_until(lambda: running.broker.stats().clients[0].unread >= 49152)
    deadline = time.monotonic() + 20
    while running.broker.stats().clients and time.monotonic() < deadline:
        for _ in range(500):
            hostile.wake()
    wait_until(lambda: any("wakes the broker for nothing" in e.text for e in running.events))
    hostile.connection.close()


def test_clients_that_never_read_cost_their_ring_and_no_more(folder):
    """1,000 of them: 68 KiB each, and the one that reads is served at once."""
    with BrokerProcess(folder / "s", "sim:seed=7") as broker:

        def resident():
            text = Path(f"/proc/{broker.process.pid}/status").read_text()
            found = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines() if line.startswith("Rss")}
            return found["RssAnon"] + found["RssShmem"]  # kB

        before = resident()
        lazy = []
        for _ in range(1000):
            connection = Connection(folder / "s", shared=True)
            for fd in connection.take_descriptors():
                os.close(fd)
            lazy.append(connection)
        with Source.open(f"broker:{folder / 's'}") as source:
            started = time.monotonic()
            assert source.take(65504, 5)
            assert time.monotonic() - started < 5
        assert resident() - before < 1000 * 80, (before, resident())
        for connection in lazy:
            connection.close()
        wait_until(lambda: resident() - before < 10_000)


# --- impostors ---


class Impostor:
    """Listens at a path and answers every hello with `answer`."""

    def __init__(self, path: Path, answer: bytes, descriptors=()):
        self.listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listening.bind(str(path))
        self.listening.listen()
        self.answer, self.descriptors = answer, descriptors
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self):
        while select.select([self.listening], [], [], 20)[0]:
            s, _ = self.listening.accept()
            if not s.recv(4096):
                return
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", self.descriptors))] if self.descriptors else []
            s.sendmsg([self.answer], rights)
            s.settimeout(5)
            s.recv(1)
            s.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        s.connect(self.listening.getsockname())
        s.close()
        self.thread.join()
        self.listening.close()


def test_paths_that_others_can_change_are_refused(folder):
    listener = Listener(folder / "s", "")
    check_path(folder / "s")
    for mode in (0o777, 0o775, 0o1777):
        os.chmod(folder, mode)
        with pytest.raises(SourceError, match="others can write to .*anybody could serve"):
            Source.open(f"broker:{folder / 's'}")
    os.chmod(folder, 0o700)
    inner = folder / "a" / "b"
    inner.mkdir(parents=True)
    os.chmod(folder / "a", 0o777)
    with pytest.raises(SourceError, match="others can write to"):
        Listener(inner / "s", "")
    (folder / "file").write_text("")
    with pytest.raises(SourceError, match="is no socket"):
        Source.open(f"broker:{folder / 'file'}")
    listener.close()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to serve as somebody else")
def test_a_broker_of_another_user_is_refused(folder):
    code = (
        "import os, socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.bind(sys.argv[1])\n"
        "os.chmod(sys.argv[1], 0o666); os.setuid(65534); s.listen(); print('up', flush=True); s.accept(); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, folder / "s"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    with pytest.raises(SourceError, match="(?s)served by user .*an impostor; nothing was taken"):
        Source.open(f"broker:{folder / 's'}")
    process.communicate()


def _welcome(rest: bytes, ring: int = 65536) -> bytes:
    body = struct.pack("<QII", 1, ring, 0) + rest
    return struct.pack("<IHHII", wire.MAGIC, wire.VERSION, wire.WELCOME, 16 + len(body), 0) + body


def test_what_is_not_a_brokers_answer_is_refused(folder):
    serves = wire.Serves("quantum", bytes(16), wire.Fraction(4), "assumed", "n", "s", "c", "u:", 80, False, False).pack()
    unsealed = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 65536 + 4096)
    event = os.dup(unsealed)  # any descriptor: it is not looked at before the memory is
    cases = [
        (b"x" * 30, (), "no header"),
        (_welcome(serves), (), "without what was asked for"),
        (_welcome(serves[:-1]), (unsealed, event), "what it serves takes"),
        (_welcome(serves.replace(b"quantum", b"QUANTUM")), (unsealed, event), "a kind or a min-entropy"),
        (_welcome(serves), (unsealed, event), "not sealed memory"),
        (_welcome(serves, 5000), (unsealed, event), "power of two"),
    ]
    for answer, descriptors, says in cases:
        with Impostor(folder / "s", answer, descriptors), pytest.raises(SourceError, match=says):
            Source.open(f"broker:{folder / 's'}")
        (folder / "s").unlink()
    os.close(unsealed)
    os.close(event)


# --- kills ---


def test_no_block_twice_among_clients_that_are_killed_and_brokers_that_are_killed(folder, tmp_path):
    """The short form; `make soak` is the long one."""
    rng = random.Random(1)
    files, clients, killed = [], {}, 0
    with BrokerProcess(folder / "s", "sim:seed=1") as broker:
        deadline = time.monotonic() + 60
        while killed < 3 or broker.sources == ("sim:seed=1",):
            assert time.monotonic() < deadline
            for _ in range(3 - len(clients)):
                files.append(tmp_path / str(len(files)))
                clients[files[-1]] = client(folder / "s", files[-1], 60)
            time.sleep(rng.uniform(0.1, 0.4))
            drawing = [f for f in clients if f.exists() and f.stat().st_size]
            if killed == 2 and broker.sources == ("sim:seed=1",) and len(drawing) == 3:
                broker.kill(signal.SIGKILL)
                broker.sources = ("sim:seed=2",)
                broker.start()
            elif drawing and (killed < 2 or broker.sources == ("sim:seed=2",)):
                victim = clients.pop(rng.choice(drawing))
                victim.kill()
                victim.communicate()
                killed += 1
        sizes = {f: f.stat().st_size for f in clients}
        wait_until(lambda: any(f.stat().st_size > sizes[f] for f in clients), 20)
        for c in clients.values():
            c.kill()
            c.communicate()
        assert check_no_block_twice(files) > 2000


def test_refusals_are_errors_of_this_package(folder):
    with Running(folder / "s", "sim:seed=7", max_clients=1) as running, Source.open(running.uri):
        with pytest.raises(EverettError, match="has 1 clients, and takes no more"):
            Source.open(running.uri)
