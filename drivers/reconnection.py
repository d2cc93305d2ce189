"""Looking for a lost device again and again, in the slices that the source gives."""

import time
from collections.abc import Callable

from .contract import DeviceLost

_PAUSE_S = 0.05  # a replugged device needs a tenth of a second and more until its node is there


def try_until(deadline_after_s: float, attempt: Callable[[], None]) -> None:
    """Calls attempt() until it returns; its last DeviceLost once the time is over; any other error at once."""
    deadline = time.monotonic() + deadline_after_s
    while True:
        try:
            return attempt()
        except DeviceLost:
            if time.monotonic() + _PAUSE_S >= deadline:
                raise
        time.sleep(_PAUSE_S)
