"""What a metered key has cost: booked in a file before each request is sent, by one client process for each key.

The account of a key lives in $XDG_STATE_HOME/everett (else ~/.local/state/everett), in files that only its owner can
read, named by a labelled hash of the key and never by the key:

    anu-0123456789abcdef.lock       flocked while a client is open; holds its process id
    anu-0123456789abcdef.spend      what was booked: requests and micro-dollars, since when
    anu-0123456789abcdef.responses  commitments of the responses (see responses.py)

A request is booked before it is sent, because a service may bill one whose answer never arrived. The file is replaced
whole (written beside, synced, renamed), so a client that is killed at any point leaves the booking before or after, and
never one too few. Amounts are whole micro-dollars. The sum is for ever: a budget that is used up is raised, not reset.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import stat
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path

from ..errors import SourceError

_MICRO = 10**6


def parse_usd(text: str) -> int:
    """Micro-dollars from a plain decimal number of dollars with at most six places: `0.005` is 5,000."""
    if not re.fullmatch(r"\d{1,9}(\.\d{1,6})?", text):
        raise ValueError("US dollars, such as 2 or 0.005, with at most six decimal places")
    return int(Decimal(text) * _MICRO)


def usd(micro: int) -> str:
    """`$0.005`, from micro-dollars: at least two decimal places, and as many as it takes."""
    whole, rest = divmod(micro, _MICRO)
    return f"${whole}.{f'{rest:06d}'.rstrip('0'):0<2}"


def now_utc() -> str:
    """This moment as text, to the microsecond."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def account_id(scheme: str, secret: str) -> str:
    """16 hexadecimal digits that name a key (or, where a service has none, its host) without giving it away."""
    return hashlib.sha256(b"everett/1/account\0" + f"{scheme}\0{secret}".encode()).hexdigest()[:16]


def state_folder() -> Path:
    """The folder of all accounts, created for its owner alone; SourceError when others could write in it."""
    given = os.environ.get("XDG_STATE_HOME", "")
    try:
        base = Path(given) if os.path.isabs(given) else Path.home() / ".local" / "state"
        folder = base / "everett"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except (OSError, RuntimeError) as error:
        raise SourceError(f"the folder for spending records cannot be made: {error}; set XDG_STATE_HOME") from error
    if about.st_uid != os.geteuid() or about.st_mode & 0o022:
        raise SourceError(
            f"{folder} holds spending records and must belong to you and be writable by nobody else; chmod 700 it, or "
            "set XDG_STATE_HOME to a folder of your own"
        )
    return folder


def open_private(path: Path, flags: int) -> int:
    """A descriptor of a regular file of this user that nobody else can write, created 0600 if flags say so.

    Raises SourceError; FileNotFoundError passes. A symbolic link is refused: it would let a file elsewhere be written.
    """
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        raise
    except OSError as error:
        why = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise SourceError(f"{path} cannot be opened: {why}; check that file") from error
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o022:
        os.close(fd)
        raise SourceError(f"{path} must be a regular file of yours that nobody else can write; chmod 600 or remove it")
    return fd


@dataclass(frozen=True)
class Spent:
    """All that was ever booked on one key by this user on this machine."""

    since: str
    requests: int = 0
    microusd: int = 0


class Account:
    """The account of one key, held by this process alone until it is closed.

    scheme: the service. id: from `account_id`. Raises SourceError when another client holds it, or its file is damaged.
    """

    def __init__(self, scheme: str, id: str):
        self.id = id
        self._scheme = scheme
        folder = state_folder()
        self._path = folder / f"{scheme}-{id}.spend"
        self.responses_path = self._path.with_suffix(".responses")
        self._pid = os.getpid()
        self._lock = self._hold(self._path.with_suffix(".lock"))
        try:
            self.spent = self._read()
        except BaseException:
            self.close()
            raise

    def _hold(self, path: Path) -> int:
        fd = open_private(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(fd, 32).decode("ascii", "replace").strip()
            os.close(fd)
            raise SourceError(
                f"{self._scheme}: its key is in use by {_who(holder)}; two clients of one key could spend past its "
                "budget and be served the same numbers. Close that one. (Sharing one client among processes is what a "
                "broker does; this version has none.)"
            ) from None
        os.ftruncate(fd, 0)
        os.write(fd, f"{self._pid}\n".encode())
        return fd

    def _read(self) -> Spent:
        try:
            fd = open_private(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return Spent(now_utc())
        with open(fd, "rb") as file:
            text = file.read()
        try:
            spent = Spent(**json.loads(text))
            if not (isinstance(spent.since, str) and _is_count(spent.requests) and _is_count(spent.microusd)):
                raise ValueError("a field is missing or negative")
        except (ValueError, TypeError) as error:
            raise SourceError(
                f"{self._path} is damaged ({error}), so what {self._scheme} has cost is unknown and nothing is sent; "
                "correct it, or move it away to begin again at $0"
            ) from None
        return spent

    def affords(self, cost: int, budget: int) -> None:
        """Raises SourceError unless one more request at `cost` stays within `budget` (both micro-dollars)."""
        if self.spent.microusd + cost <= budget or cost == 0:
            return
        if budget == 0:
            raise SourceError(
                f"{self._scheme}: a request costs {usd(cost)} and no budget is set, so nothing is sent. Add "
                f"budget_usd=, such as budget_usd=1 for {_MICRO // cost} requests in all"
            )
        raise SourceError(
            f"{self._scheme}: {usd(self.spent.microusd)} of budget_usd {usd(budget)} is spent ({self.spent.requests} "
            f"requests since {self.spent.since[:10]}) and one more costs {usd(cost)}; raise budget_usd= to go on"
        )

    def book(self, cost: int, budget: int) -> None:
        """Books one request at `cost`; when this returns it is on the disk, and the request may be sent.

        Raises SourceError, with nothing booked, when it would exceed `budget` or cannot be written.
        """
        self.affords(cost, budget)
        spent = replace(self.spent, requests=self.spent.requests + 1, microusd=self.spent.microusd + cost)
        beside = self._path.with_suffix(".spend.new")
        try:
            with open(open_private(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
                file.write(json.dumps(asdict(spent)).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self._path)
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)  # the new name too
            finally:
                os.close(folder)
        except OSError as error:
            raise SourceError(
                f"{self._scheme}: a request cannot be booked in {self._path} ({error}), so it is not sent"
            ) from error
        self.spent = spent

    def meter(self, budget: int) -> str:
        """What was booked so far, in words."""
        count = f"{self.spent.requests} request{'' if self.spent.requests == 1 else 's'} since {self.spent.since[:10]}"
        return f"{usd(self.spent.microusd)} of {usd(budget)}, {count}" if self.spent.microusd or budget else count

    def close(self) -> None:
        """Lets another client have the key. May be called twice."""
        fd, self._lock = self._lock, -1
        if fd >= 0:
            if os.getpid() == self._pid:  # a forked child shares the lock, and must not give its parent's away
                fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _who(pid: str) -> str:
    """The holder of a lock in words."""
    if pid == str(os.getpid()):
        return "this process itself"
    try:
        command = Path(f"/proc/{int(pid)}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except (OSError, ValueError):
        return f"process {pid}, or a child it left behind" if pid.isdigit() else "another process"
    return f"process {pid} ({command[:60]})"
