"""Modules like torch.nn's, with quantum-keyed masks, and `convert`, which puts them into a model in place of torch's."""

import warnings

import torch
from torch import nn

from . import ops
from .errors import EverettError


class _Module(nn.Module):
    """What our modules share."""

    def __prepare_scriptable__(self):
        raise EverettError(
            f"torch.jit.script cannot compile everett_cuda.nn.{type(self).__name__}: its draws are Python. Use "
            "torch.compile or torch.export, or torch.jit.trace, whose graphs draw a fresh mask at every call."
        )


class _DropoutModule(_Module):
    """p, inplace and stream of a dropout module; subclasses name the function."""

    def __init__(self, p: float = 0.5, inplace: bool = False, stream: str = "chacha8"):
        super().__init__()
        ops._check_stream(stream)
        self.p = ops._check_p(p)
        self.inplace = inplace
        self.stream = stream

    def extra_repr(self) -> str:
        return f"p={self.p}, inplace={self.inplace}, stream={self.stream}"


class Dropout(_DropoutModule):
    """Like torch.nn.Dropout; see `everett_cuda.dropout`. stream: "chacha8", "chacha12", "chacha20" or "philox"."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.dropout(x, self.p, self.training, self.inplace, stream=self.stream)


class Dropout1d(_DropoutModule):
    """Like torch.nn.Dropout1d: whole channels of (N, C, L) or (C, L)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.dropout1d(x, self.p, self.training, self.inplace, stream=self.stream)


class Dropout2d(_DropoutModule):
    """Like torch.nn.Dropout2d: whole channels of (N, C, H, W) or (C, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.dropout2d(x, self.p, self.training, self.inplace, stream=self.stream)


class Dropout3d(_DropoutModule):
    """Like torch.nn.Dropout3d: whole channels of (N, C, D, H, W) or (C, D, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.dropout3d(x, self.p, self.training, self.inplace, stream=self.stream)


class AlphaDropout(_DropoutModule):
    """Like torch.nn.AlphaDropout, for self-normalizing networks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.alpha_dropout(x, self.p, self.training, self.inplace, stream=self.stream)


class DropPath(_Module):
    """Stochastic depth: drops whole samples of a batch (N, ...), as timm's DropPath."""

    def __init__(self, p: float = 0.5, stream: str = "chacha8"):
        super().__init__()
        ops._check_stream(stream)
        self.p = ops._check_p(p)
        self.stream = stream

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.drop_path(x, self.p, self.training, stream=self.stream)

    def extra_repr(self) -> str:
        return f"p={self.p}, stream={self.stream}"


_TWINS = {
    nn.Dropout: Dropout,
    nn.Dropout1d: Dropout1d,
    nn.Dropout2d: Dropout2d,
    nn.Dropout3d: Dropout3d,
    nn.AlphaDropout: AlphaDropout,
}


def _inner_dropout(module: nn.Module) -> float:
    """p of a dropout that a module calls by itself, out of `convert`'s reach."""
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return module.dropout
    return module.p if isinstance(module, nn.FeatureAlphaDropout) else 0.0


def convert(model: nn.Module, stream: str = "chacha8") -> nn.Module:
    """Replaces torch's dropout modules in `model` by ours, in place, and returns it (a dropout module itself: its twin).

    p, inplace and training mode carry over, a module that is used twice stays one module, and subclasses of torch's
    modules are left alone. Warns of modules whose own, inner dropout stays torch's (attention, RNNs): it is not quantum.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: a torch.nn.Module, got {type(model).__name__}")
    twins: dict[nn.Module, nn.Module] = {}

    def twin_of(old: nn.Module) -> nn.Module:
        if old not in twins:
            twins[old] = _TWINS[type(old)](old.p, old.inplace, stream).train(old.training)
        return twins[old]

    if type(model) in _TWINS:
        return twin_of(model)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if type(child) in _TWINS:
                parent._modules[name] = twin_of(child)
    left = [f"{name or 'model'} ({type(m).__name__})" for name, m in model.named_modules() if _inner_dropout(m) > 0]
    if left:
        warnings.warn(
            f"convert: the dropout inside {', '.join(left)} stays torch's, so its bits are not quantum.", stacklevel=2
        )
    return model
