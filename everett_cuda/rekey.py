"""torch's own generators, given a state of quantum origin at every step boundary: the second tier of coverage.

What no swap reaches (fused attention on a GPU, nn.LSTM's dropout, TorchScript, inductor's own random numbers, C++) draws
from torch's generators all the same. Here their states are replaced: the expansion stays torch's (mt19937 and Philox,
neither cryptographic), the state it starts from is new in every step. The CPU's generator takes 624 words (2,496 bytes),
a GPU's a 64-bit seed with offset 0; both are ChaCha20 words of one key.

Why the nonces of our own draws stay right, though they come from these generators. A nonce need not be secret, it must
not repeat under one key; a state of 19,937 random bits repeats no sooner than one that was never replaced. And a
recomputation does not see the new state: torch.utils.checkpoint puts the saved one back, which gives the nonce of the
forward, and that finds its key on the tape, whichever step it is. Boundaries inside a backward or a capture are none
(`keys.step`), so no state changes under a recomputation.

Why ranks agree afterwards where they agreed before. A generator's new state is a function of its old one (the nonce that
the draw takes from it) and of a key of the world family: equal states under one key stay equal, states that differ on
purpose stay different.
"""

import threading
from types import TracebackType

import numpy as np
import torch

from . import followers, kernels, keys
from .errors import EverettError
from .ops import STREAMS

_MT_WORDS = 624
CPU_WORDS = _MT_WORDS + 2  # and a seed to show, `initial_seed`, which tells nothing of the state
# torch's legacy layout (CPUGeneratorImpl.cpp): u64 seed, i32 left, i32 seeded, u64 next, 624 words as u64, then cached
# normals, absent while zero. left = 1: the first draw twists the state.
_MT_STATE = np.dtype(
    [("seed", "<u8"), ("left", "<i4"), ("seeded", "<i4"), ("next", "<u8"), ("words", "<u8", _MT_WORDS), ("cached", "V40")]
)


def words_of(record: bytes | torch.Tensor, n: int) -> np.ndarray:
    """n 32-bit words (uint32) of the ChaCha20 stream of a draw's record."""
    fill = kernels.Fill("words", (n,), torch.int32, STREAMS["chacha20"])
    return kernels.Cpu.fill(kernels.record_bytes(record), fill, None).numpy().view(np.uint32)


def cpu_state(words: np.ndarray) -> torch.Tensor:
    """The state (uint8, as `torch.get_rng_state`) of torch's CPU generator with these CPU_WORDS words
    (uint32)."""
    if torch.get_rng_state().numel() != _MT_STATE.itemsize:
        raise EverettError(
            f"torch {torch.__version__} keeps the state of its CPU generator in {torch.get_rng_state().numel()} bytes, "
            f"not in the {_MT_STATE.itemsize} that everett_cuda knows. Use a torch that it lists as tested."
        )
    state = np.zeros((), _MT_STATE)
    state["words"], (low, high) = words[:_MT_WORDS], words[_MT_WORDS:].tolist()
    state["seed"], state["left"], state["seeded"] = low | high << 32, 1, 1
    return torch.frombuffer(bytearray(state.tobytes()), dtype=torch.uint8)


def rekey_cpu() -> None:
    """A new state for torch's CPU generator, from a draw of the world family."""
    torch.set_rng_state(cpu_state(words_of(keys.draw_record(world=True), CPU_WORDS)))


def rekey_gpu(index: int, generator: torch.Generator) -> None:
    """A new seed, and offset 0, for the generator of GPU `index`, from a draw of the world family on that GPU."""
    low, high = words_of(keys.draw_cuda_record(index, generator, world=True), 2).tolist()
    generator.manual_seed(low | high << 32)


class _Rekeying:
    """The follower that rekeys at boundaries while it is on."""

    def __init__(self):
        self.times = 0
        self._holders = 0  # calls of rekey_torch() that are in force
        self._follows = False
        self._graphsafe: bool | None = None  # torch's setting before we changed it
        self._lock = threading.RLock()

    @property
    def on(self) -> bool:
        return self._holders > 0

    def start(self) -> None:
        with self._lock:
            keys.require_source()
            if not self._follows:
                followers.follow(self)
                self._follows = True
            if not self.on:
                self.times = 0
                self._set_graphsafe(False)
            self._holders += 1
            try:
                self._rekey()
            except BaseException:
                self.stop()
                raise
            if torch.cuda.is_available() and not torch.cuda.is_initialized():
                torch.cuda._lazy_call(self._rekey_gpus)  # before the first GPU op, which comes before any boundary

    def stop(self, everywhere: bool = False) -> None:
        with self._lock:
            if not self.on:
                return
            self._holders = 0 if everywhere else self._holders - 1
            if not self.on:
                self._set_graphsafe(None)

    def _set_graphsafe(self, value: bool | None) -> None:
        """Compiled and checkpointed GPU code otherwise clones generators of its own, seeded once, that nothing reaches.

        None: as it was. Code that was compiled before keeps its clones.
        """
        from torch._functorch import config

        if not hasattr(config, "graphsafe_rng_functionalization"):
            return
        if value is None:
            config.graphsafe_rng_functionalization = self._graphsafe
        else:
            self._graphsafe = config.graphsafe_rng_functionalization
            config.graphsafe_rng_functionalization = value

    def _rekey(self) -> None:
        rekey_cpu()
        if torch.cuda.is_initialized():
            self._rekey_gpus()
        self.times += 1

    def _rekey_gpus(self) -> None:
        if self.on:
            for index, generator in enumerate(torch.cuda.default_generators):
                rekey_gpu(index, generator)

    def end_step(self, by_optimizer: bool) -> None:
        if self.on:
            self._rekey()

    def forget(self) -> None:
        """Without a source there is nothing to rekey from; going on silently would be a pseudo-random fallback."""
        self.stop(everywhere=True)

    def status(self) -> str:
        return f"torch's RNG:  rekeyed at each step boundary, {self.times:,} times so far" if self.on else ""


_rekeying = _Rekeying()


class Rekeyed:
    """What `rekey_torch()` returns: leaving it as a context takes that one call back."""

    def __enter__(self) -> "Rekeyed":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _rekeying.stop()


def rekey_torch(on: bool = True) -> Rekeyed | None:
    """torch's own generators (the CPU's, every NVIDIA GPU's) take a new state of quantum origin now and at every step
    boundary: an optimizer's step or `ev.step()`.

    For what `intercept` and `install` cannot reach. One key serves all that torch draws in a step, expanded by torch's
    own generators. `ev.rekey_torch()` stays in force until `ev.rekey_torch(False)` or `ev.close()`; as a context until
    it is left. The generators then go on from where they are, pseudo-randomly. `torch.manual_seed` in between holds until
    the next boundary. Not reached: generators that a program makes itself, GPU code that was compiled with checkpointing
    before (its generators are clones), devices other than these.

    Raises SourceNotOpen, ForkedError, and at each boundary what a draw raises when there is no key.
    """
    if not on:
        _rekeying.stop(everywhere=True)
        return None
    _rekeying.start()
    return Rekeyed()


def is_rekeyed(device: torch.device) -> bool:
    """Whether torch's default generator of that device is rekeyed."""
    return _rekeying.on and device.type in ("cpu", "cuda")
