"""Real quantum random numbers inside PyTorch: `ev.open(URI)`, then `ev.dropout`, `ev.randn`, `ev.convert(model)`, ..."""

from . import nn
from .errors import (
    BadParameter,
    EverettError,
    ForkedError,
    HealthAlarm,
    ReplayMiss,
    SourceError,
    SourceExhausted,
    SourceNotOpen,
    StartupTestFailed,
    Starved,
    UnknownScheme,
)
from .fused import add_noise, bias_dropout_add, bias_gelu_dropout, stochastic_round
from .keys import configure, set_freshness, step
from .nn import convert
from .noise import bernoulli, exponential, gumbel, rand, randn, random_words
from .ops import alpha_dropout, drop_path, dropout, dropout1d, dropout2d, dropout3d, dropout_add
from .session import close, current_source, open, status
from .source import Source

__version__ = "0.1.0"

__all__ = [
    "BadParameter", "EverettError", "ForkedError", "HealthAlarm", "ReplayMiss", "Source", "SourceError",
    "SourceExhausted", "SourceNotOpen", "StartupTestFailed", "Starved", "UnknownScheme", "add_noise", "alpha_dropout",
    "bernoulli", "bias_dropout_add", "bias_gelu_dropout", "close", "configure", "convert", "current_source",
    "drop_path", "dropout", "dropout1d", "dropout2d", "dropout3d", "dropout_add", "exponential", "gumbel", "nn", "open",
    "rand", "randn", "random_words", "set_freshness", "status", "step", "stochastic_round",
]  # fmt: skip
