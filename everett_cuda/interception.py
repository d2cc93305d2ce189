"""Unmodified models: `intercept()` puts our functions in torch's place for a while, `install()` for the whole process.

`intercept` swaps attributes of modules only, because torch.compile guards on these: code that was compiled outside is
compiled anew inside, and back. `install` swaps methods of torch.Tensor as well, which dynamo does not guard, so it resets
dynamo at both ends; and it rebinds names that other modules took by `from torch.nn.functional import dropout`, found by
identity. Both are process-wide: every thread sees a swap as long as any is inside.
"""

import contextlib
import importlib
import inspect
import sys
import threading
import types
import warnings
from collections.abc import Callable

import torch

from . import keys, stand_ins_init, stand_ins_methods  # noqa: F401 - stand-ins register themselves
from .errors import EverettError
from .stand_ins import INSTALLED, STAND_INS, own

_lock = threading.RLock()
_inside = 0  # how many intercepts are entered, over all threads; an installation is one of them
_installed = False


class _Swap:
    """Stand-ins put in the place of attributes, and what was there before."""

    def __init__(self, table: dict[str, Callable]):
        self._table = table
        self._before: list[tuple[object, str, object, bool, Callable]] = []

    def apply(self) -> None:
        for name, stand_in in self._table.items():
            path, _, attribute = name.rpartition(".")
            owner = own(path)
            # what is only inherited (Tensor's methods, torch._VF's functions) is uncovered again by delattr
            self._before.append((owner, attribute, getattr(owner, attribute), attribute in vars(owner), stand_in))
        for owner, attribute, _, _, stand_in in self._before:
            setattr(owner, attribute, stand_in)

    def undo(self) -> None:
        for owner, attribute, before, was_its_own, stand_in in self._before:
            if getattr(owner, attribute) is not stand_in:
                warnings.warn(
                    f"{getattr(owner, '__name__', owner)}.{attribute} was replaced by something else while it was "
                    "intercepted, and is left as it is now. Undo such changes in the reverse order.",
                    stacklevel=4,
                )
            elif was_its_own:
                setattr(owner, attribute, before)
            else:
                delattr(owner, attribute)
        self._before.clear()

    def pairs(self) -> list[tuple[object, Callable]]:
        """(what was there, its stand-in), each once."""
        return list({id(before): (before, stand_in) for _, _, before, _, stand_in in self._before}.values())


_modules = _Swap(STAND_INS)
_whole_process = _Swap(INSTALLED)
_modules_at_entry: set[str] = set()


def _prepare_torch() -> None:
    """Makes torch build its tables of its own functions now: built while ours are in their place, they would know ours
    for torch's, for good.

    Dynamo's says which functions go into a graph as they are (and importing dynamo takes seconds, but any optimizer
    does it); the device context's says which take a default device; TorchScript's and the overrides' likewise.
    """
    importlib.import_module("torch._dynamo")
    from torch._dynamo import trace_rules
    from torch.jit import _builtins
    from torch.overrides import get_ignored_functions, get_overridable_functions, get_testing_overrides
    from torch.utils import _device

    for table in (
        trace_rules.get_torch_obj_rule_map, trace_rules.get_tensor_method, _device._device_constructors,
        _builtins._get_builtin_table, get_ignored_functions, get_overridable_functions, get_testing_overrides,
    ):  # fmt: skip
        table()


_prepared = False


def _enter() -> None:
    global _inside, _prepared
    keys.require_source()
    with _lock:
        if not _prepared:
            _prepare_torch()
            _prepared = True
        if _inside == 0:
            _modules_at_entry.update(sys.modules)
            _modules.apply()
        _inside += 1


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if _inside == 0:
            pairs = [(ours, torchs) for torchs, ours in _modules.pairs()]
            _modules.undo()
            _rebind(pairs, [sys.modules[name] for name in sys.modules.keys() - _modules_at_entry])
            _modules_at_entry.clear()


def is_active() -> bool:
    """Whether torch's module attributes are ours at this moment."""
    return _inside > 0


def is_installed() -> bool:
    return _installed


