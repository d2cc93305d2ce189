"""`make soak`: a broker with 8 and then 64 clients, a minute each, while clients and brokers are killed at random moments;
then 10,000 connections that come and go, and 10^8 numbered blocks to 8 clients. Prints its figures; exits with 1 when a
block came twice or anything grew.

    python broker_soak.py [--seconds 60] [--cycles 10000] [--blocks 100000000]
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
from broker_rig import BrokerProcess, check_no_block_twice, client, socket_folder

from everett_cuda import _C
from everett_cuda.broker.listening import Listener
from everett_cuda.drivers import broker_wire as wire
from everett_cuda.drivers.broker_connection import Connection


def chaos(n: int, seconds: float, seed: int) -> str:
    """n clients at a time; every run of the broker serves bytes of another seed, so that no block may ever come twice."""
    folder, out, rng = socket_folder(), Path(tempfile.mkdtemp(prefix="soak")), random.Random(seed)
    files, clients, killed, restarts = [], [], 0, 0
    # 2 MB/s raw: the files stay small enough to be compared.
    with BrokerProcess(folder / "s", f"sim:seed={seed},rate=2MB/s") as broker:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            clients = [c for c in clients if c.poll() is None or c.communicate() is None]
            while len(clients) < n:
                files.append(out / str(len(files)))
                clients.append(client(folder / "s", files[-1], seconds))
            time.sleep(rng.uniform(0.2, 1.0))
            if rng.random() < 0.6:
                rng.choice(clients).kill()
                killed += 1
            elif rng.random() < 0.3:
                restarts += 1
                broker.kill(rng.choice((signal.SIGKILL, signal.SIGTERM)))
                broker.sources = (f"sim:seed={seed + restarts},rate=2MB/s",)
                broker.start()
        for c in clients:
            c.kill()
            c.communicate()
    blocks = check_no_block_twice(files)
    assert blocks > 1000 and killed and restarts, f"{blocks} blocks, {killed} and {restarts} kills are no test"
    shutil.rmtree(out)
    shutil.rmtree(folder)
    return f"{n} clients, {seconds:g} s: {blocks:,} blocks, none twice; {killed} clients and {restarts} brokers were killed"


_COUNT = """
import sys
import numpy as np
from everett_cuda import _C
from everett_cuda.source import Source
numbers, piece = [], bytearray(1 << 15)
with Source.open("broker:" + sys.argv[1]) as source:
    while (answer := source.ring.take_into(piece, 5.0)) == _C.Take.ok:
        numbers.append(np.frombuffer(piece, np.uint64)[::4].copy())
np.save(sys.argv[2], np.concatenate(numbers))
print(answer.name)
"""


def numbered(n: int) -> str:
    """n conditioned blocks that are numbered, to 8 clients at full speed: each number comes to one of them at most."""
    folder, out = socket_folder(), Path(tempfile.mkdtemp(prefix="soak"))
    listener, ring = Listener(folder / "s", ""), _C.Ring(1 << 22)
    serves = wire.Serves("simulated", bytes(16), Fraction(4), "assumed", "numbers", "", "", "pool:", 80, False, False)
    server = _C.BrokerServer(listener.fileno(), [ring], serves.pack())
    files = [out / f"{i}.npy" for i in range(8)]
    clients = [subprocess.Popen([sys.executable, "-c", _COUNT, folder / "s", f], stdout=subprocess.PIPE) for f in files]
    start, step = time.monotonic(), 1 << 16
    for first in range(0, n, step):
        blocks = np.zeros((min(step, n - first), 4), np.uint64)
        blocks[:, 0] = np.arange(first, first + len(blocks))
        ring.put(blocks.tobytes())
    ring.end(_C.Take.ended)
    assert {client.communicate()[0].strip() for client in clients} == {b"ended"}
    took = time.monotonic() - start
    server.stop()
    listener.close()
    seen, told = np.zeros(n, bool), 0
    for file in files:
        numbers = np.load(file)
        assert (np.diff(numbers.astype(np.int64)) > 0).all(), "a client had a block twice, or out of order"
        assert not seen[numbers].any(), "two clients had one block"
        seen[numbers] = True
        told += len(numbers)
    # A client's last piece is lost when less than a piece is left; nothing else may be.
    assert told == seen.sum() and told > 0.99 * n, f"only {told:,} of {n:,} blocks came"
    shutil.rmtree(out)
    shutil.rmtree(folder)
    return f"{told:,} of {n:,} numbered blocks came to 8 clients in {took:.0f} s, none twice"


def cycles(n: int) -> str:
    """Connections that come and go, half with shared memory; the broker's descriptors and memory before and after."""
    folder = socket_folder()
    with BrokerProcess(folder / "s", "sim:seed=9") as broker:

        def held():
            proc = Path(f"/proc/{broker.process.pid}")
            pages = int((proc / "statm").read_text().split()[1])
            return len(os.listdir(proc / "fd")), pages * 4

        for i in range(500):
            Connection(folder / "s", shared=bool(i % 2)).close()
        time.sleep(1)
        before = held()
        for i in range(n):
            Connection(folder / "s", shared=bool(i % 2)).close()
        time.sleep(1)
        after = held()
    shutil.rmtree(folder)
    assert after[0] == before[0] and after[1] - before[1] < 2048, (before, after)
    return f"{n:,} connections came and went: descriptors {before[0]} -> {after[0]}, resident {before[1]} -> {after[1]} kB"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--cycles", type=int, default=10_000)
    parser.add_argument("--blocks", type=int, default=100_000_000)
    arguments = parser.parse_args()
    try:
        for n, seed in ((8, 1000), (64, 2000)):
            print(chaos(n, arguments.seconds, seed), flush=True)
        print(cycles(arguments.cycles), flush=True)
        print(numbered(arguments.blocks), flush=True)
    except AssertionError as error:
        print(f"FAILED: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
