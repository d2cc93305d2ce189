"""Distributions with parameters: normal, uniform, log-normal, Cauchy, geometric, gamma, beta, Dirichlet.

Each is a standard draw of the stream (`noise`, `csrc/law/`) and torch's arithmetic on it: in fp64 for Cauchy, geometric,
gamma, beta and Dirichlet, else in fp32 (fp64 for fp64), rounded once to the dtype. Draws are bit for bit the same on every
device; what torch's exp, tan or softmax make of them agrees to rounding.

Parameters are numbers, or floating tensors that broadcast; without `size` their shape is the result's. Gradients flow to
tensors through the value (a location and scale, or implicitly: Figurnov, Mohamed and Mnih 2018), but not through `normal`,
which is torch.normal's twin, and not through `geometric`.
"""

import math

import torch
from torch.autograd.function import once_differentiable

from .generator import Generator, check_generator
from .noise import check_values, checked_device, checked_float, checked_shape, draw_fill, of_parameters
from .nonce import is_compiling

_WIDE = torch.float64


def _place(size, dtype, device, generator: Generator | None, **parameters):
    """(shape, dtype, device) of the result."""
    check_generator(generator)
    for name, value in parameters.items():
        if not isinstance(value, (int, float, torch.Tensor)):
            raise TypeError(f"{name}: a number or a floating tensor, got {type(value).__name__}")
    size = () if size is None else (size,)
    if any(isinstance(value, torch.Tensor) for value in parameters.values()):
        shape, dtype, device = of_parameters(size, dtype, device, **parameters)
    elif not size:
        raise TypeError("size: is missing, and no parameter is a tensor to take it from")
    else:
        shape, device = checked_shape(size), checked_device(device, generator)
    return shape, checked_float(dtype), device


def _check(name: str, value, rule: str, test) -> None:
    check_values(value, test(value), f"{name}: must be {rule}")


def _is_finite(x):
    return x.isfinite() if isinstance(x, torch.Tensor) else math.isfinite(x)


def _is_positive(x):
    return (x > 0) & _is_finite(x)


def _is_not_negative(x):
    return (x >= 0) & _is_finite(x)


def _to(value, dtype):
    return value.to(dtype) if isinstance(value, torch.Tensor) else float(value)


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return _WIDE if dtype == _WIDE else torch.float32


# --- by location and scale --------------------------------------------------------------------------------------------


def _scaled_normal(mean, std, shape, dtype, device, stream, generator):
    _check("mean", mean, "finite", _is_finite)
    _check("std", std, "finite and at least 0", _is_not_negative)
    wide = _arithmetic(dtype)
    return draw_fill("normal", shape, wide, device, stream, generator) * _to(std, wide) + _to(mean, wide)


def normal(
    mean=0.0, std=1.0, size=None, *, dtype=None, device=None, stream: str = "chacha8", generator=None
) -> torch.Tensor:
    """Normals of a mean and a standard deviation, within 7.54 std of the mean (fp64: 9.49). Like torch.normal.

    As torch's, the result lets no gradient through to mean and std: for that write mean + std * ev.randn(...).
    size, dtype, device: as in the head of this file. stream, generator: as `rand`. ValueError for a std that is negative
    or not finite, or a mean that is not; else as `rand`.
    """
    mean, std = (t.detach() if isinstance(t, torch.Tensor) else t for t in (mean, std))
    shape, dtype, device = _place(size, dtype, device, generator, mean=mean, std=std)
    return _scaled_normal(mean, std, shape, dtype, device, stream, generator).to(dtype)


def log_normal(
    mean=0.0, std=1.0, size=None, *, dtype=None, device=None, stream: str = "chacha8", generator=None
) -> torch.Tensor:
    """exp of a normal of that mean and standard deviation: between exp(mean - 7.54 std) and exp(mean + 7.54 std) (fp64:
    9.49), never 0 but by underflow. Differentiable. Arguments and errors as `normal`."""
    shape, dtype, device = _place(size, dtype, device, generator, mean=mean, std=std)
    return _scaled_normal(mean, std, shape, dtype, device, stream, generator).exp().to(dtype)


