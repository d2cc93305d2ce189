"""The process's keyring: draws of records, step boundaries, settings and counters.

A draw: torch's own generator gives a 128-bit nonce (so torch keeps the books on *which* number), the keyring gives a
quantum key (which decides *what* it is), and a record of 48 bytes comes back: the HChaCha20 subkey and the dither, all
that an op keeps. The rules themselves are in `csrc/tape.h` and `csrc/key.h`, what torch is asked for in `nonce.py`.
"""

import os
import threading
import warnings
from collections.abc import Callable

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import _C, followers
from .errors import (
    ForkedError,
    HealthAlarm,
    ReplayMiss,
    RNGDesync,
    SourceError,
    SourceExhausted,
    SourceNotOpen,
    Starved,
)
from .nonce import (
    CudaNonce,
    NonceBuffer,
    current_node,
    forward_grad_enabled,
    graph_task_id,
    is_capturing,
    is_inference,
    is_nested_backward,
    keep_graph,
    refuse_device,
    sequence_nr,
)

_CPU = -1  # the keyring's number of the CPU; CUDA devices have their index
_DEFAULT_GENERATOR = 0
_NO_NODE = 2**64 - 1
_NEXT_STEP = 'Call ev.open("auto") or ev.open(URI), or set EVERETT_SOURCE=URI.'

_keyring: "_C.Keyring | None" = None
_begun: tuple[int, dict[str, int]] = (0, {})  # `begun_at`
_settings = {"freshness": "op", "on_starved": "stretch", "max_stretch": 2**16, "timeout_s": 60.0}
_explain: Callable[[str], Exception | str | None] | None = None
_lock = threading.Lock()  # of the four above, innermost: ev.open comes here holding a lock of its own
_opening = threading.RLock()
_hook = None
_witness_error: Callable[[str], Exception] | None = None
_watched_by = ""


# --- draws ------------------------------------------------------------------------------------------------------------

_nonce = NonceBuffer()


def draw_record(world: bool = False) -> bytes:
    """The subkey record (48 bytes, 12 little-endian words) of one draw from the CPU's default generator.

    world: the family of the draw (csrc/tape.h): numbers that may reach weights, permutations or control flow, which ranks
    with equal torch states must have alike; else masks, attention and noise.

    Advances torch's CPU generator by two 64-bit numbers, as `random_` does. For eager code on plain tensors
    (`nonce.can_go_direct`); everything else draws `nonce.nonce_tensor` and comes through `record_from_nonce`. May wait
    for the source, without the GIL. Raises SourceNotOpen, Starved, SourceExhausted, SourceError, HealthAlarm,
    ForkedError, and inside a backward ReplayMiss.
    """
    keyring = _keyring or _open_from_environment()
    nonce = _nonce
    nonce.fill(-(2**63), None)  # without arguments random_ would give 63 bits
    if graph_task_id() == -1:
        return keyring.draw(nonce.address, is_inference(), _CPU, world)
    return _draw_in_backward(keyring, nonce.address, world=world)


_cuda_nonce = CudaNonce()


def draw_cuda_record(index: int, generator: torch.Generator, world: bool = False) -> bytes:
    """As `draw_record`, from the default generator of GPU `index`: the nonce is its seed and offset, the offset moves on
    by 4. Equal states on two GPUs are two draws with two keys, but the index itself does not enter the record.

    Not while a stream is captured; `graph_key.GraphKey` makes the records there.
    """
    keyring = _keyring or _open_from_environment()
    nonce = _cuda_nonce
    nonce.fill(generator)
    if graph_task_id() == -1:
        return keyring.draw(nonce.address, is_inference(), index, world)
    return _draw_in_backward(keyring, nonce.address, device=index, world=world)


def draw_generator_record(generator: int, nonce_address: int, device: int = _CPU) -> bytes:
    """As `draw_record(world=True)`, for an `ev.Generator`: generator is its number, from 1; its nonce (16 bytes) lies at an
    address. device: -1 or the number of a GPU."""
    keyring = _keyring or _open_from_environment()
    if graph_task_id() != -1:
        return _draw_in_backward(keyring, nonce_address, None, device, True, generator)
    return keyring.draw_at(
        nonce_address,
        device,
        generator,
        inference=is_inference(),
        in_backward=False,
        grad_enabled=False,
        keep_graph=False,
        nested=False,
        node=_NO_NODE,
        world=True,
    )


