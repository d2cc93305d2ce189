"""A broker as a process of its own, for tests: started, killed, started again; and clients that write down what they got."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from commands import everett_process


class BrokerProcess:
    """`everett serve SOURCES --socket PATH`, whose log is in `lines`. Use in a `with`."""

    def __init__(self, path: Path, *sources, options=()):
        self.path, self.sources, self.options = path, sources, options
        self.lines: list[str] = []
        self.start()

    def start(self) -> None:
        """Returns when it serves."""
        self.process = everett_process("serve", *self.sources, "--socket", self.path, "--group", "", *self.options)
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()
        self.wait_for("serving ", timeout_s=60.0)  # a busy machine takes its time

    def _read(self, stdout) -> None:
        for line in stdout:
            self.lines.append(line)

    def wait_for(self, text: str, times: int = 1, timeout_s: float = 20.0) -> str:
        """The line that has `text` for the times-th time since the start."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = [line for line in self.lines if text in line]
            if len(found) >= times:
                return found[times - 1]
            if self.process.poll() is not None and not self._reader.is_alive():
                raise AssertionError(f"the broker ended: {self.process.stderr.read()}\n{''.join(self.lines)}")
            assert time.monotonic() < deadline, f"no line with {text!r} in\n{''.join(self.lines)}"
            time.sleep(0.01)

    def kill(self, how: int = signal.SIGKILL) -> int:
        """Ends it; its exit status."""
        self.process.send_signal(how)
        code = self.process.wait(20)
        self._reader.join(5)
        self.process.stdout.close()
        self.process.stderr.close()
        self.lines.clear()
        return code

    def __enter__(self) -> "BrokerProcess":
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.kill()
        else:
            self._reader.join(5)
            self.process.stdout.close()
            self.process.stderr.close()


CLIENT = """
import sys, time, warnings
from everett_cuda.errors import EverettError
from everett_cuda.source import Source
warnings.simplefilter("ignore")
uri, file, seconds, pieces = sys.argv[1], sys.argv[2], float(sys.argv[3]), [int(n) for n in sys.argv[4].split(",")]
turn = 0
with open(file, "ab", buffering=0) as out:
    source = Source.open(uri)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            out.write(source.take(pieces[turn % len(pieces)], 0.5))
        except EverettError as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\\n")
        turn += 1
    source.close()
"""


def client(path: Path, file: Path, seconds: float, pieces=(32, 64, 1024)) -> subprocess.Popen:
    """A process that draws for so long, and writes what it drew to `file` (whole blocks: pieces are multiples of 32)."""
    command = [sys.executable, "-c", CLIENT, f"broker:{path}", str(file), str(seconds), ",".join(map(str, pieces))]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def blocks_of(files) -> list[bytes]:
    """All whole blocks of 32 bytes in these files, in order. A killed client may have written a piece of one."""
    found = []
    for file in files:
        data = file.read_bytes() if file.exists() else b""
        found += [data[i : i + 32] for i in range(0, len(data) - 31, 32)]
    return found


def check_no_block_twice(files) -> int:
    """AssertionError if a block of 32 bytes came twice, to whomever, or is empty; returns how many there were."""
    found = blocks_of(files)
    assert bytes(32) not in found, "somebody was handed zeros"
    assert len(set(found)) == len(found), f"{len(found) - len(set(found))} of {len(found)} blocks came twice"
    return len(found)


def socket_folder() -> Path:
    """A folder that clients trust, with a path short enough for a socket's address."""
    return Path(tempfile.mkdtemp(prefix="evb", dir="/tmp"))
