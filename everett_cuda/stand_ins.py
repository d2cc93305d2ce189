"""Stand-ins for torch's dropout, attention and activations: torch's signatures and semantics, our masks and numbers.

`interception` puts them in torch's place. A stand-in asks, in this order: is somebody's `__torch_function__` to be asked
first, as torch would; is anything random at all; can we serve this call (`untouched.why_not`). Where not, torch does, and
it is counted.
"""

import functools
import types
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from . import attention, noise, ops, untouched
from .kernels import NOISE_TYPES, TYPES
from .nonce import _PLAIN
from .untouched import leave, why_not

STAND_INS: dict[str, Callable] = {}  # what `intercept` swaps: full name of a module's attribute -> its stand-in
INSTALLED: dict[str, Callable] = {}  # what only `install` swaps
_STRIDED = torch.strided


def own(name: str):
    """torch's function of that full name, as it was before any swap: stand-ins are imported first."""
    value = torch
    for part in name.split(".")[1:]:
        value = getattr(value, part)
    return value


def stands_for(*names: str, table: dict[str, Callable] = STAND_INS):
    """Decorator: the function is the stand-in of the attributes of these names; names this torch lacks are left out."""

    def register(function):
        for name in names:
            owner, _, attribute = name.rpartition(".")
            if hasattr(own(owner), attribute):
                table[name] = function
        return function

    return register


# --- dropout ----------------------------------------------------------------------------------------------------------


def _why_not_masked(x: torch.Tensor, types=TYPES) -> str | None:
    return why_not(x) or (None if x.dtype in types else f"dtype {str(x.dtype).removeprefix('torch.')}")


_dropout = F.dropout


@stands_for("torch.nn.functional.dropout")
def dropout(input, p=0.5, training=True, inplace=False):
    if has_torch_function_unary(input):
        return handle_torch_function(dropout, (input,), input, p=p, training=training, inplace=inplace)
    if not training or p == 0:
        return _dropout(input, p, training, inplace)
    # the common case in few questions: 0.4 us of the 2.5 that a call may cost to be as fast as torch's
    if (
        type(input) in _PLAIN
        and input.dtype in TYPES
        and input.layout is _STRIDED
        and not input.is_nested
        and (input.is_cpu or input.is_cuda)
        and not untouched._child
    ) or (why := _why_not_masked(input)) is None:
        return ops.dropout(input, p if type(p) is float else float(p), True, inplace)
    return leave("F.dropout", why, _dropout, input, p, training, inplace)


def _masked(name, torchs, ours, input, p, training, inplace, **kwargs):
    """A rarer member of the dropout family. torchs(), ours(): the calls; kwargs: of `ours`."""
    if not training or p == 0:
        return torchs(input, p, training, inplace)
    if why := _why_not_masked(input):
        return leave(name, why, torchs, input, p, training, inplace)
    return ours(input, float(p), True, inplace, **kwargs)


def _by_feature(input, p, training, inplace, mask_dims=2):
    return ops._feature_dropout(input, p, training, inplace, mask_dims, "chacha8")


def _alpha_by_feature(input, p, training, inplace):
    mask = ops._checked_mask(p, "chacha8", affine=ops._alpha_affine(p), mask_dims=2)
    y = ops._masked_draw(input, mask) if mask is not None else input
    return input.copy_(y) if inplace else y


def _of_functional(attribute: str, ours: Callable, training: bool, check=None, dims=None) -> Callable:
    """The stand-in of a member of torch.nn.functional's dropout family.

    training: its default. check(x): torch's errors and warnings about dimensions. dims(x): how many leading dimensions
    have a decision of their own.
    """
    torchs, name = getattr(F, attribute), f"F.{attribute}"

    @stands_for(f"torch.nn.functional.{attribute}")
    def stand_in(input, p=0.5, training=training, inplace=False):
        if has_torch_function_unary(input):
            return handle_torch_function(stand_in, (input,), input, p=p, training=training, inplace=inplace)
        if check is not None and training and p != 0:
            check(input)
        kwargs = {} if dims is None else {"mask_dims": dims(input)}
        return _masked(name, torchs, ours, input, p, training, inplace, **kwargs)

    stand_in.__name__ = stand_in.__qualname__ = attribute
    return stand_in