def draw_graph_key(address: int) -> None:
    """Writes 32 bytes to `address`: a key that no other draw gets, for records that a CUDA graph derives on its GPU; where
    the rank family has a group key, that one.

    Fresh, or stretched by the policy, and counted as one draw. Waits and raises as `draw_record`.
    """
    (_keyring or _open_from_environment()).new_graph_key(address)


def draw_key_to_share(address: int) -> None:
    """As `draw_graph_key`, for a key that is to become the group key of other processes too, and never a group key itself:
    SHA-256("everett/1/share" 00 K) of a new key K, so that what is stretched from K later is known to this process only.
    """
    (_keyring or _open_from_environment()).new_key_to_share(address)


_kernel = _C.draw_dropout


def draw_dropout(stream, p, type_, x, y, n, threads) -> bytes:
    """`draw_record` and a contiguous dropout kernel under that record in one call into C++; returns the record.

    Only outside a backward. x, y: addresses; stream, type_: the kernels' numbers; n: elements.
    """
    keyring = _keyring or _open_from_environment()
    nonce = _nonce
    nonce.fill(-(2**63), None)
    return _kernel(keyring, nonce.address, is_inference(), stream, p, type_, x, y, n, threads)


def record_from_nonce(nonce: torch.Tensor, grad_enabled: bool | None = None, world: bool = False) -> bytes:
    """The subkey record of a nonce that was drawn as a tensor: int64, shape (2,), contiguous, real. From a GPU it is
    copied to the host, which waits for the GPU.

    The facts (the node being evaluated) are those of the calling thread now. grad_enabled: whether gradients were on
    where the op was called; None asks torch, which says no inside autograd.Function.forward. There give what the caller
    saw, or a recomputation of an unknown nonce passes for a hook's new draw. world: as for `draw_record`, as are the
    errors, and TypeError or ValueError for another kind of tensor.
    """
    if type(nonce) is not torch.Tensor:
        raise TypeError(f"nonce: a plain torch.Tensor, got {type(nonce).__name__}; unwrap it inside the op")
    if nonce.dtype != torch.int64 or nonce.shape != (2,) or not nonce.is_contiguous():
        raise ValueError(f"nonce: int64, shape (2,), contiguous; got {nonce.dtype}, {tuple(nonce.shape)}")
    refuse_device(nonce.device)
    device = _CPU if nonce.is_cpu else nonce.get_device()
    keyring = _keyring or _open_from_environment()
    nonce = nonce.cpu()
    if graph_task_id() == -1:
        return keyring.draw(nonce.data_ptr(), is_inference(), device, world)
    return _draw_in_backward(keyring, nonce.data_ptr(), grad_enabled, device, world)


def _draw_in_backward(
    keyring: "_C.Keyring",
    nonce_address: int,
    grad_enabled: bool | None = None,
    device: int = _CPU,
    world: bool = False,
    generator: int = _DEFAULT_GENERATOR,
) -> bytes:
    node = current_node()
    return keyring.draw_at(
        nonce_address,
        device,
        generator,
        inference=is_inference(),
        in_backward=True,
        grad_enabled=torch.is_grad_enabled() if grad_enabled is None else grad_enabled,
        keep_graph=keep_graph(),
        nested=is_nested_backward(),
        node=_NO_NODE if node is None else node._sequence_nr(),
        world=world,
    )


# --- keys that a group of processes shares ------------------------------------------------------------------------------


def set_group_key(world: bool, address: int) -> None:
    """From now on every draw of a family takes the key at `address` (32 bytes) under its nonce, counted as `shared`: also
    under torch.inference_mode, where equal torch RNG states then give equal bits. It stands until it is set again; a
    recomputation still finds the key of its forward. A source that is opened anew withholds it. SourceNotOpen without
    a source.
    """
    (_keyring or _open_from_environment()).set_group_key(world, address)


def withhold_group_key(world: bool) -> None:
    """Draws of a family raise RNGDesync from now on, until its group key is set again or all are cleared."""
    if _keyring is not None:
        _keyring.withhold_group_key(world)


def clear_group_keys() -> None:
    """Draws take keys of this process's own again."""
    if _keyring is not None:
        _keyring.clear_group_keys()


# --- steps and settings -----------------------------------------------------------------------------------------------


