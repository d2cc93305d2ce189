"""The kernels of one GPU: hand-written CUDA in `_cuda`, on the right device and on torch's current stream.

No `record_stream` is needed here: all memory an op touches is allocated and used on the current stream of its device,
where torch's allocator orders reuse by itself; what one op keeps for another (a graph's records) is held by a reference
until the backward has run on the stream of the forward; and keys and direct words lie in memory of our own, which is
never given back while the process lives.
"""

import torch

from . import followers, keys
from .errors import EverettError
from .graph_key import GraphKey
from .kernels import KINDS, TYPES, Fill, Mask, address, columns, record_bytes, shard_offset, strided
from .pool import DirectPool

_NO_AFFINE = (0.0, 0.0, 0.0)
OLDEST = (8, 0)  # compute capability of the first GPU that the kernels are built for (A100)
_empty_like = torch.empty_like


class Cuda:
    """One GPU. index: its number; module: `_cuda`; generator: torch's default generator of the GPU; current_stream: gives
    the handle of torch's current stream there. Methods as those of `kernels.Cpu`."""

    types = TYPES

    def __init__(self, index: int, module, generator, current_stream, device: torch.device):
        self._index = index
        self._module = module
        self._generator = generator
        self._current_stream = current_stream
        self._device = device
        self._masked = module.masked
        self.graph_key = GraphKey(index, module, current_stream, device)
        self.pool = DirectPool(index, module, current_stream, device)

    def draw(self, world: bool = False) -> bytes | torch.Tensor:
        """The record of a new draw: bytes, or twelve int32 on the GPU while a graph is captured."""
        stream = self._current_stream(self._index)
        capture = self._module.capture_id(self._index, stream)
        if capture:
            return self.graph_key.record(capture, stream)
        self.graph_key.prepare(stream)
        return keys.draw_cuda_record(self._index, self._generator, world)

    def draw_by(self, generator: int, nonce_address: int) -> bytes:
        if self._module.capture_id(self._index, self._current_stream(self._index)):
            raise EverettError(
                "generator: an ev.Generator counts on the host, so a captured graph would repeat one draw at every replay. "
                "Leave it out in what is captured: draws then come from torch's generator of the GPU."
            )
        return keys.draw_generator_record(generator, nonce_address, self._index)

    def mix(self, nonce: torch.Tensor, grad_enabled: bool, world: bool = False) -> torch.Tensor:
        stream = self._current_stream(self._index)
        if self._module.capture_id(self._index, stream):
            return self.graph_key.derive(nonce.view(1, 2), stream)[0]
        self.graph_key.prepare(stream)
        return torch.frombuffer(bytearray(keys.record_from_nonce(nonce, grad_enabled, world)), dtype=torch.int32)

    def draw_and_drop(self, x: torch.Tensor, mask: Mask) -> tuple[torch.Tensor, bytes | torch.Tensor]:
        record = self.draw()
        return self.masked(x, None, record, mask), record

    def masked(
        self, x: torch.Tensor, residual: torch.Tensor | None, record: bytes | torch.Tensor, mask: Mask
    ) -> torch.Tensor:
        y = _empty_like(x)
        n = x.numel()
        if n == 0:
            return y
        contiguous = x.is_contiguous() and (residual is None or residual.is_contiguous())
        arguments = (
            mask.op(residual), self._record(record), mask.stream, mask.p, TYPES[x.dtype], mask.affine or _NO_AFFINE,
            x.data_ptr(), address(residual), y.data_ptr(),
        )  # fmt: skip
        stream = self._current_stream(self._index)
        if contiguous and mask.batch == 0 and mask.mask_dims is None:
            self._masked(*arguments, n, 0, 0, self._index, stream)
        else:
            self._module.masked_strided(*arguments, *strided(x, residual, y, mask), 0, 0, self._index, stream)
        return y

    def masked_shard(
        self, x: torch.Tensor, residual: torch.Tensor | None, record, mask: Mask, whole: tuple, starts: list[int]
    ) -> torch.Tensor:
        y = _empty_like(x)
        self._module.masked_strided(
            mask.op(residual), self._record(record), mask.stream, mask.p, TYPES[x.dtype], mask.affine or _NO_AFFINE,
            x.data_ptr(), address(residual), y.data_ptr(), *strided(x, residual, y, mask, whole),
            shard_offset(whole, starts, mask), 0, self._index, self._current_stream(self._index),
        )  # fmt: skip
        return y

    def fused(self, op: int, record, mask: Mask, x: torch.Tensor, bias, extra) -> torch.Tensor:
        y = _empty_like(x)
        self._module.fused_dropout(
            op, self._record(record), mask.stream, mask.p, TYPES[x.dtype], x.data_ptr(), address(bias), address(extra),
            y.data_ptr(), x.numel(), columns(x), 0, self._index, self._current_stream(self._index),
        )  # fmt: skip
        return y

    def add_noise(self, record, stream: int, sigma: float, x: torch.Tensor) -> torch.Tensor:
        y = _empty_like(x)
        self._module.add_noise(
            self._record(record), stream, TYPES[x.dtype], sigma, x.data_ptr(), y.data_ptr(), x.numel(), 0, self._index,
            self._current_stream(self._index),
        )  # fmt: skip
        return y

    def stochastic_round(self, record, stream: int, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        y = _empty_like(x, dtype=dtype)
        self._module.stochastic_round(
            self._record(record), stream, TYPES[dtype], x.data_ptr(), y.data_ptr(), x.numel(), 0, self._index,
            self._current_stream(self._index),
        )  # fmt: skip
        return y

    def attention_mask(self, record, stream: int, p: float, x: torch.Tensor) -> torch.Tensor:
        y = _empty_like(x)
        self._module.attention_mask(
            self._record(record), stream, p, TYPES[x.dtype], x.data_ptr(), y.data_ptr(), *x.shape, 0, 0, 0, self._index,
            self._current_stream(self._index),
        )  # fmt: skip
        return y

    def fill(self, record: bytes | torch.Tensor, fill: Fill, p: torch.Tensor | None) -> torch.Tensor:
        out = torch.empty(fill.shape, dtype=fill.dtype, device=self._device)
        n = out.numel()
        if n == 0:
            return out
        kind, tag = KINDS[fill.kind]
        self._module.fill(
            kind, self._record(record), fill.stream, tag, fill.type, address(p), out.data_ptr(), n, 0, 0, self._index,
            self._current_stream(self._index), p is not None and p.numel() == 1,
        )  # fmt: skip
        return out

    def direct(self, fill: Fill, p: torch.Tensor | None) -> torch.Tensor:
        out = torch.empty(fill.shape, dtype=fill.dtype, device=self._device)
        if out.numel():
            self.pool.convert(KINDS[fill.kind][0], fill.type, p, out)
        return out

    def _record(self, record: bytes | torch.Tensor) -> bytes | int:
        """As the kernels take it: the bytes go with the launch, a record on the GPU is read there."""
        if type(record) is bytes:
            return record
        return record.contiguous().data_ptr() if record.device == self._device else record_bytes(record)


def _load_module():
    """`_cuda`. EverettError where this installation has none."""
    try:
        from . import _cuda
    except ImportError as error:
        raise EverettError(
            f"this installation of everett_cuda has no CUDA kernels ({error}): they are built where nvcc is found. Put the "
            "CUDA toolkit's nvcc on PATH (or set CUDA_HOME) and install again: pip install --force-reinstall --no-deps "
            "everett_cuda. CPU tensors work as they are."
        ) from error
    return _cuda


def checked_index(device: torch.device) -> int:
    """The number of a CUDA device that torch can use. EverettError where there is none."""
    if torch.version.cuda is None:
        raise EverettError(
            f"device: {device} needs a torch that is built for CUDA, and torch {torch.__version__} is not. Install one "
            "(https://pytorch.org/get-started), or use the CPU."
        )
    count = torch.cuda.device_count()
    if count == 0:
        raise EverettError(
            f"device: {device} was asked for, and torch finds no NVIDIA GPU. Look at nvidia-smi and CUDA_VISIBLE_DEVICES, "
            "or use the CPU."
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        raise EverettError(f"device: {device} was asked for, and there are {count} GPUs, numbered from 0")
    return index


def check_driver(module) -> None:
    """EverettError where the driver is older than the CUDA runtime that the kernels are linked with (error 35)."""
    try:
        found = module.device_count()
    except RuntimeError as error:
        raise EverettError(
            f"the NVIDIA driver cannot run the CUDA kernels of this build ({error}). Update the driver, or install "
            f"everett_cuda again with an nvcc that is no newer than torch's CUDA ({torch.version.cuda})."
        ) from error
    if found == 0:
        raise EverettError("the CUDA runtime of everett_cuda's kernels finds no GPU. Look at nvidia-smi.")


def check_capability(name: str, capability: tuple[int, int]) -> None:
    """EverettError for a GPU that is older than the kernels' oldest target."""
    if capability < OLDEST:
        raise EverettError(
            f"{name} has compute capability {capability[0]}.{capability[1]}, and the CUDA kernels need "
            f"{OLDEST[0]}.{OLDEST[1]} (A100) or newer. Use the CPU: ev.dropout(x.cpu(), ...)."
        )


def open_gpu(index: int) -> Cuda:
    """The kernels of GPU `index`. Raises EverettError that names what is missing."""
    module = _load_module()
    check_driver(module)
    check_capability(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))
    torch.cuda.init()  # default_generators is empty before
    gpu = Cuda(
        index, module, torch.cuda.default_generators[index], torch._C._cuda_getCurrentRawStream, torch.device("cuda", index)
    )
    followers.follow(gpu.graph_key)
    followers.follow(gpu.pool)
    return gpu