def _is_ours(module_name: str) -> bool:
    return module_name == __package__ or module_name.startswith(f"{__package__}.")


def _is_torchs_own(module_name: str) -> bool:
    """Where torch keeps its functions by identity, to know them: dynamo, tracers, tables of overrides."""
    return module_name == "torch" or (
        module_name.startswith("torch._") or module_name.startswith(("torch.fx.", "torch.jit.", "torch.overrides"))
    )


def _rebind(pairs: list[tuple[object, object]], modules: list) -> None:
    """In the given modules, names bound to the first of a pair are bound to the second."""
    into = {id(old): (old, new) for old, new in pairs}
    swapped = {name.rpartition(".")[0] for name in (*STAND_INS, *INSTALLED)}  # these undo their swaps themselves
    for module in modules:
        if not isinstance(module, types.ModuleType) or module.__name__ in swapped:
            continue
        if _is_ours(module.__name__) or _is_torchs_own(module.__name__):
            continue
        for name, value in list(vars(module).items()):
            pair = into.get(id(value))
            if pair is not None and pair[0] is value:
                setattr(module, name, pair[1])


class intercept(contextlib.ContextDecorator):
    """`with ev.intercept():` or `@ev.intercept()`: torch's random functions draw from our streams inside.

    Swapped are F.dropout and its family, F.scaled_dot_product_attention (and with it nn.MultiheadAttention and
    nn.TransformerEncoderLayer), F.gumbel_softmax, F.rrelu, torch.rand, randn, randint, their _like forms, randperm,
    normal, bernoulli, multinomial, and torch.nn.init. Signatures and results (dtype, out=, strides, requires_grad, ...)
    are torch's. Calls with a torch.Generator stay torch's, and so do those that ours cannot serve: complex numbers,
    sparse tensors, subclasses without a rule (`ev.coverage` lists them). Code compiled by torch.compile outside is
    compiled anew inside.

    Process-wide, reentrant, and for any number of threads: the last one that leaves restores torch, also after an
    exception. Raises SourceNotOpen or ForkedError at entry, before anything is swapped; TypeError when it decorates a
    generator or coroutine function, whose body would run outside.
    """

    def __enter__(self) -> None:
        _enter()

    def __exit__(self, *exc) -> None:
        _leave()

    def __call__(self, function):
        kinds = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
        if any(kind(function) for kind in kinds):
            raise TypeError(
                f"{function.__name__}: intercept() can't decorate a generator or coroutine function, whose body runs "
                "after the call has returned. Use `with ev.intercept():` inside it."
            )
        return super().__call__(function)


def install() -> None:
    """Intercepts torch in the whole process until `uninstall()`: all that `intercept` swaps, methods of torch.Tensor
    (uniform_, normal_, bernoulli_, random_, exponential_, ...), torch.dropout and its family, torch._VF, and names of
    torch's functions that other modules imported. Compiled code is forgotten (torch._dynamo.reset).

    Out of reach stay functools.partial objects, default arguments, closures and class attributes made before, and C++
    (nn.LSTM's dropout, TorchScript): `ev.coverage` shows them, `ev.rekey_torch` serves them. In the workers of a
    DataLoader torch stays torch, as long as they open no source of their own.
    Raises EverettError when it is installed already, SourceNotOpen or ForkedError as `intercept`.
    """
    global _installed
    with _lock:
        if _installed:
            raise EverettError("ev.install() is in force already. Call ev.uninstall() first, or install once.")
        _enter()
        _whole_process.apply()
        _rebind(_modules.pairs() + _whole_process.pairs(), list(sys.modules.values()))
        _installed = True
    torch._dynamo.reset()


def uninstall() -> None:
    """Undoes `install()` wholly, also in modules imported since. Raises EverettError when nothing is installed."""
    global _installed
    with _lock:
        if not _installed:
            raise EverettError("ev.uninstall(): nothing is installed. Call ev.install() first.")
        pairs = [(ours, torchs) for torchs, ours in _modules.pairs() + _whole_process.pairs()]
        _whole_process.undo()
        _rebind(pairs, list(sys.modules.values()))
        _installed = False
        _leave()
    torch._dynamo.reset()