def _check_1d(x):
    if x.dim() not in (2, 3):
        raise RuntimeError(f"dropout1d: Expected 2D or 3D input, but received a {x.dim()}D input.")


def _check_dims(name: str, usual: tuple[int, int]):
    def check(x):
        if x.dim() not in usual:
            warnings.warn(
                f"{name}: Received a {x.dim()}-D input to {name}, which is deprecated and will result in an error in a "
                "future release. To retain the behavior and silence this warning, please use dropout instead.",
                stacklevel=3,
            )
        if name == "dropout2d" and x.dim() == 3:
            warnings.warn("dropout2d: Received a 3D input, which is taken as (N, C, L), not as (C, H, W).", stacklevel=3)

    return check


# torch adds a batch dimension of 1 in 1d and 3d: there (C, ...) has one decision a channel, in 2d it is always (N, C, ...)
_of_functional("dropout1d", _by_feature, True, _check_1d, lambda x: 1 if x.dim() == 2 else 2)
_of_functional("dropout2d", _by_feature, True, _check_dims("dropout2d", (3, 4)), lambda x: 2)
_of_functional("dropout3d", _by_feature, True, _check_dims("dropout3d", (4, 5)), lambda x: 2 if x.dim() == 5 else 1)
_of_functional("alpha_dropout", ops.alpha_dropout, False)
_of_functional("feature_alpha_dropout", _alpha_by_feature, False)


def _of_torch(attribute: str, ours: Callable, inplace: bool) -> None:
    """Stand-ins of torch.dropout(input, p, train) and its like, which torch._VF holds as well."""
    torchs, name = getattr(torch, attribute), f"torch.{attribute}"

    def call(input, p, training, inplace):
        return torchs(input, p, training)

    @stands_for(f"torch.{attribute}", f"torch._VF.{attribute}", table=INSTALLED)
    def stand_in(input, p, train):
        if has_torch_function_unary(input):
            return handle_torch_function(stand_in, (input,), input, p, train)
        if train and p != 0 and not 0 <= p <= 1:
            return torchs(input, p, train)  # which raises torch's error
        return _masked(name, call, ours, input, p, train, inplace)

    stand_in.__name__ = stand_in.__qualname__ = attribute


for _name, _ours in (
    ("dropout", ops.dropout),
    ("alpha_dropout", ops.alpha_dropout),
    ("feature_dropout", _by_feature),
    ("feature_alpha_dropout", _alpha_by_feature),
):
    _of_torch(_name, _ours, False)
    _of_torch(f"{_name}_", _ours, True)

_native_dropout = torch.native_dropout


@stands_for("torch.native_dropout", "torch._VF.native_dropout", table=INSTALLED)
def native_dropout(input, p, train):
    """(result, mask of what was kept)"""
    if has_torch_function_unary(input):
        return handle_torch_function(native_dropout, (input,), input, p, train)
    if train is False or p == 0 or not 0 <= p <= 1:
        return _native_dropout(input, p, train)
    if why := _why_not_masked(input):
        return leave("torch.native_dropout", why, _native_dropout, input, p, train)
    kept = ops.dropout(torch.ones_like(input), float(p)) != 0
    return torch.where(kept, input * (1.0 / (1.0 - p) if p < 1 else 0.0), 0.0), kept


# --- attention --------------------------------------------------------------------------------------------------------

_sdpa = F.scaled_dot_product_attention


def _why_not_attention(query, *others, p) -> str | None:
    if why := why_not(*others) or _why_not_masked(query, NOISE_TYPES):
        return why
    # between these the law decides by 15 bits; a probability below 0 or above 1 is ours to refuse
    least, most = attention._LEAST, attention._MOST
    return None if least <= p <= most or p >= 1 or p < 0 else f"a probability outside [{least:.4f}, {most:.4f}]"


