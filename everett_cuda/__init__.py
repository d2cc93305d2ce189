"""Real quantum random numbers inside PyTorch. `ev.open(URI)`, then `ev.dropout`, `ev.randn`, `ev.nn.Dropout`, ..."""

import threading

from . import errors, nn
from .errors import *  # noqa: F403
from .keys import configure, set_freshness, step
from .nn import convert
from .noise import bernoulli, exponential, gumbel, rand, randn, random_words
from .ops import (
    alpha_dropout,
    drop_path,
    dropout,
    dropout1d,
    dropout2d,
    dropout3d,
    dropout_add,
)
