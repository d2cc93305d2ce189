"""Checks that several real processes run together over gloo: one start for a whole list of them, since it costs seconds.
They are forked from a server that has imported torch, which then costs its import once and not once a process.

A check is a function of a `Job`; it runs on every rank. `run(n, checks)` gives for each check what went wrong, by rank.
"""

import os
import queue
import socket
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_PRELOADED = [
    "everett_cuda.distributed",
    "everett_cuda.nn",
    "everett_cuda.noise",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.utils.checkpoint",
]
TIMEOUT_S = 30.0  # of a collective: a check that fails on one rank must not hang the others


class Job:
    """rank, size: of the job. `gather` is a collective that the checks use themselves, apart from the package's."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    def gather(self, what) -> list:
        out = [None] * self.size
        dist.all_gather_object(out, what)
        return out


def _work(rank, size, port, checks, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.pop("EVERETT_SOURCE", None)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT_S))
    import everett_cuda as ev

    for check in checks:
        try:
            check(Job(rank, size))
            wrong = ""
        except BaseException:
            wrong = traceback.format_exc()
        results.put((check.__name__, rank, wrong))
        ev.distributed.teardown()
        ev.close()
        ev.set_freshness("op")
        try:
            dist.barrier()
        except RuntimeError:  # a rank has left
            break
    results.close()
    results.join_thread()
    dist.destroy_process_group()


def run(size: int, checks: list, limit_s: float = 240.0) -> dict[str, dict[int, str]]:
    """For each check's name, by rank: "" or a traceback. A rank that never answered is missing."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    results = context.Queue()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    processes = [context.Process(target=_work, args=(r, size, port, checks, results), daemon=True) for r in range(size)]
    for p in processes:
        p.start()
    out = {check.__name__: {} for check in checks}
    deadline = time.monotonic() + limit_s
    missing = size * len(checks)
    while missing and time.monotonic() < deadline:
        try:
            name, rank, wrong = results.get(timeout=1.0)
        except queue.Empty:
            if not any(p.is_alive() for p in processes):
                break
            continue
        out[name][rank] = wrong
        missing -= 1
    for p in processes:
        p.join(max(0.0, min(10.0, deadline - time.monotonic())))
        if p.is_alive():
            p.kill()
            p.join()
    return out


def right(results: dict[int, str], size: int) -> None:
    """Fails with what went wrong on which rank."""
    wrong = {rank: text for rank, text in results.items() if text}
    assert not wrong, "\n".join(f"rank {rank}: {text}" for rank, text in sorted(wrong.items()))
    assert sorted(results) == list(range(size)), f"only ranks {sorted(results)} of {size} finished"
