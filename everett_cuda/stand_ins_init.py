"""Stand-ins for torch.nn.init: its functions fill weights by methods of torch.Tensor, which `intercept` doesn't swap.

uniform_, normal_, xavier_uniform_ and xavier_normal_ come through `_no_grad_uniform_` and `_no_grad_normal_` of that
module, which are swapped; the others are written again over the same two fills. All numbers are of the world family:
replicas that torch initialises alike stay alike.
"""

import math
import warnings

import torch
from torch.nn import init
from torch.overrides import handle_torch_function, has_torch_function_unary

from . import noise
from .kernels import NOISE_TYPES
from .stand_ins import stands_for
from .stand_ins_noise import _ours
from .untouched import leave, why_not


def _why_not_weight(tensor: torch.Tensor, generator) -> str | None:
    why = why_not(tensor, generator=generator)
    return why or (None if tensor.dtype in NOISE_TYPES else f"dtype {str(tensor.dtype).removeprefix('torch.')}")


def _uniform_(tensor, low, high, generator):
    """Uniforms in [low, high), in place, without gradient."""
    options = {"dtype": tensor.dtype, "device": tensor.device} | _ours(generator)
    with torch.no_grad():
        return tensor.copy_(noise.rand(tensor.shape, **options).mul_(high - low).add_(low))


def _normal_(tensor, mean, std, generator):
    options = {"dtype": tensor.dtype, "device": tensor.device} | _ours(generator)
    with torch.no_grad():
        return tensor.copy_(noise.randn(tensor.shape, **options).mul_(std).add_(mean))


_torch_uniform_, _torch_normal_ = init._no_grad_uniform_, init._no_grad_normal_
_torch_trunc_normal_ = init._no_grad_trunc_normal_


@stands_for("torch.nn.init._no_grad_uniform_")
def no_grad_uniform_(tensor, a, b, generator=None):
    if why := _why_not_weight(tensor, generator):
        return leave("init.uniform_", why, _torch_uniform_, tensor, a, b, generator)
    if a > b:
        raise RuntimeError(f"uniform_ expects to return a [from, to) range, but found from={a} > to={b}")
    return _uniform_(tensor, a, b, generator)


@stands_for("torch.nn.init._no_grad_normal_")
def no_grad_normal_(tensor, mean, std, generator=None):
    if why := _why_not_weight(tensor, generator):
        return leave("init.normal_", why, _torch_normal_, tensor, mean, std, generator)
    if std < 0:
        raise RuntimeError(f"normal expects std >= 0.0, but found std {std}")
    return _normal_(tensor, mean, std, generator)


@stands_for("torch.nn.init._no_grad_trunc_normal_")
def no_grad_trunc_normal_(tensor, mean, std, a, b, generator=None):
    """By the inverse of the normal distribution function over a uniform, both in fp64, so that no value is drawn twice
    and the number of draws does not depend on them; clamped to [a, b] against the last rounding."""
    if why := _why_not_weight(tensor, generator):
        return leave("init.trunc_normal_", why, _torch_trunc_normal_, tensor, mean, std, a, b, generator)
    if mean < a - 2 * std or mean > b + 2 * std:
        warnings.warn(
            "mean is more than 2 std from [a, b] in nn.init.trunc_normal_. The distribution of values may be incorrect.",
            stacklevel=3,
        )
    low, high = (math.erf((edge - mean) / (std * math.sqrt(2.0))) for edge in (a, b))
    u = noise.rand(tensor.shape, dtype=torch.float64, device=tensor.device, **_ours(generator))
    with torch.no_grad():
        values = torch.erfinv(u.mul_(high - low).add_(low)).mul_(std * math.sqrt(2.0)).add_(mean).clamp_(a, b)
        return tensor.copy_(values)


_kaiming_uniform_, _kaiming_normal_ = init.kaiming_uniform_, init.kaiming_normal_


@stands_for("torch.nn.init.kaiming_uniform_")
def kaiming_uniform_(tensor, a=0, mode="fan_in", nonlinearity="leaky_relu", generator=None):
    if has_torch_function_unary(tensor):
        return handle_torch_function(
            kaiming_uniform_, (tensor,), tensor=tensor, a=a, mode=mode, nonlinearity=nonlinearity, generator=generator
        )
    if 0 in tensor.shape or (why := _why_not_weight(tensor, generator)):
        why = "meta" if 0 in tensor.shape else why
        return leave("init.kaiming_uniform_", why, _kaiming_uniform_, tensor, a, mode, nonlinearity, generator)
    bound = math.sqrt(3.0) * _kaiming_std(tensor, a, mode, nonlinearity)
    return _uniform_(tensor, -bound, bound, generator)


@stands_for("torch.nn.init.kaiming_normal_")
def kaiming_normal_(tensor, a=0, mode="fan_in", nonlinearity="leaky_relu", generator=None):
    if 0 in tensor.shape or (why := _why_not_weight(tensor, generator)):
        why = "meta" if 0 in tensor.shape else why
        return leave("init.kaiming_normal_", why, _kaiming_normal_, tensor, a, mode, nonlinearity, generator)
    return _normal_(tensor, 0.0, _kaiming_std(tensor, a, mode, nonlinearity), generator)


def _kaiming_std(tensor, a, mode, nonlinearity) -> float:
    """He et al. (2015): gain / sqrt(fan)."""
    return init.calculate_gain(nonlinearity, a) / math.sqrt(init._calculate_correct_fan(tensor, mode))


_orthogonal_, _sparse_ = init.orthogonal_, init.sparse_


@stands_for("torch.nn.init.orthogonal_")
def orthogonal_(tensor, gain=1, generator=None):
    """Q of a matrix of normals, its columns' signs made those of R's diagonal (Mezzadri 2007): uniform over the
    orthogonal matrices."""
    if tensor.ndimension() < 2 or tensor.numel() == 0:
        return _orthogonal_(tensor, gain, generator)  # torch's error, or nothing to do
    if why := _why_not_weight(tensor, generator):
        return leave("init.orthogonal_", why, _orthogonal_, tensor, gain, generator)
    rows = tensor.size(0)
    flat = tensor.new_empty((rows, tensor.numel() // rows))
    wide = flat.size(0) < flat.size(1)
    _normal_(flat, 0.0, 1.0, generator)
    q, r = torch.linalg.qr(flat.t() if wide else flat)
    q = q * r.diagonal().sign()
    with torch.no_grad():
        tensor.view_as(flat).copy_(q.t() if wide else q)
        return tensor.mul_(gain)


@stands_for("torch.nn.init.sparse_")
def sparse_(tensor, sparsity, std=0.01, generator=None):
    if tensor.ndimension() != 2:
        return _sparse_(tensor, sparsity, std, generator)  # torch's error
    if why := _why_not_weight(tensor, generator):
        return leave("init.sparse_", why, _sparse_, tensor, sparsity, std, generator)
    rows, columns = tensor.shape
    zeros = math.ceil(sparsity * rows)
    _normal_(tensor, 0.0, std, generator)
    # the rows of the smallest of 64-bit uniforms: a permutation of each column (ties of 53 bits keep their order)
    order = noise.rand(rows, columns, dtype=torch.float64, device=tensor.device, **_ours(generator)).argsort(dim=0)
    with torch.no_grad():
        return tensor.scatter_(0, order[:zeros], 0.0)
