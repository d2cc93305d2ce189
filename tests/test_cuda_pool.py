"""Direct words on a GPU, on an emulated runtime whose streams run late and in any order that real ones allow."""

import contextlib
import ctypes

import numpy as np
import pytest
import torch
from processes import in_forked_child

import everett_cuda as ev
from everett_cuda import _C, kernels, session
from everett_cuda.errors import EverettError, ForkedError, HealthAlarm, SourceError, SourceExhausted, Starved
from everett_cuda.kernels import INT32, KINDS, TYPES
from everett_cuda.pool import LANE_WORDS, SLAB_WORDS, SLABS, DirectPool

STREAM, OTHER = 5, 6  # handles of "torch's" streams
OUT_OF_MEMORY = 2


class Gpu:
    """The emulated module with what a test turns: the current stream, and whether work waits."""

    def __init__(self, module):
        self.module, self.control, self.stream = module, module.control, STREAM
        self.pool = DirectPool(0, module, lambda index: self.stream, torch.device("cpu"))

    def draw(self, kind="words", n=10, dtype=None, p=None):
        dtype = dtype or (torch.int32 if kind == "words" else torch.float32)
        out = torch.full((n,), 77).to(dtype)
        self.pool.convert(KINDS[kind][0], INT32 if dtype == torch.int32 else TYPES[dtype], p, out)
        return out

    @contextlib.contextmanager
    def deferred(self):
        self.control.emulation_defer(1)
        yield
        self.control.emulation_defer(0)

    def capture(self, op):
        """(op's result, number of the graph)"""
        self.control.emulation_begin_capture(self.stream)
        out = op()
        return out, self.control.emulation_end_capture()


class Words:
    """Stands in for a source: a real ring with counted words in it, and the real errors of a real source."""

    def __init__(self, words):
        self.source = ev.Source.open("sim:seed=7")
        self.source.ring.end(_C.Take.closed)  # its own bits never show
        self.ring = _C.Ring(1 << 20)
        self.words = words
        self.ring.put(words.view(np.uint8))
        self.source.ring = self.ring


@pytest.fixture
def gpu(emulated):
    ev.close()
    gpu = Gpu(emulated)
    yield gpu
    emulated.control.emulation_defer(0)
    gpu.pool.forget()


def counted(n):
    """n different 64-bit words, none zero."""
    return np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x0001000100010001) + np.uint64(0x1234567800000000)


@pytest.fixture
def ring(monkeypatch):
    """The ring behind an open source, filled by the test: `put` words, `end`, `destroy_unread` as the pipeline does."""
    source = ev.open("sim:seed=7")
    ring = _C.Ring(1 << 20)
    monkeypatch.setattr(source, "ring", ring)
    yield ring
    ev.close()