def uniform(
    low=0.0, high=1.0, size=None, *, dtype=None, device=None, stream: str = "chacha8", generator=None
) -> torch.Tensor:
    """Uniforms in [low, high): low + (high - low) u, u a multiple of 2^-24 (fp64: 2^-53). Differentiable.

    What rounding would carry to high becomes the dtype's greatest number below it. ValueError where low > high or their
    difference is not finite; else as `normal`.
    """
    shape, dtype, device = _place(size, dtype, device, generator, low=low, high=high)
    wide = _arithmetic(dtype)
    low, high = (torch.as_tensor(t, dtype=wide, device=device) for t in (low, high))
    check_values(low, _is_not_negative(high - low), "low: must not be above high, nor infinitely far from it")
    x = (draw_fill("uniform", shape, wide, device, stream, generator) * (high - low) + low).to(dtype)
    end, start = high.detach().to(dtype), low.detach().to(dtype)
    if dtype in (torch.bfloat16, torch.float16):  # torch's nextafter knows no fp16
        below = torch.where(start < end, _next_below(end), start)
    else:
        below = torch.nextafter(end, start)
    value = x.detach()
    return x + torch.where(value >= end, below - value, 0)  # exact, as neighbours' differences are


def _next_below(x: torch.Tensor) -> torch.Tensor:
    """The greatest 16-bit float below x, by its bit pattern."""
    pattern = x.view(torch.int16)
    smallest_negative = torch.full_like(pattern, -(2**15) + 1)
    return torch.where(x > 0, pattern - 1, torch.where(x == 0, smallest_negative, pattern + 1)).view(x.dtype)


def cauchy(
    median=0.0, sigma=1.0, size=None, *, dtype=None, device=None, stream: str = "chacha8", generator=None
) -> torch.Tensor:
    """Cauchy's distribution: median + sigma cot(pi v), v = (64-bit draw + 1/2) 2^-64, symmetric to the last bit.

    Within 1.18e19 sigma of the median; fp16 holds no more than 65504, beyond which it is Inf (one value in 10^5 at sigma 1).
    Differentiable. ValueError for a sigma that is not positive and finite or a median that is not finite; else as
    `normal`.
    """
    shape, dtype, device = _place(size, dtype, device, generator, median=median, sigma=sigma)
    _check("median", median, "finite", _is_finite)
    _check("sigma", sigma, "positive and finite", _is_positive)
    whole = torch.zeros(1, dtype=torch.int64, device=device)  # all 2^64 integers
    draws = draw_fill("integers", shape, torch.int64, device, stream, generator, whole)
    half = ((draws ^ (draws >> 63)).to(_WIDE) + 0.5) * (math.pi * 2.0**-64)  # in (0, pi/2]
    x = torch.copysign(1 / half.tan(), draws.to(_WIDE) + 0.5)
    return (x * _to(sigma, _WIDE) + _to(median, _WIDE)).to(dtype)


def geometric(p, size=None, *, dtype=None, device=None, stream: str = "chacha8", generator=None) -> torch.Tensor:
    """Numbers of trials up to the first success: 1 + floor(E / -ln(1 - p)), E an fp64 exponential of a 64-bit draw.

    From 1 to 45.05/p, P(k) = p (1 - p)^(k-1). No gradient, as torch's Tensor.geometric_. ValueError
    for a p outside (0, 1]; else as `normal`.
    """
    shape, dtype, device = _place(size, dtype, device, generator, p=p)
    _check("p", p, "above 0 and at most 1", lambda p: (p > 0) & (p <= 1))
    if isinstance(p, torch.Tensor):
        rate = -torch.log1p(-p.detach().to(_WIDE))
    else:
        rate = math.inf if p == 1 else -math.log1p(-p)
    return (draw_fill("exponential", shape, _WIDE, device, stream, generator) / rate).floor().add_(1).to(dtype)


# --- gamma and its kin ------------------------------------------------------------------------------------------------


class _Implicit(torch.autograd.Function):
    """A variate, with the gradient of its parameter by implicit reparameterization (Figurnov et al. 2018), which subclasses
    give. Differentiated twice it says so."""

    generate_vmap_rule = True

    @staticmethod
    def forward(parameter, variate):
        return variate.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)


class _ImplicitGamma(_Implicit):
    """A gamma variate and its shape."""

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * torch._standard_gamma_grad(*ctx.saved_tensors), None


