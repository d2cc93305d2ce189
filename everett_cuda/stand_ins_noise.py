"""Stand-ins for torch's tensors of random numbers: torch.rand, torch.normal, torch.bernoulli and their like.

Values come from `noise`; what torch promises about the tensor they lie in (out=, strides of the _like forms, pinned
memory, requires_grad) is done here. What ours has no numbers for, and arguments that are mistakes, go to torch.
"""

from collections.abc import Callable

import torch
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from . import noise
from .categories import multinomial as quantum_multinomial
from .integers import randint, randperm
from .kernels import NOISE_TYPES
from .nonce import functorch_level, is_compiling
from .stand_ins import INSTALLED, stands_for
from .untouched import NOTHING_RANDOM, leave, why_not

INTEGER_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _ours(generator) -> dict:
    """The keyword arguments that hand on a generator of ours."""
    return {} if generator is None else {"generator": generator}


def _why_not_made(dtype, layout, device, generator, names=None, types=NOISE_TYPES) -> str | None:
    """Why torch must make a tensor of these."""
    if why := why_not(generator=generator):
        return why
    if names is not None:
        return "named dimensions"
    if layout not in (None, torch.strided):
        return f"layout {str(layout).removeprefix('torch.')}"
    if dtype not in types:
        return f"dtype {str(dtype).removeprefix('torch.')}"
    kind = torch.device(device).type
    return None if kind in ("cpu", "cuda") else NOTHING_RANDOM if kind == "meta" else f"device {kind}"


def _default_device() -> torch.device:
    # dynamo can't call get_default_device, but knows where an empty tensor is
    return torch.empty(0).device if is_compiling() else torch.get_default_device()


def finished(values: torch.Tensor, out=None, requires_grad=False, pin_memory=False) -> torch.Tensor:
    """values, in `out` if there is one (resized as torch does)."""
    if out is not None:
        torch.empty(values.shape, out=out)
        return out.copy_(values)
    if pin_memory:
        values = values.pin_memory()
    return values.requires_grad_() if requires_grad else values


def factory(name: str, make: Callable, default_dtype=torch.get_default_dtype, types=NOISE_TYPES) -> Callable:
    """The stand-in of torch.NAME(size or arguments, options). make(*args, dtype=, device=): ours."""
    torchs, attribute, name = getattr(torch, name), name, f"torch.{name}"

    @stands_for(name)
    def stand_in(
        *args, generator=None, out=None, dtype=None, layout=None, device=None, requires_grad=False, pin_memory=False,
        names=None, **kwargs,
    ):  # fmt: skip
        made_dtype = dtype or (default_dtype() if out is None else out.dtype)
        made_on = device if device is not None else _default_device() if out is None else out.device
        if why := _why_not_made(made_dtype, layout, made_on, generator, names, types):
            options = {
                "out": out, "dtype": dtype, "layout": layout, "device": device, "requires_grad": requires_grad or None,
                "pin_memory": pin_memory or None, "names": names, "generator": generator,
            }  # fmt: skip
            given = {option: value for option, value in options.items() if value is not None}
            return leave(name, why, torchs, *args, **given, **kwargs)
        values = make(*args, dtype=made_dtype, device=made_on, **_ours(generator), **kwargs)
        return finished(values, out, requires_grad, pin_memory)

    stand_in.__name__ = stand_in.__qualname__ = attribute
    return stand_in


def _by_size(make: Callable) -> Callable:
    def by_size(*size, **kwargs):
        return make(*(size or (kwargs.pop("size"),)), **kwargs)

    return by_size


factory("rand", _by_size(noise.rand))
factory("randn", _by_size(noise.randn))
factory("randint", randint, lambda: torch.int64, (*INTEGER_TYPES, *NOISE_TYPES))
factory("randperm", randperm, lambda: torch.int64, (*INTEGER_TYPES, *NOISE_TYPES))


def like(name: str, make: Callable, types=NOISE_TYPES) -> Callable:
    """The stand-in of torch.NAME(input, ..., options). make(shape, *args, dtype=, device=): ours."""
    torchs, attribute, name = getattr(torch, name), name, f"torch.{name}"

    @stands_for(name)
    def stand_in(input, *args, dtype=None, layout=None, device=None, generator=None, **kwargs):
        options = {"dtype": dtype, "layout": layout, "device": device, "generator": generator, **kwargs}
        given = {option: value for option, value in options.items() if value is not None}
        if has_torch_function_unary(input):
            return handle_torch_function(stand_in, (input,), input, *args, **given)
        made_dtype, made_on = dtype or input.dtype, device if device is not None else input.device
        why = why_not(input) or _why_not_made(made_dtype, layout or input.layout, made_on, generator, None, types)
        if why:
            return leave(name, why, torchs, input, *args, **given)
        requires_grad, pinned = kwargs.pop("requires_grad", False), kwargs.pop("pin_memory", False)
        memory_format = kwargs.pop("memory_format", torch.preserve_format)
        values = make(input.shape, *args, dtype=made_dtype, device=made_on, **_ours(generator), **kwargs)
        if functorch_level() is None and (memory_format is not torch.preserve_format or not input.is_contiguous()):
            options = {"dtype": made_dtype, "device": made_on, "memory_format": memory_format}
            values = torch.empty_like(input, **options).copy_(values)
        return finished(values, None, requires_grad, pinned)

    stand_in.__name__ = stand_in.__qualname__ = attribute
    return stand_in