def step() -> None:
    """Ends a step: the same torch RNG state then finds a new key, and under freshness "step" the next draw takes one.

    Optimizers do this by themselves after each `step()`. Loops without one (inference, seed-replaying optimisers) call
    it. Ignored, and counted, inside a backward and while a CUDA graph is captured: an optimizer that runs inside the
    backward would otherwise end dozens of steps in one. Without an open source it does nothing.

    CUDA graphs that draw get their new key here, in order with the work on the current stream: call it between replays,
    on the stream that replays. Raises what a draw raises when there is no such key.
    """
    _end_step(by_optimizer=False)


def _after_optimizer_step(optimizer, args, kwargs) -> None:
    _end_step(by_optimizer=True)


def _end_step(by_optimizer: bool) -> None:
    keyring = _keyring
    if keyring is None:
        return
    if graph_task_id() != -1 or is_capturing():
        keyring.boundary_ignored()
        return
    keyring.boundary(sequence_nr())
    followers.end_step(by_optimizer)


def set_freshness(freshness: str) -> None:
    """How often expanded streams change their key. "op" (default): every draw. "step": at step boundaries only, for
    slow sources. Under torch.inference_mode every draw takes a key of its own in both. ValueError for anything else."""
    if freshness == "direct":
        raise ValueError(
            'freshness "direct" means no expansion at all, so it is no setting for dropout and noise, which expand a '
            "key. Direct words are taken from the source itself: Source.direct_words(n), ev.sample(...)."
        )
    if freshness not in ("op", "step"):
        raise ValueError(f'freshness: "op" or "step", got {freshness!r}')
    _set(freshness=freshness)


_UNSET = object()


def configure(on_starved=_UNSET, max_stretch=_UNSET, timeout_s=_UNSET) -> None:
    """What happens when the source is slower than the draws; what is not named stays.

    on_starved: "stretch" (default): derive the next key from the last by SHA-256, counted, at most `max_stretch` times
    for each fresh key (default 2**16), then wait; "wait"; "error" (raises Starved at once). Before the first key there
    is nothing to stretch. timeout_s: longest wait in seconds before Starved (default 60), None for no limit.
    Never stretched, always an error: an exhausted recording, a broken or closed source, a permanent health alarm.
    """
    changes = {}
    if on_starved is not _UNSET:
        if on_starved not in ("stretch", "wait", "error"):
            raise ValueError(f'on_starved: "stretch", "wait" or "error", got {on_starved!r}')
        changes["on_starved"] = on_starved
    if max_stretch is not _UNSET:
        if isinstance(max_stretch, bool) or not isinstance(max_stretch, int) or not 0 <= max_stretch < 2**63:
            raise ValueError(f"max_stretch: an integer from 0 to 2**63 - 1, got {max_stretch!r}")
        changes["max_stretch"] = max_stretch
    if timeout_s is not _UNSET:
        if timeout_s is not None and not timeout_s >= 0:  # NaN too
            raise ValueError(f"timeout_s: seconds from 0 on, or None for no limit, got {timeout_s!r}")
        changes["timeout_s"] = -1.0 if timeout_s is None else float(timeout_s)
    _set(**changes)


def settings() -> dict:
    """The settings in force: freshness, on_starved, max_stretch, timeout_s (None: no limit)."""
    return dict(_settings, timeout_s=None if _settings["timeout_s"] < 0 else _settings["timeout_s"])


def _set(**changes) -> None:
    with _lock:
        _settings.update(changes)
        if _keyring is not None:
            _keyring.set_policy(**_settings)


def is_ours() -> bool:
    """Whether a source is open whose keys this process may use: not in a child of the process that opened it."""
    keyring = _keyring
    return keyring is not None and not keyring.forked


def require_source() -> None:
    """Opens the source that EVERETT_SOURCE names if none is open. Raises SourceNotOpen, or ForkedError in a child."""
    if (_keyring or _open_from_environment()).forked:
        _refuse("forked")


def counters() -> dict[str, int]:
    """What became of the draws since `attach`; empty without a source.

    draws = fresh (a key from the source) + stretched (a key from the ratchet) + shared (the step's key under a new
    nonce) + reused (the same torch RNG state again in one step: the same bits again) + replayed (recomputations).
    unverified: draws inside a backward that keeps its graph which may have been recomputations of something unknown;
    replay_misses: those that surely were, and raised. waits, discarded (keys lost to a race while waiting),
    stretched_in_a_row, boundaries, boundaries_ignored, tape_entries, tape_evicted.
    """
    return {} if _keyring is None else _keyring.counters()


