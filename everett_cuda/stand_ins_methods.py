"""Stand-ins for torch.Tensor's random methods, which `install` swaps: uniform_, normal_, bernoulli_, random_ and their like.

Values are made contiguous in row-major order and copied in, so they do not depend on strides; autograd sees a copy, hence
torch's rules for in-place changes. All draws are of the world family.
"""


import torch
from torch.overrides import handle_torch_function, has_torch_function_unary

from . import distributions, noise
from .in_place import greatest
from .integers import integers_into
from .kernels import NOISE_TYPES
from .stand_ins import INSTALLED, stands_for
from .stand_ins_noise import INTEGER_TYPES, _ours, bernoulli_values
from .untouched import leave, why_not

_ANY_TYPES = (*NOISE_TYPES, *INTEGER_TYPES, torch.bool)


def _in_place(attribute: str, types, *parameters: tuple[str, object]):
    """Decorator of values(x, *parameters, generator): makes the stand-in of Tensor.ATTRIBUTE(*parameters, generator=None).

    types: the dtypes that ours fills. parameters: (name, default).
    """
    torchs, name = getattr(torch._C.TensorBase, attribute), f"Tensor.{attribute}"

    def decorate(values):
        @stands_for(f"torch.{name}", table=INSTALLED)
        def stand_in(self, *args, generator=None, **kwargs):
            if has_torch_function_unary(self):
                return handle_torch_function(stand_in, (self,), self, *args, generator=generator, **kwargs)
            why = why_not(self, generator=generator)
            if not why and self.dtype not in types:
                why = f"dtype {str(self.dtype).removeprefix('torch.')}"
            if why:
                return leave(name, why, torchs, self, *args, generator=generator, **kwargs)
            if len(args) > len(parameters) or kwargs.keys() - {parameter for parameter, _ in parameters[len(args) :]}:
                raise TypeError(f"{name}() got unexpected arguments; it takes {[p for p, _ in parameters]}")
            rest = [kwargs.get(parameter, default) for parameter, default in parameters[len(args) :]]
            return self.copy_(values(self, *args, *rest, generator))

        stand_in.__name__ = stand_in.__qualname__ = attribute
        return stand_in

    return decorate


def _of(x: torch.Tensor, generator) -> dict:
    return {"dtype": x.dtype, "device": x.device} | _ours(generator)


def _double(x: torch.Tensor, generator) -> dict:
    return {"dtype": torch.float64, "device": x.device} | _ours(generator)


@_in_place("uniform_", NOISE_TYPES, ("from", 0.0), ("to", 1.0))
def uniform_(x, low, high, generator):
    if low > high:
        raise RuntimeError(f"uniform_ expects to return a [from, to) range, but found from={low} > to={high}")
    return distributions.uniform(low, high, x.shape, **_of(x, generator))


@_in_place("normal_", NOISE_TYPES, ("mean", 0.0), ("std", 1.0))
def normal_(x, mean, std, generator):
    if std < 0:
        raise RuntimeError(f"normal expects std >= 0.0, but found std {std}")
    return distributions.normal(mean, std, x.shape, **_of(x, generator))


@_in_place("log_normal_", NOISE_TYPES, ("mean", 1.0), ("std", 2.0))
def log_normal_(x, mean, std, generator):
    if std <= 0:
        raise RuntimeError(f"log_normal_ expects std > 0.0, but found std={std}")
    return distributions.log_normal(mean, std, x.shape, **_of(x, generator))


@_in_place("exponential_", NOISE_TYPES, ("lambd", 1.0))
def exponential_(x, rate, generator):
    if rate <= 0:
        raise RuntimeError(f"exponential_ expects lambda > 0.0, but found lambda={rate}")
    return noise.exponential(x.shape, rate=float(rate), **_of(x, generator))


@_in_place("cauchy_", NOISE_TYPES, ("median", 0.0), ("sigma", 1.0))
def cauchy_(x, median, sigma, generator):
    if sigma <= 0:
        raise RuntimeError(f"cauchy_ expects sigma > 0.0, but found sigma={sigma}")
    return distributions.cauchy(median, sigma, x.shape, **_of(x, generator))


@_in_place("geometric_", _ANY_TYPES, ("p", None))
def geometric_(x, p, generator):
    """Trials up to the first success: the exponential of rate -ln(1-p), rounded up; it is never 0."""
    if p is None or not 0 < p < 1:
        raise RuntimeError(f"geometric_ expects p to be in (0, 1), but got p={p}")
    return distributions.geometric(p, x.shape, **_double(x, generator))


@_in_place("bernoulli_", _ANY_TYPES, ("p", 0.5))
def bernoulli_(x, p, generator):
    return bernoulli_values(p, x, generator)


_NO_BOUND = object()


@_in_place("random_", _ANY_TYPES, ("from", _NO_BOUND), ("to", _NO_BOUND))
def random_(x, low, high, generator):
    """random_(): from 0 on; random_(to); random_(from, to); random_(from, None): up to the largest."""
    if high is _NO_BOUND and low is not _NO_BOUND:
        low, high = 0, low
    low = 0 if low is _NO_BOUND else low
    high = greatest(x.dtype) + 1 if high is _NO_BOUND or high is None else high
    if low >= high:
        raise RuntimeError(f"random_ expects 'from' to be less than 'to', but got from={low} >= to={high}")
    return integers_into(tuple(x.shape), low, high, x.dtype, x.device, "chacha8", generator)
