"""Where an op runs: for each device one object with its element types, its draw of a record and its kernels.

Ops and noise ask `of(device)` and know no device themselves. The CPU's is here; a GPU's is in `kernels_cuda`, made when
the first tensor on that GPU comes.
"""

from typing import NamedTuple

import numpy as np
import torch

from . import _C, keys
from .errors import EverettError

# Numbers of the element types in the kernels (csrc/types.h): of noise, and of masked ops.
NOISE_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
INT32, INT64 = 4, 7
_FP8 = {"float8_e4m3fn": 5, "float8_e5m2": 6}
TYPES = NOISE_TYPES | {getattr(torch, name): number for name, number in _FP8.items() if hasattr(torch, name)}
# kind of noise: (number in the kernels, purpose tag)
KINDS = {
    "words": (0, 8), "uniform": (1, 2), "normal": (2, 3), "exponential": (3, 4), "gumbel": (4, 4), "bernoulli": (5, 6),
    "integers": (6, 8), "gamma": (7, 9), "log_gamma": (8, 9),
}  # fmt: skip
_DROPOUT, _DROPOUT_ADD, _AFFINE = 0, 1, 2
_SERIAL_BELOW = 32768  # elements; a second thread costs more than it gives
_empty_like = torch.empty_like


class Mask(NamedTuple):
    """What an op does with its keep mask.

    affine: (scale, shift, dropped) instead of 1/(1-p), 0, 0. batch: leading dimensions that share one mask (vmap).
    mask_dims: how many of the dimensions after these have a decision of their own (the rest repeat it); None: all.
    plain: none of these three is used (spared looking at each of them in every call).
    """

    p: float
    stream: int
    affine: tuple | None = None
    batch: int = 0
    mask_dims: int | None = None

    plain: bool = False

    def op(self, residual: torch.Tensor | None) -> int:
        """The number of the masked op."""
        return _AFFINE if self.affine is not None else _DROPOUT if residual is None else _DROPOUT_ADD


class Fill(NamedTuple):
    """A tensor of noise: a kind of KINDS, shape, dtype (int32 for words, int64 for integers) and the number of the stream's
    generator."""

    kind: str
    shape: tuple
    dtype: torch.dtype
    stream: int

    @property
    def type(self) -> int:
        return {torch.int32: INT32, torch.int64: INT64}.get(self.dtype) or NOISE_TYPES[self.dtype]


def _row_major(shape) -> list[int]:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return strides[::-1]


def _logical_strides(shape, mask: Mask) -> tuple[int, ...]:
    """Strides of the logical index e: 0 where a dimension repeats the decision of another."""
    own = tuple(shape[mask.batch :])
    decided = len(own) if mask.mask_dims is None else mask.mask_dims
    return (0,) * mask.batch + tuple(_row_major(own[:decided])) + (0,) * (len(own) - decided)


def strided(
    x: torch.Tensor, residual: torch.Tensor | None, y: torch.Tensor, mask: Mask, whole: tuple | None = None
) -> tuple:
    """Sizes, and strides of x, residual, y and the logical index, as the strided kernels take them. whole: the sizes of
    the tensor that x is a shard of, None: x's own."""
    return (
        tuple(x.shape) or (1,),
        x.stride() or (1,),
        (0,) * (x.dim() or 1) if residual is None else residual.stride() or (1,),
        y.stride() or (1,),
        _logical_strides(x.shape if whole is None else whole, mask) or (1,),
    )


def shard_offset(whole: tuple, starts: list[int], mask: Mask) -> int:
    """The logical index of the first element of the shard that begins at `starts` in a tensor of sizes `whole`."""
    return sum(start * step for start, step in zip(starts, _logical_strides(whole, mask), strict=True))


def address(t: torch.Tensor | None) -> int:
    """Where t's memory is; 0 for None."""
    return 0 if t is None else t.data_ptr()


def columns(x: torch.Tensor) -> int:
    """Elements of a row."""
    return x.shape[-1] if x.dim() else 1


def record_bytes(record: bytes | torch.Tensor) -> bytes:
    """A record as 48 bytes; a tensor of twelve int32 must lie on the CPU."""
    return record if type(record) is bytes else record.contiguous().numpy().tobytes()