# --- the source behind the keys -------------------------------------------------------------------------------------


def attach(
    ring: "_C.RingReader", explain: Callable[[str], Exception | str | None] | None = None, tape_entries: int = 2**18
) -> None:
    """Keys come from `ring` (a `_C.Ring`, or a broker's) from now on. ev.open does this.

    explain: given "ended", "failed", "alarm", "closed" or "forked", the source's own account of it (an exception), or
    None; given "starved", why no bits come now (text), or None. tape_entries: draws whose keys are
    remembered, about 100 bytes each, oldest forgotten first. When a keyring is there its tape stays as it
    is, so that graphs built before the source was opened again still recompute.
    """
    global _keyring, _explain, _hook, _watched_by, _begun
    with _lock:
        if _keyring is None or _keyring.forked:
            _begun = (_begun[0] + 1, {})
            keyring = _C.Keyring(ring, tape_entries, _refuse)
            _watched_by = ""
            keyring.on_repeat = _warn_of_repeat
        else:
            keyring = _keyring
            keyring.set_ring(ring)
        keyring.set_policy(**_settings)
        if _hook is None:
            _hook = register_optimizer_step_post_hook(_after_optimizer_step)
        _explain = explain
        _keyring = keyring


def watch(
    witness: "_C.KeyWitness",
    by: str,
    error: Callable[[str], Exception],
    more: Callable[[], None] | None = None,
) -> None:
    """Every draw from now on is told to `witness` (csrc/key.h) before its key is used: a journal, or a replay.

    by: what watches, for errors. error: given "unrecorded" or "differs", the exception of a draw that it refused. more:
    called by a draw of a replay that needs more records. Raises SourceNotOpen without a source.
    """
    global _witness_error, _watched_by
    with _lock:
        if _keyring is None:
            raise SourceNotOpen(f"{by}: no source is open. {_NEXT_STEP}")
        _keyring.on_unscripted = more
        _keyring.set_witness(witness)
        _witness_error, _watched_by = error, by


def unwatch() -> None:
    """Nobody is told of draws any more."""
    global _watched_by
    with _lock:
        _watched_by = ""
        if _keyring is not None:
            _keyring.set_witness(None)


def watched_by() -> str:
    """What watches the draws of this process; empty: nothing."""
    return _watched_by if _keyring is not None and not _keyring.forked else ""


def continue_from(counts: dict[str, int]) -> None:
    """Counts and tickets go on from these (`counters` of the run that is continued). SourceNotOpen without a source."""
    global _begun
    with _lock:
        if _keyring is None:
            raise SourceNotOpen(f"counters continue from a checkpoint once a source is open. {_NEXT_STEP}")
        _keyring.continue_from(counts)
        _begun = (_begun[0] + 1, dict(counts))


def begun_at() -> tuple[int, dict[str, int]]:
    """(a number that changes where counting begins anew, the counts at that moment): what is above them is of this
    process. Anew: when the source is closed, and when counts continue from a checkpoint."""
    return _begun


def detach() -> None:
    """Forgets the ring, the keys (also those on GPUs) and the tape; all is overwritten with zeros once no draw is
    running. ev.close does this."""
    global _keyring, _explain, _watched_by, _begun
    with _lock:
        _keyring = _explain = None
        _watched_by = ""
        _begun = (_begun[0] + 1, {})
    followers.forget()


def open_in_child(uri: str) -> None:
    """In a forked child: the next draw opens `uri` for this process. What the parent has is left as it is, locks included:
    one of its threads may have held them."""
    global _keyring, _explain, _lock, _opening, _child_uri
    _parents.append(_keyring)
    _keyring = _explain = None
    _lock, _opening = threading.Lock(), threading.RLock()
    _child_uri = uri


_child_uri: str | None = None
_parents: list = []


