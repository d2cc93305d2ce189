"""`coverage`: every random op of a forward and a backward pass, who called it, and what its numbers come from.

A TorchDispatchMode sees the ops below autograd, whoever called them: Python, C++, TorchScript. torch tags an op that may
draw; whether this call draws, its arguments tell (attention with dropout_p = 0 does not). Who called is read off the
stack, and so is whether the op is the nonce of a draw of ours. Our ops take their nonce from a torch op while a mode is
on, so none goes past.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import interception, keys, nonce, rekey, untouched
from .stand_ins import INSTALLED, STAND_INS, own

QUANTUM, REKEYED, UNTOUCHED = "quantum stream", "rekeyed torch", "untouched"


@dataclass(frozen=True)
class RandomOp:
    """A random op: its name (of the function for ours, of the aten op for torch's), the module that called it (its path
    in the model; empty outside), the calling line, whether in the backward, its tier, why if untouched, and how often."""

    op: str
    module: str
    caller: str
    backward: bool
    tier: str
    why: str
    count: int


@dataclass(frozen=True)
class Coverage:
    """All random ops of a pass, and the draws of ours that the dispatcher did not show (0, unless a library made them
    from a thread of its own)."""

    ops: tuple[RandomOp, ...]
    unseen_draws: int = 0

    def of(self, tier: str) -> tuple[RandomOp, ...]:
        return tuple(op for op in self.ops if op.tier == tier)

    def count(self, tier: str) -> int:
        """Calls of that tier: "quantum stream", "rekeyed torch" or "untouched"."""
        return sum(op.count for op in self.of(tier))

    @property
    def untouched(self) -> tuple[RandomOp, ...]:
        return self.of(UNTOUCHED)

    def __rich__(self) -> Table:
        title = ", ".join(f"{self.count(tier)} {tier}" for tier in (QUANTUM, REKEYED, UNTOUCHED))
        table = Table(title=f"random ops: {title}", title_justify="left")
        for column in ("op", "module", "called at", "pass", "served by"):
            table.add_column(column, overflow="fold")
        table.add_column("calls", justify="right")
        for op in self.ops:
            served = f"{op.tier}: {op.why}" if op.why else op.tier
            table.add_row(op.op, op.module, op.caller, "backward" if op.backward else "forward", served, str(op.count))
        return table

    def __str__(self) -> str:
        console = Console(width=140, no_color=True, force_terminal=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()


# --- is it random? ----------------------------------------------------------------------------------------------------

_SEEDED = torch.Tag.nondeterministic_seeded
# tagged by torch, but drawing nothing: a choice of kernels, a softmax, and backwards, which read the forward's state
_DRAW_NOTHING = ("_fused_sdp_choice", "_nested_tensor_softmax_with_shape", "_cudnn_init_dropout_state")


def _arguments(func, args, kwargs) -> dict:
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    return {a.name: given.get(a.name, a.default_value) for a in func._schema.arguments}


def draws(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> bool:
    """Whether this call of an op takes numbers from a generator of torch's."""
    name = func._schema.name.partition("::")[2]
    if _SEEDED not in func.tags or name in _DRAW_NOTHING or name.endswith("_backward"):
        return False
    arguments = _arguments(func, args, kwargs)
    if any(arguments.get(p) == 0 for p in ("dropout_p", "dropout")):
        return False
    if any(arguments.get(flag) is False for flag in ("train", "training")):
        return False
    if name == "native_dropout" and arguments["p"] == 0:
        return False
    tensors = [a for a in arguments.values() if isinstance(a, torch.Tensor)]
    return not tensors or (tensors[0].numel() > 0 and not tensors[0].is_meta)


# --- who called it? ---------------------------------------------------------------------------------------------------

_PACKAGE = os.path.dirname(__file__) + os.sep
_TORCH = os.path.dirname(torch.__file__) + os.sep
_MODULE_CALL = torch.nn.Module._call_impl.__code__
_NONCE = nonce.nonce_tensor.__code__
_LEAVE = untouched.leave.__code__
_torchs_own = {
    code: name.replace("torch.nn.functional.", "F.")
    for name in (*STAND_INS, *INSTALLED)
    if (code := getattr(own(name), "__code__", None)) is not None and not name.endswith("multi_head_attention_forward")
}


def _frames() -> Iterator:
    frame = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


class _Caller:
    """What the stack tells about a random op."""

    def __init__(self, names: dict[int, str]):
        self.module, self.at, self.ours, self.left, self.bound_before = "", "", "", None, ""
        self.is_nonce = False
        below_user, in_package = True, True
        for frame in _frames():
            code, file = frame.f_code, frame.f_code.co_filename
            if file == __file__:
                if code is _coverage_code:
                    break
                continue
            self.is_nonce |= code is _NONCE
            if code is _LEAVE and self.left is None:
                self.left = frame.f_locals["name"], frame.f_locals["why"]
            if file.startswith(_PACKAGE) and in_package:
                self.ours = _name_of(frame)
            elif self.ours:
                in_package = False  # what lies further out calls our function and does not name it
            if below_user and code in _torchs_own:
                self.bound_before = _torchs_own[code]
            if below_user and not file.startswith((_PACKAGE, _TORCH)):
                self.at, below_user = f"{os.path.basename(file)}:{frame.f_lineno} {code.co_name}", False
            if code is _MODULE_CALL and not self.module:
                module = frame.f_locals["self"]
                self.module = names.get(id(module)) or type(module).__name__