@stands_for("torch.nn.functional.scaled_dot_product_attention")
@stands_for("torch._C._nn.scaled_dot_product_attention", table=INSTALLED)
def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    call = (query, key, value, attn_mask, dropout_p, is_causal)
    kwargs = {"scale": scale, "enable_gqa": enable_gqa}
    if has_torch_function(tensors):
        return handle_torch_function(scaled_dot_product_attention, tensors, *call, **kwargs)
    if dropout_p == 0.0:
        return _sdpa(*call, **kwargs)
    if why := _why_not_attention(query, *tensors[1:], p=dropout_p):
        return leave("F.scaled_dot_product_attention", why, _sdpa, *call, **kwargs)
    return attention.scaled_dot_product_attention(*call, **kwargs)


def _copy_of(function: types.FunctionType) -> types.FunctionType:
    """The same code over the same globals, as other objects: dynamo tells functions by their code."""
    copy = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(copy, function)


# torch's own code: it finds dropout and attention in its module, where ours are. Its identity must change all the same.
# Dynamo takes this function as a leaf and guards on nothing inside it, so code that was compiled before would stay torch's.
stands_for("torch.nn.functional.multi_head_attention_forward")(_copy_of(F.multi_head_attention_forward))


# --- activations ------------------------------------------------------------------------------------------------------

_rrelu = F.rrelu


@stands_for("torch.nn.functional.rrelu")
def rrelu(input, lower=1.0 / 8, upper=1.0 / 3, training=False, inplace=False):
    if has_torch_function_unary(input):
        return handle_torch_function(
            rrelu, (input,), input, lower=lower, upper=upper, training=training, inplace=inplace
        )
    if not training:
        return _rrelu(input, lower, upper, training, inplace)
    if why := _why_not_masked(input, NOISE_TYPES):
        return leave("F.rrelu", why, _rrelu, input, lower, upper, training, inplace)
    slopes = noise.rand(input.shape, dtype=input.dtype, device=input.device) * (upper - lower) + lower
    y = torch.where(input <= 0, input * slopes, input)
    return input.copy_(y) if inplace else y


def _of_torch_rrelu(attribute: str, inplace: bool, *more: str) -> None:
    torchs = getattr(torch, attribute)

    @stands_for(f"torch.{attribute}", f"torch._VF.{attribute}", *more, table=INSTALLED)
    def stand_in(input, lower=1.0 / 8, upper=1.0 / 3, training=False, generator=None):
        if training and (why := why_not(input, generator=generator)):
            return leave(f"torch.{attribute}", why, torchs, input, lower, upper, training, generator)
        return rrelu(input, lower, upper, training, inplace)

    stand_in.__name__ = stand_in.__qualname__ = attribute


_of_torch_rrelu("rrelu", False)
_of_torch_rrelu("rrelu_", True, "torch.nn.functional.rrelu_")


_gumbel_softmax = F.gumbel_softmax


@stands_for("torch.nn.functional.gumbel_softmax")
def gumbel_softmax(logits, tau=1, hard=False, eps=1e-10, dim=-1):
    if has_torch_function_unary(logits):
        return handle_torch_function(gumbel_softmax, (logits,), logits, tau=tau, hard=hard, eps=eps, dim=dim)
    if why := _why_not_masked(logits, NOISE_TYPES):
        return leave("F.gumbel_softmax", why, _gumbel_softmax, logits, tau, hard, eps, dim)
    if eps != 1e-10:
        warnings.warn("`eps` parameter is deprecated and has no effect.", stacklevel=2)
    gumbels = noise.gumbel(logits.shape, dtype=logits.dtype, device=logits.device)
    soft = ((logits + gumbels) / tau).softmax(dim)
    if not hard:
        return soft
    chosen = soft.argmax(dim, keepdim=True)
    one_hot = torch.zeros_like(soft, memory_format=torch.legacy_contiguous_format).scatter_(dim, chosen, 1.0)
    return one_hot - soft.detach() + soft  # straight through: the value of one, the gradient of the other