def _open_from_environment() -> "_C.Keyring":
    """The source that EVERETT_SOURCE names, opened by the first draw (not in a set-uid program); in a child of a broker's
    client, that broker."""
    uri = _child_uri
    if uri is None and os.geteuid() == os.getuid() and os.getegid() == os.getgid():
        uri = os.environ.get("EVERETT_SOURCE") or os.environ.get("EVERETT_REPLAY")  # a replay opens no URI
    if not uri:
        raise SourceNotOpen(f"a draw was asked for before any source was open. {_NEXT_STEP}")
    with _opening:
        if _keyring is None:
            import everett_cuda

            everett_cuda.open(uri)
        if _keyring is None:
            raise SourceNotOpen(f"EVERETT_SOURCE={uri} was opened, but is already closed again. {_NEXT_STEP}")
        return _keyring


def _refuse(reason: str) -> None:
    """Raises the error of a draw that made no record."""
    if reason in ("unrecorded", "differs"):
        raise _witness_error(reason)
    told = _explain(reason) if _explain is not None and reason in _SOURCE_ERRORS else None
    if told is not None:
        raise told
    if reason == "starved":
        outage = _explain("starved") if _explain is not None else None
        raise Starved(_starved_message() + (f" Now: {outage}." if outage else ""))
    if reason in _REPLAY_ERRORS:
        raise ReplayMiss(_REPLAY_ERRORS[reason])
    if reason == "withheld":
        raise RNGDesync(
            "this rank has no key in common with its group: the last step boundary failed, or the source was opened anew "
            "since. A key of its own would give it other bits than the group. Call ev.distributed.setup(...) again on all "
            "ranks, or ev.distributed.teardown() to draw alone."
        )
    kind, message = _SOURCE_ERRORS[reason]
    raise kind(message)


def _starved_message() -> str:
    policy = settings()
    if policy["on_starved"] == "error":
        return (
            'no fresh key was ready, and on_starved="error" allows neither stretching nor waiting. Use a faster '
            'source, set_freshness("step"), or configure(on_starved="stretch").'
        )
    stretched = (
        f" {counters()['stretched_in_a_row']} keys were stretched since the last fresh one (max_stretch "
        f"{policy['max_stretch']})."
        if policy["on_starved"] == "stretch"
        else ""
    )
    return (
        f"no fresh key arrived in {policy['timeout_s']} s (timeout_s).{stretched} Look at ev.status() whether the "
        'source still delivers; a slow source serves more draws with set_freshness("step").'
    )


_REPLAY_ERRORS = {
    "replay_miss": (
        "a recomputation inside a backward drew a nonce that no forward of its step drew, so its mask would not be "
        "that of the forward and the gradient silently wrong. Either preserve_rng_state=False was given to the "
        "checkpoint (leave it True), or the forward ran before the source was open or before it was closed and opened "
        "again, or more draws came between than the tape holds (tape_entries)."
    ),
    "replay_ambiguous": (
        "a recomputation inside a backward drew a nonce that several steps have drawn with different keys (the torch "
        "RNG state repeated), and the autograd sequence numbers do not tell which forward it belongs to: they are per "
        "thread. Run the backward before the state repeats, or seed each step and thread differently."
    ),
}
_SOURCE_ERRORS = {
    "ended": (SourceExhausted, "the recording is exhausted: no fresh key can come, none is stretched. Open another."),
    "failed": (SourceError, "the source broke, and its last bytes are used. Check the device, then ev.open(...)."),
    "alarm": (
        HealthAlarm,
        "a permanent health alarm stands: no key is handed out or stretched. Look at ev.status(); reopen the source to "
        "repeat the start-up test.",
    ),
    "closed": (SourceError, f"the source was closed. {_NEXT_STEP}"),
    "forked": (
        ForkedError,
        "this process was forked from the one that opened the source, and keys are never shared with a child. Open a "
        "source of its own here with ev.open(...), or draw in the parent only.",
    ),
}


def _warn_of_repeat() -> None:
    """Once: equal bits twice under no_grad, in one step, are often not meant. Not said inside autograd.Function.forward
    (gradients and forward gradients off), where a reentrant checkpoint draws, nor inside a backward."""
    if torch.is_grad_enabled() or not forward_grad_enabled() or graph_task_id() != -1:
        return
    keyring = _keyring
    if keyring is None or keyring.on_repeat is None:
        return
    keyring.on_repeat = None
    warnings.warn(
        "the torch RNG state repeated under no_grad within one step, so the same bits were given again, as torch does "
        "(seed-replaying optimisers need this). For fresh bits use torch.inference_mode(), or call ev.step() between.",
        stacklevel=3,
    )
