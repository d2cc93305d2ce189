"""The key of a web service: from the environment or a private file, into one header, and nowhere else.

A key never stands in a URI, which is printed and logged. Here it is kept so that no repr, error or log shows it.
"""

import os
import re
import stat

from ..errors import BadParameter, SourceError

# What looks like a key in the text of a URI, whatever the name it goes by; key_file= does not.
_IN_URI = re.compile(r"(?i)(?:key|token|secret|passw\w*|auth\w*)=|//[^/?&,]*@")
_KEY = re.compile(r"[\x21-\x7e]{8,4096}")


class ApiKey:
    """A key that only `reveal` shows."""

    __slots__ = ("_text",)

    def __init__(self, text: str):
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "<API key>"

    def __reduce__(self):
        raise TypeError("an API key is not pickled")


def refuse_key_in_uri(text: str, scheme: str, variable: str) -> None:
    """BadParameter when a URI seems to hold a key; the text itself is not repeated."""
    if _IN_URI.search(text):
        raise BadParameter(
            f"{scheme}: a key may not stand in a URI, which is printed and logged, so treat it as known to others. "
            f"Put a new one in {variable or 'the environment'}, or in a file of mode 0600 (key_file=FILE)"
        )


def read_key(scheme: str, variable: str, key_file: str | None, where: str) -> ApiKey:
    """The key in `key_file` (a regular file that only its owner can read), else in the environment `variable`.

    where: the page that gives keys out, for the error. Raises SourceError, which never shows what was read.
    """
    if key_file is None:
        text, place = os.environ.get(variable, ""), f"the environment variable {variable}"
        if not text:
            raise SourceError(
                f"{scheme}: no API key; put one in {place}, or in a file of mode 0600 (key_file=FILE). Keys: {where}"
            )
    else:
        text, place = _read_private(scheme, key_file), key_file
    text = text.strip()
    if not _KEY.fullmatch(text):
        raise SourceError(f"{scheme}: {place} holds no API key: one line of 8 to 4096 visible ASCII characters")
    return ApiKey(text)


def _read_private(scheme: str, path: str) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            about = os.fstat(fd)
            if not stat.S_ISREG(about.st_mode):
                raise OSError("it is not a regular file")
            if about.st_mode & 0o077 or about.st_uid not in (os.geteuid(), 0):
                raise OSError("others than its owner can read or change it; chmod 600 it")
            return file.read(8192).decode("latin-1")
    except OSError as error:
        raise SourceError(f"{scheme}: key_file={path} cannot be used: {error.strerror or error}") from None
