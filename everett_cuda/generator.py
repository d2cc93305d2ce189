"""`ev.Generator`: what code that passes `generator=` gives to our functions, in the shape of a torch.Generator.

It decides *which* number, never *what* it is: a draw has a nonce of an identity (64 bits, from the generator's number and
its seed) and a count, and the key is the source's. So equal states give equal bits within a step, and other bits in the
next one, whatever the seed. (torch's own generators serve the draws that pass none in the same way.)

It is no torch.Generator on purpose: torch's functions refuse it, and ours refuse torch's, so that neither stands in for the
other unnoticed.
"""

import ctypes
import hashlib
import itertools
import threading

import torch

from . import kernels
from .errors import EverettError
from .nonce import in_plain_eager

_MAGIC = b"everett1"
_numbers = itertools.count(1)  # in order of creation, so that ranks that run one program agree


def _identity(number: int, seed: int) -> int:
    """64 bits that no other number and seed give, and no (seed, offset) of torch's CUDA generators meets by plan."""
    told = b"everett/1/generator\0" + number.to_bytes(8, "little") + seed.to_bytes(8, "little")
    return int.from_bytes(hashlib.sha256(told).digest()[:8], "little")


class Generator:
    """A stream of nonces for `generator=` of ev.rand, randn, randint, randperm, normal, multinomial and all other noise.

    device: the CPU or a GPU; the functions that it is passed to must work there. The state is (number, seed, count): a new
    object has a number of its own and seed 0, so two objects never share bits unless one has the other's state. Methods as
    torch.Generator's. Thread-safe. Not for functorch transforms, compilation or captured CUDA graphs, where the count would
    stand still: there leave it out.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        device = torch.device(device)
        self._runs = kernels.of_device(device)  # refuses what has no kernels
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device
        self._lock = threading.Lock()
        self._own_number = self._number = next(_numbers)
        self._seed = self._count = 0
        self._identity = _identity(self._number, 0)

    @property
    def device(self) -> torch.device:
        return self._device

    def manual_seed(self, seed: int) -> "Generator":
        """Begins again at count 0 of `seed`, -2^63 to 2^64 - 1 (negative ones count from 2^64 down). Two generators with one
        seed still differ; to repeat one's bits within a step, give the other its state."""
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed: an integer, got {type(seed).__name__}")
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed: from -2**63 to 2**64 - 1, got {seed}")
        with self._lock:
            self._set(self._own_number, seed % 2**64, 0)
        return self

    def seed(self) -> int:
        """Begins again at count 0 of a seed that is 64 direct bits of the source; returns it."""
        from .session import current_source  # here, because session needs keys

        seed = int(current_source().direct_words(1)[0])
        self.manual_seed(seed)
        return seed

    def initial_seed(self) -> int:
        """The seed that is in force: 0 for a new object."""
        return self._seed

    def get_state(self) -> torch.Tensor:
        """The state as a tensor of 32 bytes on the CPU. It tells nothing of keys or bits."""
        with self._lock:
            words = (self._number, self._seed, self._count)
        state = _MAGIC + b"".join(word.to_bytes(8, "little") for word in words)
        return torch.frombuffer(bytearray(state), dtype=torch.uint8)

    def set_state(self, state: torch.Tensor) -> None:
        """Goes on from a state of `get_state`, this object's or another's."""
        if not isinstance(state, torch.Tensor) or state.dtype != torch.uint8:
            raise TypeError("state: a uint8 tensor, as get_state() of an ev.Generator gives it")
        told = bytes(state.cpu().reshape(-1).tolist())
        if len(told) != 32 or told[:8] != _MAGIC:
            raise ValueError("state: is not one of an ev.Generator (a torch.Generator's state serves only torch's)")
        number, seed, count = (int.from_bytes(told[at : at + 8], "little") for at in (8, 16, 24))
        with self._lock:
            self._set(number, seed, count)

    def clone(self) -> "Generator":
        """A new object that goes on from this one's state: it repeats its bits, within a step."""
        other = Generator(self._device)
        other.set_state(self.get_state())
        return other

    clone_state = clone  # torch's name for it

    def __reduce__(self):
        return _restored, (str(self._device), bytes(self.get_state().tolist()))

    def __repr__(self) -> str:
        return f"<everett_cuda.Generator device={str(self._device)!r}>"

    def _set(self, number: int, seed: int, count: int) -> None:
        self._number, self._seed, self._count = number, seed, count
        self._identity = _identity(number, seed)

    def draw(self, runs) -> bytes:
        """The record of the next draw, for the kernels `runs` of a device."""
        if runs is not self._runs:
            raise EverettError(
                f"generator: is on {self._device}, and the result is to be on another device. Make one there: "
                "ev.Generator(device=...)."
            )
        if not in_plain_eager():
            raise EverettError(
                "generator: an ev.Generator works in plain eager code only. Under functorch or compilation leave it out: "
                "torch's own generator then tells the draws apart."
            )
        with self._lock:
            nonce = (ctypes.c_uint64 * 2)(self._identity, self._count)
            self._count = (self._count + 1) % 2**64
            number = self._number
        return runs.draw_by(number % 2**32 or 2**32 - 1, ctypes.addressof(nonce))


def _restored(device: str, state: bytes) -> Generator:
    generator = Generator(device)
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return generator


def check_generator(generator: Generator | None) -> None:
    """TypeError for anything but None and an ev.Generator."""
    if generator is None or isinstance(generator, Generator):
        return
    if isinstance(generator, torch.Generator):
        raise TypeError(
            "generator: a torch.Generator makes pseudo-random numbers, so a call that passes one is torch's: use torch's "
            "own function, or pass an ev.Generator."
        )
    raise TypeError(f"generator: an ev.Generator or None, got {type(generator).__name__}")
