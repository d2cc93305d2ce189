"""Seeds for every generator of the process, once, of quantum origin: torch, numpy, random and JAX."""

import random
import sys
from dataclasses import dataclass, field

import numpy as np
import torch

from . import keys
from .rekey import CPU_WORDS, cpu_state, words_of

_NUMPY_WORDS = 624  # numpy's global generator is an mt19937 too


@dataclass(frozen=True)
class Seeded:
    """What `seed_everything` seeded. jax_key: a key of jax.random where JAX is imported, which has no global generator
    to seed; else None. It is not shown, and no other seed is kept."""

    seeded: tuple[str, ...]
    jax_key: object = field(default=None, repr=False)


def seed_everything() -> Seeded:
    """Seeds torch (the CPU's generator and every GPU's), numpy's and Python's global generators from one draw, and makes a
    key for JAX if it has been imported.

    They stay pseudo-random generators: only where they start is quantum. The draw is of the world family, so ranks whose
    torch states were equal are seeded alike. Raises SourceNotOpen, ForkedError, and what a draw raises.
    """
    words = words_of(keys.draw_record(world=True), CPU_WORDS + _NUMPY_WORDS + 12)
    for_torch, for_numpy, rest = np.split(words, [CPU_WORDS, CPU_WORDS + _NUMPY_WORDS])
    torch.set_rng_state(cpu_state(for_torch))
    torch.cuda.manual_seed_all(int.from_bytes(rest[:2].tobytes(), "little"))  # waits for CUDA to be initialised
    np.random.set_state(("MT19937", for_numpy, _NUMPY_WORDS))
    random.seed(int.from_bytes(rest[2:10].tobytes(), "little"))
    seeded = ("torch", "numpy", "random")
    if "jax" not in sys.modules:
        return Seeded(seeded)
    key = sys.modules["jax"].random.wrap_key_data(rest[10:].copy())
    return Seeded((*seeded, "jax"), key)