def _name_of(frame) -> str:
    """The name of a function of ours: stand-ins made by a factory carry it in a variable."""
    name = frame.f_code.co_name
    return frame.f_locals.get("name", name) if name == "stand_in" else name


def _is_default(generator: torch.Generator | None) -> bool:
    if generator is None:
        return True
    defaults = (torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else ()))
    return any(generator._cdata == default._cdata for default in defaults)  # the dispatcher makes new Python objects


def _why_untouched(caller: _Caller) -> str:
    if caller.left is not None:
        return f"{caller.left[0]}: {caller.left[1]}"
    if not interception.is_active():
        return "not intercepted; use ev.intercept() or ev.install()"
    if caller.bound_before:
        return (
            f"{caller.bound_before} was bound before it was swapped (partial, default argument, closure, class "
            "attribute); use ev.rekey_torch()"
        )
    if not interception.is_installed():
        return "a Tensor method, a name imported before, or C++; use ev.install() or ev.rekey_torch()"
    return "C++, or a name bound before (partial, default argument, closure); use ev.rekey_torch()"


class _Watch(TorchDispatchMode):
    """Counts random ops by what they are."""

    def __init__(self, names: dict[int, str]):
        super().__init__()
        self.names = names
        self.found: Counter = Counter()
        self.nonces = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if draws(func, args, kwargs) and any(
            t.numel() and not t.is_meta for t in tree_leaves(result) if isinstance(t, torch.Tensor)
        ):
            self._note(func, _arguments(func, args, kwargs), result)
        return result

    def _note(self, func, arguments, result) -> None:
        caller = _Caller(self.names)
        op, tier, why = f"aten.{func._schema.name.partition('::')[2]}", UNTOUCHED, ""
        device = next(t.device for t in tree_leaves(result) if isinstance(t, torch.Tensor))
        if caller.is_nonce:
            op, tier = caller.ours, QUANTUM
            self.nonces += 1
        elif not _is_default(arguments.get("generator")):
            why = "a torch.Generator was passed"
        elif rekey.is_rekeyed(device):
            tier = REKEYED
        else:
            why = _why_untouched(caller)
        backward = nonce.graph_task_id() != -1
        self.found[op, caller.module, caller.at, backward, tier, why] += 1


# --- the pass ---------------------------------------------------------------------------------------------------------


def _loss_of(output) -> torch.Tensor:
    loss = getattr(output, "loss", None)
    if loss is not None:
        return loss
    terms = [t.sum() for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
    if not terms:
        raise ValueError(
            "coverage: no tensor of the output asks for a gradient, so there is no backward pass. Give loss=function of "
            "the output, or backward=False."
        )
    return sum(terms)


def coverage(
    model: Callable, inputs=(), backward: bool = True, loss: Callable[[object], torch.Tensor] | None = None
) -> Coverage:
    """Runs `model` on `inputs` once, forward and backward, and lists every random op with what serves it.

    model: a module, in the mode it is in (train() or eval()), or any callable. inputs: a tensor, a tuple of arguments or
    a dict of keyword arguments. loss: a scalar from the output; default the output's `loss` if it has one, else the sum of
    all its tensors that ask for gradients. Under what is in force around the call: `ev.intercept()`, `ev.install()`,
    `ev.rekey_torch()`, or nothing.

    The tiers: "quantum stream" (a key of ours and our stream), "rekeyed torch" (torch's own default generator, rekeyed at
    every step), "untouched" (torch's, and why). Compiled modules run uncompiled here; what inductor makes of torch's own
    random ops in a compiled one is torch's. numpy's and Python's own generators are not seen. Buffers and gradients are
    as before afterwards; the pass draws from the generators, and from the source, as any other.
    Raises ValueError where there is nothing to differentiate, and what the pass itself raises.
    """
    arguments, options = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    if not isinstance(arguments, (tuple, list)):
        arguments = (arguments,)
    is_module = isinstance(model, torch.nn.Module)
    names = {id(m): name for name, m in model.named_modules()} if is_module else {}
    parameters = list(model.parameters()) if is_module else []
    gradients = [p.grad for p in parameters]
    buffers = [(b, b.clone()) for b in model.buffers()] if is_module else []
    drawn = keys.counters().get("draws", 0)
    watch = _Watch(names)
    try:
        for p in parameters:
            p.grad = None
        with torch.compiler.set_stance("force_eager"), watch:
            output = model(*arguments, **options)
            if backward:
                (_loss_of if loss is None else loss)(output).backward()
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
    ops = tuple(RandomOp(*key, count) for key, count in watch.found.items())
    return Coverage(ops, keys.counters().get("draws", 0) - drawn - watch.nonces)


_coverage_code = coverage.__code__
