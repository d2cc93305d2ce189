"""How long to wait before asking again, and when to stop: growing waits with chance in them, a reason at the end."""

import random
import time
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

from ..errors import SourceError

# The first wait after a failure; it doubles, and each is shortened by up to half at random, so that clients which
# failed together do not come back together.
BACKOFF_S = 1.0
BACKOFF_MAX_S = 16.0
# A source gives up a silent device after 10 s at opening and 60 s later, without knowing why it was silent. These end
# before, with the reason.
PATIENCE_AT_OPEN_S = 8.0
PATIENCE_S = 50.0

_jitter = random.SystemRandom()  # leaves the seeded generators of the program alone


def retry_after_s(header: str) -> float:
    """Seconds of a Retry-After header (a number or an HTTP date), 0 where there is none that can be read."""
    if header.isascii() and header.isdigit():
        return float(header[:9])
    try:
        when = parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    when = when if when.tzinfo else when.replace(tzinfo=timezone.utc)
    return max(0.0, (when - datetime.now(timezone.utc)).total_seconds())


class Patience:
    """The failures since the last success. Short until the first success, so that opening a source does not hang."""

    def __init__(self):
        self._limit_s = PATIENCE_AT_OPEN_S
        self._failures = 0
        self._wanted_at: float | None = None  # since when a success has been waited for
        self._again_at = 0.0

    def wait_s(self) -> float:
        """Seconds until the next attempt may begin; the waiting for a success counts from the first such question."""
        now = time.monotonic()
        if self._wanted_at is None:
            self._wanted_at = now
        return max(0.0, self._again_at - now)

    def succeeded(self) -> None:
        self._limit_s = PATIENCE_S
        self._failures, self._wanted_at, self._again_at = 0, None, 0.0

    def failed(self, reason: str, retry_after: str = "") -> float:
        """Counts a failure; returns the seconds to wait. SourceError, with the reason, when they would be too many."""
        self._failures += 1
        asked = retry_after_s(retry_after)
        wait = asked + min(BACKOFF_MAX_S, BACKOFF_S * 2 ** (self._failures - 1)) * _jitter.uniform(0.5, 1.0)
        now = time.monotonic()
        waited = now - self._wanted_at
        if waited + wait > self._limit_s:
            asks = f", and asks to wait {asked:.0f} s" if asked else ""
            raise SourceError(
                f"{reason}{asks}; given up after {self._failures} failed request{'s' * (self._failures > 1)} in "
                f"{waited:.0f} s. Try again later, or check the network and the service"
            )
        self._again_at = now + wait
        return wait