def _threads(n: int) -> int:
    return 1 if n < _SERIAL_BELOW else torch.get_num_threads()


class Cpu:
    """The CPU's kernels, in `_C`."""

    types = TYPES

    @staticmethod
    def draw(world: bool = False) -> bytes:
        """The record of a new draw; world: its family (`keys.draw_record`)."""
        return keys.draw_record(world)

    @staticmethod
    def draw_by(generator: int, nonce_address: int) -> bytes:
        """The record of a draw by an `ev.Generator` of this number."""
        return keys.draw_generator_record(generator, nonce_address)

    @staticmethod
    def mix(nonce: torch.Tensor, grad_enabled: bool, world: bool = False) -> torch.Tensor:
        """The record (twelve int32) of a nonce that was drawn as a tensor."""
        return torch.frombuffer(bytearray(keys.record_from_nonce(nonce, grad_enabled, world)), dtype=torch.int32)

    @staticmethod
    def draw_and_drop(x: torch.Tensor, mask: Mask) -> tuple[torch.Tensor, bytes]:
        """(result, record) of a plain mask on a contiguous x, outside a backward: draw and kernel in one call into C++."""
        y = _empty_like(x)
        n = x.numel()
        threads = 1 if n < _SERIAL_BELOW else _threads(n)
        return y, keys.draw_dropout(mask.stream, mask.p, TYPES[x.dtype], x.data_ptr(), y.data_ptr(), n, threads)

    @staticmethod
    def masked(x: torch.Tensor, residual: torch.Tensor | None, record: bytes | torch.Tensor, mask: Mask) -> torch.Tensor:
        """The masked op on real memory; every op and every backward ends here, or at its twin for GPUs."""
        y = _empty_like(x)
        n = x.numel()
        if n == 0:
            return y
        record = record_bytes(record)
        if mask.plain and x.is_contiguous() and (residual is None or residual.is_contiguous()):
            threads = _threads(n)
            if residual is None:
                _C.dropout(record, mask.stream, mask.p, TYPES[x.dtype], x.data_ptr(), y.data_ptr(), n, 0, threads)
            else:
                _C.dropout_add(
                    record, mask.stream, mask.p, TYPES[x.dtype], x.data_ptr(), residual.data_ptr(), y.data_ptr(), n, 0,
                    threads,
                )  # fmt: skip
            return y
        _C.masked_strided(
            mask.op(residual), record, mask.stream, mask.p, TYPES[x.dtype], mask.affine or (0.0, 0.0, 0.0), x.data_ptr(),
            address(residual), y.data_ptr(), *strided(x, residual, y, mask), 0, 0, _threads(n),
        )  # fmt: skip
        return y

    @staticmethod
    def masked_shard(x: torch.Tensor, residual: torch.Tensor | None, record, mask: Mask, whole: tuple, starts: list[int]):
        """The masked op on a shard, not empty, of a tensor of sizes `whole`, where its first element is at `starts`."""
        y = _empty_like(x)
        _C.masked_strided(
            mask.op(residual), record_bytes(record), mask.stream, mask.p, TYPES[x.dtype], mask.affine or (0.0, 0.0, 0.0),
            x.data_ptr(), address(residual), y.data_ptr(), *strided(x, residual, y, mask, whole),
            shard_offset(whole, starts, mask), 0, _threads(x.numel()),
        )  # fmt: skip
        return y

    @staticmethod
    def fused(op: int, record, mask: Mask, x: torch.Tensor, bias, extra) -> torch.Tensor:
        """A fused op (csrc/types.h). x: (..., N); bias: (N,) or None; extra: like x or None; all contiguous."""
        y = _empty_like(x)
        n = x.numel()
        _C.fused_dropout(
            op, record_bytes(record), mask.stream, mask.p, TYPES[x.dtype], x.data_ptr(), address(bias), address(extra),
            y.data_ptr(), n, columns(x), 0, _threads(n),
        )  # fmt: skip
        return y

    @staticmethod
    def add_noise(record, stream: int, sigma: float, x: torch.Tensor) -> torch.Tensor:
        """x + sigma * normal; x contiguous."""
        y, n = _empty_like(x), x.numel()
        _C.add_noise(
            record_bytes(record), stream, TYPES[x.dtype], sigma, x.data_ptr(), y.data_ptr(), n, 0, _threads(n)
        )
        return y

    @staticmethod
    def stochastic_round(record, stream: int, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """fp32 x, contiguous, rounded to dtype."""
        y, n = _empty_like(x, dtype=dtype), x.numel()
        _C.stochastic_round(record_bytes(record), stream, TYPES[dtype], x.data_ptr(), y.data_ptr(), n, 0, _threads(n))
        return y

    @staticmethod
    def attention_mask(record, stream: int, p: float, x: torch.Tensor) -> torch.Tensor:
        """Weights (heads, queries, keys), contiguous, after dropout by the attention law; p from 1/256 to 31/32."""
        y = _empty_like(x)
        _C.attention_mask(
            record_bytes(record), stream, p, TYPES[x.dtype], x.data_ptr(), y.data_ptr(), *x.shape, 0, 0, 0,
            _threads(x.numel()),
        )  # fmt: skip
        return y

    @staticmethod
    def fill(record: bytes | torch.Tensor, fill: Fill, p: torch.Tensor | None) -> torch.Tensor:
        """Noise expanded from a record. p: contiguous, one an element or one for all: fp64 probabilities (bernoulli), int64
        numbers of integers, 0 for 2^64 (integers), or fp64 shapes (gamma, log_gamma)."""
        out = torch.empty(fill.shape, dtype=fill.dtype, device="cpu")
        n = out.numel()
        if n == 0:
            return out
        kind, tag = KINDS[fill.kind]
        size, one = (n,), (1,)  # contiguous all through: one dimension, logical index = position
        p_step = (0,) if p is not None and p.numel() == 1 else one
        _C.fill(
            kind, record_bytes(record), fill.stream, tag, fill.type, address(p), out.data_ptr(), size, p_step, one, one, 0,
            0, _threads(n),
        )  # fmt: skip
        return out

    @staticmethod
    def direct(fill: Fill, p: torch.Tensor | None) -> torch.Tensor:
        """Noise of direct words; p as for `fill`."""
        from .session import current_source  # here, because session needs keys and the package needs the kernels

        out = torch.empty(fill.shape, dtype=fill.dtype, device="cpu")
        source, n = current_source(), out.numel()
        if n == 0:
            return out
        flat = out.view(-1)
        if fill.kind == "bernoulli":
            decided = np.empty(n, np.uint8)
            _C.law_bernoulli(source.direct_words(n).view(np.uint32), p.reshape(-1).numpy(), decided)
            flat.copy_(torch.from_numpy(decided))
        elif fill.kind == "words":
            flat.copy_(torch.from_numpy(source.direct_words((n + 1) // 2).view(np.int32)[:n]))
        else:
            name = str(fill.dtype).removeprefix("torch.")
            words = source.direct_words((_C.law_words(fill.kind, name, n) + 1) // 2).view(np.uint32)
            numbers = flat.view(torch.uint16).numpy() if fill.dtype == torch.bfloat16 else flat.numpy()
            _C.law_convert(fill.kind, name, words, numbers)
        return out


CPU = Cpu()
_by_index: dict = {-1: CPU}  # by Tensor.get_device(), the cheapest question; GPUs join as they are used


def of_tensor(x: torch.Tensor):
    """The kernels of the device that x is on: a CPU or CUDA tensor (or an op's fake one). Raises EverettError where that
    GPU cannot run them."""
    return _by_index.get(x.get_device()) or of_device(x.device)


def of_device(device: torch.device):
    """As `of_tensor`; "cuda" without an index is the current GPU."""
    if device.type == "cpu":
        return _by_index[-1]
    if device.type != "cuda":
        raise EverettError(f"device: kernels run on a CPU or an NVIDIA GPU, not on {device}. Draw there and move it.")
    from . import kernels_cuda  # here, so that CPU programs never import it

    index = kernels_cuda.checked_index(device)
    if index not in _by_index:
        _by_index.setdefault(index, kernels_cuda.open_gpu(index))
    return _by_index[index]