def _with_gamma_slope(a, x):
    """x, with the gradient of its shape a. In compiled code, where dynamo takes no Function with rules, by a term of 0."""
    if not is_compiling():
        return _ImplicitGamma.apply(a, x)
    return x + (a - a.detach()) * torch._standard_gamma_grad(a.detach(), x)


class _ImplicitDirichlet(_Implicit):
    """A point of the simplex and its concentrations."""

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        concentration, x = ctx.saved_tensors
        slope = torch._dirichlet_grad(
            x, concentration, concentration.sum(-1, True).expand_as(concentration).contiguous()
        )
        # Moving one concentration moves its component, and all others in proportion to keep the sum.
        return slope * (grad - (x * grad).sum(-1, True)), None


def _dirichlet_slope(a, x):
    """Of each component by its own concentration, over 1 minus it."""
    return torch._dirichlet_grad(x, a, a.sum(-1, True).expand_as(a).contiguous())


def _with_dirichlet_slope(a, x):
    if not is_compiling():
        return _ImplicitDirichlet.apply(a, x)
    moved = (a - a.detach()) * _dirichlet_slope(a.detach(), x)
    return x + moved - x * moved.sum(-1, True)


def _shapes(concentration, shape, device) -> torch.Tensor:
    """The fp64 parameters of a draw, in the graph."""
    return torch.as_tensor(concentration, dtype=_WIDE, device=device).expand(shape).contiguous()


def gamma(
    concentration, rate=1.0, size=None, *, dtype=None, device=None, stream: str = "chacha8", generator=None
) -> torch.Tensor:
    """Gamma variates by Marsaglia and Tsang (2000) in fp64, as a pure function of the stream (`csrc/law/gamma.h`).

    Never 0: what is too small for the dtype is its smallest normal number. Of 48 tries, each with draws of its own, one is
    taken but for one element in 10^63. Differentiable once. ValueError for a concentration or rate that is not
    positive and finite; else as `normal`.
    """
    shape, dtype, device = _place(size, dtype, device, generator, concentration=concentration, rate=rate)
    _check("concentration", concentration, "positive and finite", _is_positive)
    _check("rate", rate, "positive and finite", _is_positive)
    a = _shapes(concentration, shape, device)
    x = draw_fill("gamma", shape, _WIDE, device, stream, generator, a.detach())
    x = _with_gamma_slope(a, x.clamp(min=torch.finfo(_WIDE).tiny))
    return (x / _to(rate, _WIDE)).to(dtype).clamp(min=torch.finfo(dtype).tiny)


def dirichlet(
    concentration: torch.Tensor, *, dtype=None, device=None, stream: str = "chacha8", generator=None
) -> torch.Tensor:
    """Points of the simplex, the last dimension's components adding up to 1: softmax of the logarithms of gamma variates,
    which do not underflow where concentrations are small.

    concentration: floating, (..., components). Components are at least the dtype's smallest normal number. Differentiable
    once. ValueError where one is not positive and finite; else as `normal`.
    """
    if not isinstance(concentration, torch.Tensor) or concentration.dim() < 1:
        raise TypeError("concentration: a floating tensor, (..., components)")
    shape, dtype, device = _place(None, dtype, device, generator, concentration=concentration)
    _check("concentration", concentration, "positive and finite", _is_positive)
    a = _shapes(concentration, shape, device)
    logarithms = draw_fill("log_gamma", shape, _WIDE, device, stream, generator, a.detach())
    x = torch.softmax(logarithms.clamp(min=-1e300), -1).clamp(min=torch.finfo(_WIDE).tiny)
    return _with_dirichlet_slope(a, x).to(dtype).clamp(min=torch.finfo(dtype).tiny)


def beta(a, b, size=None, *, dtype=None, device=None, stream: str = "chacha8", generator=None) -> torch.Tensor:
    """Beta variates: the first component of Dirichlet points of (a, b). Arguments and errors as `gamma`."""
    shape, dtype, device = _place(size, dtype, device, generator, a=a, b=b)
    _check("a", a, "positive and finite", _is_positive)
    _check("b", b, "positive and finite", _is_positive)
    both = torch.stack([_shapes(t, shape, device) for t in (a, b)], -1)
    return dirichlet(both, stream=stream, generator=generator)[..., 0].to(dtype)
