"""Where a run takes place: what a journal and a checkpoint note of it, and what of that decides bits when it is run again.

Three grades of difference: the stream law and the default dtype always forbid a replay; versions of torch and of this
package forbid it unless allowed, because they may consume torch's generators otherwise or round otherwise; the rest
cannot change a mask, only how torch's own arithmetic rounds, and is a warning.
"""

import os
import platform

import torch

from . import __version__, keys
from .reference import LAW_VERSION
from .source_status import SourceStatus


def rank_and_world_size() -> tuple[int, int]:
    """From torch.distributed once it is initialized, before that from a launcher's environment (RANK, WORLD_SIZE)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def facts(source: SourceStatus) -> dict:
    """What is noted, as JSON can hold it; URIs never hold secrets (drivers/api_key.py refuses such)."""
    rank, world_size = rank_and_world_size()
    return {
        "everett_cuda": __version__,
        "stream_law": LAW_VERSION,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "default_dtype": str(torch.get_default_dtype()),
        "rank": rank,
        "world_size": world_size,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "source": {
            "label": source.label,
            "kind": source.kind,
            "uri": source.uri,
            "name": source.name,
            "serial": source.serial,
            "min_entropy": source.min_entropy,
            "min_entropy_origin": source.min_entropy_origin,
            "conditioner": source.conditioner,
        },
        "settings": keys.settings(),
    }


_FORBIDDEN = {
    "stream_law": "bits would differ; replay with the everett_cuda that recorded",
    "default_dtype": "call torch.set_default_dtype before the source is opened, as the recorded program did",
    "rank": "each rank replays its own journal",
    "world_size": "start as many processes as were recorded",
}
_FORBIDDEN_UNLESS_ALLOWED = ("everett_cuda", "torch")
_WARNED_OF = ("python", "threads", "cpu", "gpus")


def differences(recorded: dict, now: dict) -> tuple[list[str], list[str], list[str]]:
    """(forbidden always, forbidden unless versions are allowed, warnings), a line each. ValueError: `recorded` lacks one."""
    if missing := [k for k in (*_FORBIDDEN, *_FORBIDDEN_UNLESS_ALLOWED, *_WARNED_OF) if k not in recorded]:
        raise ValueError(f"{', '.join(missing)} not noted")

    def line(name: str, advice: str = "") -> str:
        return f"{name}: recorded {recorded[name]}, here {now[name]}" + (f" ({advice})" if advice else "")

    return (
        [line(name, advice) for name, advice in _FORBIDDEN.items() if recorded[name] != now[name]],
        [line(name) for name in _FORBIDDEN_UNLESS_ALLOWED if recorded[name] != now[name]],
        [line(name) for name in _WARNED_OF if recorded[name] != now[name]],
    )
