"""An emulated GPU behind CPU tensors, for the tests of dispatch, graphs and pools: streams that can be deferred, captures
that can be replayed, and a stand-in for torch's CUDA generator."""

import contextlib

import numpy as np
import torch

from everett_cuda import _C, kernels_cuda

STREAM, OTHER = 5, 6  # handles of torch's streams


class Generator:
    """Stands in for torch's generator of a GPU: a seed, and an offset in steps of 4."""

    def __init__(self, seed=2**63 + 11):
        self.seed, self.offset = seed, 0

    def initial_seed(self):
        return self.seed

    def get_offset(self):
        return self.offset

    def set_offset(self, offset):
        assert offset % 4 == 0
        self.offset = offset


class Emulation:
    """The emulated module, and what a test turns: the current stream, whether work waits, captures."""

    def __init__(self, module):
        self.module, self.control, self.stream, self.kept = module, module.control, STREAM, []

    @contextlib.contextmanager
    def deferred(self):
        self.control.emulation_defer(1)
        yield
        self.control.emulation_defer(0)

    def captured(self, op):
        """(op's result, number of the graph). Of an op only our kernels are captured, what torch does happens once. What is
        allocated meanwhile is kept, as the memory of a graph is."""
        empty, empty_like = torch.empty, kernels_cuda._empty_like

        def keep(allocate):
            return lambda *args, **kwargs: self.kept.append(allocate(*args, **kwargs)) or self.kept[-1]

        self.control.emulation_begin_capture(self.stream)
        try:
            torch.empty, kernels_cuda._empty_like = keep(empty), keep(empty_like)
            result = op()
        finally:
            torch.empty, kernels_cuda._empty_like = empty, empty_like
            graph = self.control.emulation_end_capture()
        return result, graph

    def replay(self, graph):
        self.control.emulation_replay(graph, self.stream)
        if error := self.control.emulation_error():
            raise RuntimeError(error.decode())


class EmulatedGpu(Emulation):
    """With kernels that the table of devices can be given."""

    def __init__(self, module, index=0):
        super().__init__(module)
        self.generator = Generator()
        self.kernels = kernels_cuda.Cuda(index, module, self.generator, lambda _: self.stream, torch.device("cpu"))

    def nonce(self, back=1):
        """The nonce of the last draw but `back - 1`."""
        return np.array([self.generator.seed, self.generator.offset - 4 * back], "<u8").tobytes()

    def warm(self):
        """One op outside of any capture, as torch asks for: it takes the keys 0 (for graphs) and 1."""
        self.kernels.draw()


def numbered(n):
    """n keys: 1, 2, ... as numbers of 32 bytes."""
    return b"".join(i.to_bytes(32, "little") for i in range(1, n + 1))


def key(draw):
    """The key of draw number `draw`, from 0: the first key goes to the graphs."""
    return (draw + 2).to_bytes(32, "little")


def record_words(key_bytes, nonce):
    return np.frombuffer(_C.derive_record(key_bytes, nonce), "<u4")


def as_numpy(t):
    """numpy values; bf16 and fp8 as patterns."""
    t = t.detach().contiguous()
    if t.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        return t.view(torch.uint16 if t.dtype == torch.bfloat16 else torch.uint8).numpy()
    return t.numpy()


def same_bits(a, b):
    return a.dtype == b.dtype and as_numpy(a).tobytes() == as_numpy(b).tobytes()
