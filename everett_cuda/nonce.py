"""Nonces from torch's own generators, and what torch tells about where a draw happens.

A nonce is 128 bits from the generator of the tensor's device, which then stands where a torch op would have left it:
the books that torch, checkpoints and sharding frameworks keep of its state are our books too. Some of the facts come
from private calls of torch; they are looked up here, once, and a torch without one fails the import by name.
"""

import ctypes
import sys
import threading

import torch

from .errors import EverettError


def _private(path: str):
    """A private call of torch that the rules rest on; torch without it cannot be served."""
    value = torch
    for name in path.split("."):
        value = getattr(value, name, None)
    if value is None:
        raise ImportError(
            f"everett_cuda needs torch.{path}, which torch {torch.__version__} does not have: without it gradients "
            "under checkpointing could be silently wrong. Use a torch from 2.6 on that everett_cuda lists as tested."
        )
    return value


graph_task_id = _private("_C._current_graph_task_id")
current_node = _private("_C._current_autograd_node")
keep_graph = _private("_C._autograd._get_current_graph_task_keep_graph")
sequence_nr = _private("autograd._get_sequence_nr")
dispatch_modes = _private("_C._len_torch_dispatch_stack")
functorch_level = _private("_C._functorch.peek_interpreter_stack")
_functorch_depth = _private("_C._functorch.get_dynamic_layer_stack_depth")
is_legacy_batchedtensor = _private("_C._functorch.is_legacy_batchedtensor")
forward_grad_enabled = _private("_C._is_fwd_grad_enabled")
is_tracing = _private("_C._is_tracing")
_run_backward_code = _private("autograd.graph._engine_run_backward").__code__
_function_backward_code = _private("autograd.function.BackwardCFunction.apply").__code__
is_inference = torch.is_inference_mode_enabled
is_compiling = torch.compiler.is_compiling  # dynamo, or a tracer of export: those have a dispatch mode
is_dynamo_compiling = torch.compiler.is_dynamo_compiling  # a third of its time outside compilation
_PLAIN = (torch.Tensor, torch.nn.Parameter)
# torch's own, also while `interception` has put ours in their place
_randint = torch.randint
random_ = torch._C.TensorBase.random_
_STRIDED = torch.strided


class NonceBuffer(threading.local):
    """Two int64 of this thread, filled in place: half the time of a torch.randint. Not an inference tensor, which could
    not be written to outside inference mode."""

    def __init__(self):
        with torch.inference_mode(False):
            buffer = torch.empty(2, dtype=torch.int64, device="cpu")
        self.fill = random_.__get__(buffer)
        self.address = buffer.data_ptr()


_generators = threading.Lock()  # two autograd threads would read one offset


class CudaNonce(threading.local):
    """16 bytes of this thread for a nonce from a GPU's default generator: its seed and its offset."""

    def __init__(self):
        self._words = (ctypes.c_uint64 * 2)()
        self.address = ctypes.addressof(self._words)

    def fill(self, generator: torch.Generator) -> None:
        """Reads (seed, offset) and moves the offset on by 4, the least that a torch op takes. No kernel runs.

        Not while a stream is captured, where torch refuses to tell. `set_offset` makes the next cuDNN RNN with dropout
        build its dropout state anew. The lock is ours: a random torch op in another thread, at this very moment, could
        still be given the offset that is being replaced (its own mask, not ours, would repeat).
        """
        with _generators:
            seed, offset = generator.initial_seed(), generator.get_offset()
            generator.set_offset(offset + 4)
        self._words[0], self._words[1] = seed, offset


_PROXY = _private("_C._TorchDispatchModeKey.PROXY")
_dispatch_mode = _private("_C._get_dispatch_mode")


def _is_recorded() -> bool:
    """Whether make_fx or torch.jit.trace writes down what is called, for a graph that may be compiled later."""
    return is_tracing() or (dispatch_modes() > 0 and _dispatch_mode(_PROXY) is not None)


def nonce_tensor(device: torch.device | str = "cpu") -> torch.Tensor:
    """A nonce as a tensor (int64, shape (2,)) from torch's generator of `device`, for functorch, dispatch modes and
    torch.compile: vmap's `randomness`, checkpoints' saved RNG states and fake tensors then hold by themselves.

    A traced or compiled graph joins four draws of 32 bits: inductor's CPU randint has a 32-bit seed, and two 64-bit words
    drawn by one call repeated 79 times in 768,000 nonces.

    On a GPU these nonces are not the (seed, offset) of `CudaNonce`: the mask of a transformed call is another than that
    of a plain one.
    """
    refuse_device(torch.device(device))
    if is_compiling() or _is_recorded():
        quarters = [_randint(0, 2**32, (1,), dtype=torch.int64, device=device) for _ in range(4)]
        return torch.cat(quarters[:2]) | (torch.cat(quarters[2:]) << 32)
    # randint subtracts 2^63 from the word that random_ takes as it is; flipping the top bit gives the same nonce, so that
    # one RNG state finds one mask whether the call is plain or transformed.
    return _randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device) ^ -(2**63)


@torch.compiler.assume_constant_result  # dynamo pushes functorch's levels as it traces, so the answer is that of its graph
def in_functorch() -> bool:
    """Whether functorch transforms what runs now; `functorch_level() is None` asks the same, but torch 2.11's dynamo can
    trace neither that nor the depth itself."""
    return _functorch_depth() > 0


def in_plain_eager() -> bool:
    """Whether an op runs just so: not compiled, under no dispatch mode and no torch.jit.trace (which would write the mask
    of this one call into their graphs), not in functorch."""
    return not is_dynamo_compiling() and dispatch_modes() == 0 and functorch_level() is None and not is_tracing()


def can_go_direct(x: torch.Tensor) -> bool:
    """Whether an op on x may hand x's memory straight to a kernel and call `keys.draw_record`.

    False for subclasses (DTensor, FakeTensor), meta and jagged tensors, lazy negation or conjugation (memory does not
    show it), and outside `in_plain_eager`.
    """
    return (
        type(x) in _PLAIN
        and in_plain_eager()
        and (x.is_cpu or x.is_cuda)
        and x.layout is _STRIDED
        and not x.is_neg()
        and not x.is_conj()
    )


def refuse_device(device: torch.device) -> None:
    if device.type not in ("cpu", "cuda"):
        raise EverettError(
            f"keys: nonces come from torch's generator of a CPU or an NVIDIA GPU, not from that of {device}. Draw on one "
            "of these and move the result."
        )


def is_nested_backward() -> bool:
    """Whether a node's Python backward (a reentrant checkpoint's) started the running backward on this thread. torch
    does not tell, the call stack does: some 40 ns a frame, paid by recomputations and hooks only."""
    frame, in_backward = sys._getframe(1), False
    while frame is not None:
        code = frame.f_code
        if code is _run_backward_code:
            in_backward = True
        elif in_backward and code is _function_backward_code:
            return True
        frame = frame.f_back
    return False


def is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
