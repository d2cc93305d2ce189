"""Commitments of a service's responses, so that a response served twice is found: here, after a restart, elsewhere.

Two requests at the same instant may be served the same numbers, to one client or to two. So each response is logged as
SHA-256("everett/1/response\\0" || bytes) before any of it is used. A response that the log already holds is an alarm.
Logs of several machines are compared afterwards by `compare_responses` (`everett responses FILE FILE...`): they show
that bytes are equal, never what they are. A log is text: a header, then a line a response (when, bytes, commitment). It
survives a kill; a loss of power may take the last lines.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import SourceError
from .spend import now_utc, open_private

# A commitment hides bytes only if they could not be guessed: at half a bit a bit this is 32 bytes of full entropy.
MIN_COMMITTED_BYTES = 64

_HEADER = "everett responses 1"
_LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z) (\d+) ([0-9a-f]{64})")


def commitment(response: bytes) -> str:
    """64 hexadecimal digits for one whole response, after decoding; at least MIN_COMMITTED_BYTES."""
    if len(response) < MIN_COMMITTED_BYTES:
        raise ValueError(f"a commitment of {len(response)} bytes gives them away; it takes {MIN_COMMITTED_BYTES}")
    return hashlib.sha256(b"everett/1/response\0" + bytes(response)).hexdigest()


@dataclass(frozen=True)
class Response:
    """One line of a log: where it stands, when the response came (UTC), how many bytes it had, and its commitment."""

    path: Path
    line: int
    when: str
    n_bytes: int
    commitment: str


def _parse(path: Path, text: str) -> list[Response]:
    lines = text.split("\n")
    if lines[0] != _HEADER:
        raise SourceError(f"{path} is no response log of this version: it must begin with {_HEADER!r}")
    found = []
    # What stands behind the last line feed was being written when its process was killed, so it was never used.
    for number, line in enumerate(lines[1:-1], start=2):
        match = _LINE.fullmatch(line)
        if match is None:
            raise SourceError(f"{path}:{number} is damaged; correct that line, or move the file away to begin anew")
        found.append(Response(path, number, match[1], int(match[2]), match[3]))
    return found


def read_responses(path: str | os.PathLike) -> list[Response]:
    """The lines of one log, in order; SourceError for a file that is none."""
    try:
        text = Path(path).read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read as a response log: {error}") from error
    return _parse(Path(path), text)


def compare_responses(paths: list[str | os.PathLike]) -> list[tuple[Response, ...]]:
    """Responses that occur more than once in the logs of several machines or keys, taken together.

    Each tuple holds the lines with one commitment, in the order of the files. An empty list: nothing was served twice
    to these clients. Raises SourceError for a file that is no log, or is named twice.
    """
    real = [os.path.realpath(p) for p in paths]
    if len(set(real)) < len(real):
        raise SourceError("a log is named twice, and would repeat all of itself; name each one once")
    seen: dict[str, list[Response]] = {}
    for path in paths:
        for response in read_responses(path):
            seen.setdefault(response.commitment, []).append(response)
    return [tuple(lines) for lines in seen.values() if len(lines) > 1]


class ResponseLog:
    """The log of one account, open for appending; about 190 bytes of memory and 90 on the disk a response, and twice the
    memory for those since it was opened.

    added: what was logged since it was opened, in order; it only grows.
    """

    def __init__(self, path: Path):
        self._path = path
        self._fd = open_private(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            with open(os.dup(self._fd), "rb") as file:
                text = file.read().decode("ascii", "replace")
            if "\n" not in text:  # new, or killed in its first line
                os.ftruncate(self._fd, 0)
                self._append(_HEADER)
                text = _HEADER + "\n"
            elif not text.endswith("\n"):
                os.ftruncate(self._fd, text.rindex("\n") + 1)
            self._seen = {bytes.fromhex(r.commitment): r.when for r in _parse(path, text)}
            self.added: list[Response] = []
            self._next_line = max(text.count("\n"), 1) + 1
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        """How many different responses it holds."""
        return len(self._seen)

    def _append(self, line: str) -> None:
        data = f"{line}\n".encode("ascii")
        try:
            if os.write(self._fd, data) != len(data):
                raise OSError("the disk is full")
        except OSError as error:
            raise SourceError(f"{self._path} cannot be written ({error}), so the response is not used") from error

    def add(self, response: bytes) -> str | None:
        """Logs one response before it is used. None if it is new, else when the same bytes came before."""
        new = commitment(response)
        when = now_utc()
        self._append(f"{when} {len(response)} {new}")
        self.added.append(Response(self._path, self._next_line, when, len(response), new))
        self._next_line += 1
        before = self._seen.setdefault(bytes.fromhex(new), when)
        return None if before is when else before

    def close(self) -> None:
        """May be called twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
