"""Ledgers for tests: of a source of their own (no torch, no keys), and files that are written again as a forger would."""

import json
import time

from everett_cuda.ledgers import chain
from everett_cuda.ledgers.writer import Ledger

KINDS = ("fresh", "stretched", "shared", "reused", "replayed")


class Run:
    """A subject whose draws are what a test says."""

    def __init__(self, *sources, **draws):
        self._sources = list(sources)
        self.kinds = draws
        self.told = {}

    def sources(self):
        return self._sources

    def draws(self):
        counts = {**dict.fromkeys((*KINDS, "unverified", "replay_misses", "waits"), 0), **self.kinds}
        return {**counts, "draws": sum(counts[kind] for kind in KINDS)}

    def ranks(self):
        return self.told

    def settings(self):
        return {"freshness": "op", "timeout_s": 60.0}


def written(path, *sources, key=None, counts=1, **draws):
    """The path of a whole ledger."""
    with Ledger(path, Run(*sources, **draws), key, interval_s=600) as ledger:
        for _ in range(counts):
            ledger.count()
    return path


def records_of(path):
    """What stands in a file, by Python's own json alone."""
    return [json.loads(line) for line in path.read_text("ascii").splitlines()]


def chained(path, records):
    """Writes records as a forger without a key can: every hash is right. Returns the path."""
    end = chain.Chain()
    with path.open("wb") as file:
        for record in records:
            line = end.line({k: v for k, v in record.items() if k not in ("n", "prev")})
            file.write(line + b"\n")
            end = end.moved(line)
    return path


def until(what, limit_s=20.0):
    """Waits until what() is true."""
    deadline = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)