def _integers_like(shape, low=None, high=None, **kwargs):
    low, high = (0, low) if high is None else (0 if low is None else low, high)
    return randint(low, high, shape, **kwargs)


like("rand_like", noise.rand)
like("randn_like", noise.randn)
like("randint_like", _integers_like, (*INTEGER_TYPES, *NOISE_TYPES))


# --- by tensors of parameters -----------------------------------------------------------------------------------------


def undifferentiated(values: torch.Tensor, *inputs) -> torch.Tensor:
    """values with the gradient that torch gives its draws: zero for every input, but there."""
    for x in inputs:
        if isinstance(x, torch.Tensor) and x.requires_grad and torch.is_grad_enabled():
            values = torch.where(torch.ones((), dtype=torch.bool, device=x.device), values, x.to(values.dtype))
    return values


_bernoulli = torch.bernoulli


@stands_for("torch.bernoulli")
@stands_for("torch.Tensor.bernoulli", table=INSTALLED)
def bernoulli(input, p=None, *, generator=None, out=None):
    if has_torch_function_unary(input):
        return handle_torch_function(bernoulli, (input,), input, *(() if p is None else (p,)), generator=generator, out=out)
    why = why_not(input, generator=generator)
    if not why and (p is None or out is not None) and input.dtype not in NOISE_TYPES:
        why = f"dtype {str(input.dtype).removeprefix('torch.')}"
    if why:
        given = () if p is None else (p,)
        options = {} if out is None else {"out": out}
        return leave("torch.bernoulli", why, _bernoulli, input, *given, generator=generator, **options)
    if p is None:
        values = noise.bernoulli(input.detach(), **_ours(generator))
    else:
        values = bernoulli_values(p, input, generator)
    if out is not None:
        return finished(values, out)
    return undifferentiated(values, input)


def bernoulli_values(p, x: torch.Tensor, generator=None) -> torch.Tensor:
    """Decisions of probability p (a number or a tensor) in x's shape, dtype and device; every dtype can hold them."""
    dtype = x.dtype if x.dtype in NOISE_TYPES else torch.float32
    if isinstance(p, torch.Tensor):
        values = noise.bernoulli(p.to(torch.float64, copy=False).expand(x.shape), dtype=dtype, **_ours(generator))
    else:
        values = noise.bernoulli(float(p), x.shape, dtype=dtype, device=x.device, **_ours(generator))
    return values.to(x.dtype)


_multinomial = torch.multinomial


@stands_for("torch.multinomial")
@stands_for("torch.Tensor.multinomial", table=INSTALLED)
def multinomial(input, num_samples, replacement=False, *, generator=None, out=None):
    options = {"generator": generator} | ({} if out is None else {"out": out})
    if has_torch_function_unary(input):
        return handle_torch_function(multinomial, (input,), input, num_samples, replacement, **options)
    why = why_not(input, generator=generator)
    if not why and input.dtype not in NOISE_TYPES:
        why = f"dtype {str(input.dtype).removeprefix('torch.')}"
    if why:
        return leave("torch.multinomial", why, _multinomial, input, num_samples, replacement, **options)
    return finished(quantum_multinomial(input, num_samples, replacement, **_ours(generator)), out)


_normal = torch.normal


@stands_for("torch.normal")
def normal(mean, std=None, size=None, *, generator=None, out=None, **options):
    call = {"mean": mean, "std": 1.0 if std is None else std} | ({} if size is None else {"size": size})
    tensors = [t for t in (mean, std) if isinstance(t, torch.Tensor)]
    if has_torch_function(tensors):
        return handle_torch_function(normal, tensors, **call, generator=generator, out=out, **options)
    std = call["std"]
    if tensors:
        dtype, device = tensors[0].dtype, tensors[0].device
        why = why_not(*tensors, generator=generator)
    else:
        dtype = options.get("dtype") or (torch.get_default_dtype() if out is None else out.dtype)
        device = options.get("device")
        device = device if device is not None else _default_device() if out is None else out.device
        why = None
    why = why or _why_not_made(dtype, options.get("layout"), device, generator, options.get("names"))
    if why:
        extra = options | ({} if out is None else {"out": out})
        return leave("torch.normal", why, _normal, **call, generator=generator, **extra)
    if not isinstance(std, torch.Tensor) and std < 0:
        raise RuntimeError(f"normal expects std >= 0.0, but found std {std}")
    shape = torch.broadcast_shapes(*(t.shape for t in tensors)) if tensors else size
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in (mean, std)]
    standard = noise.randn(shape, dtype=dtype, device=device, **_ours(generator))
    values = (standard * detached[1] + detached[0]).to(dtype)
    if out is not None:
        return finished(values, out)
    if tensors:
        return undifferentiated(values, *tensors)
    return finished(values, None, options.get("requires_grad", False), options.get("pin_memory", False))
