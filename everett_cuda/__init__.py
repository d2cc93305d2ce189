"""Real quantum random numbers inside PyTorch: `ev.open(URI)`, then `ev.dropout`, `ev.randn`, `ev.convert(model)`, ...

Public names are imported when they are first used (PEP 562), so that the `everett` command, which needs no tensors,
starts without torch: in 0.4 s instead of 4. A name that was used once is an ordinary attribute from then on.
"""

# ruff: noqa: F401 - the imports under TYPE_CHECKING are there to be seen

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Where each public name lives. None may be the name of a module as well: importing that would put it in its place.
_PUBLIC = {
    "attention": ("scaled_dot_product_attention",),
    "categories": ("multinomial",),
    "distributions": ("beta", "cauchy", "dirichlet", "gamma", "geometric", "log_normal", "normal", "uniform"),
    "errors": (
        "BadParameter", "DeviceNotFound", "EverettError", "ForkedError", "HealthAlarm", "JournalError", "LedgerError",
        "NoDistribution", "RNGDesync", "ReplayMismatch", "ReplayMiss", "SourceError", "SourceExhausted",
        "SourceNotOpen", "StartupTestFailed", "Starved", "UnknownScheme",
    ),
    "fused": ("add_noise", "bias_dropout_add", "bias_gelu_dropout", "stochastic_round"),
    "generator": ("Generator",),
    "in_place": ("fill_",),
    "integers": ("randint", "randint_like", "randperm"),
    "interception": ("install", "intercept", "uninstall"),
    "journal_file": ("read_journal",),
    "journaling": ("journal",),
    "keys": ("configure", "set_freshness", "step"),
    "ledgers.run": ("ledger",),
    "nn": ("convert",),
    "noise": ("bernoulli", "exponential", "gumbel", "rand", "rand_like", "randn", "randn_like", "random_words"),
    "ops": ("alpha_dropout", "drop_path", "dropout", "dropout1d", "dropout2d", "dropout3d", "dropout_add"),
    "reach": ("coverage",),
    "rekey": ("rekey_torch",),
    "replaying": ("replay",),
    "seeding": ("seed_everything",),
    "session": ("close", "current_source", "open", "status"),
    "source": ("Source",),
    "state": ("load_state_dict", "state_dict"),
}  # fmt: skip
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

_MODULES = ("distributed", "nn")

__all__ = sorted([*_HOME, *_MODULES])

if TYPE_CHECKING:  # the same for editors and type checkers, which do not run __getattr__
    from . import distributed, nn
    from .attention import scaled_dot_product_attention
    from .categories import multinomial
    from .distributions import beta, cauchy, dirichlet, gamma, geometric, log_normal, normal, uniform
    from .errors import (
        BadParameter,
        DeviceNotFound,
        EverettError,
        ForkedError,
        HealthAlarm,
        JournalError,
        LedgerError,
        NoDistribution,
        ReplayMismatch,
        ReplayMiss,
        RNGDesync,
        SourceError,
        SourceExhausted,
        SourceNotOpen,
        StartupTestFailed,
        Starved,
        UnknownScheme,
    )
    from .fused import add_noise, bias_dropout_add, bias_gelu_dropout, stochastic_round
    from .generator import Generator
    from .in_place import fill_
    from .integers import randint, randint_like, randperm
    from .interception import install, intercept, uninstall
    from .journal_file import read_journal
    from .journaling import journal
    from .keys import configure, set_freshness, step
    from .ledgers.run import ledger
    from .nn import convert
    from .noise import bernoulli, exponential, gumbel, rand, rand_like, randn, randn_like, random_words
    from .ops import alpha_dropout, drop_path, dropout, dropout1d, dropout2d, dropout3d, dropout_add
    from .reach import coverage
    from .rekey import rekey_torch
    from .replaying import replay
    from .seeding import seed_everything
    from .session import close, current_source, open, status
    from .source import Source
    from .state import load_state_dict, state_dict


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)  # which makes it an attribute
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value  # so that the next use costs what any module attribute costs
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
