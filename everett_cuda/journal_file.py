"""Journal files: their header, their records, and a reader that gives every record before the first damage.

The layout is that of `csrc/journal_format.h`, which writes it, and of docs/journal.md. The reader shares no code with the
writer but the CRC: it decrypts with another library (`cryptography`), so that each checks the other.

    magic "EVERETTJ" | u32 version | u32 length | header as JSON | u32 CRC-32C of all before
    records: u32 length | body | u32 CRC-32C of length and body         (little endian; body encrypted, or in clear)
"""

import hashlib
import hmac
import json
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import _C
from .errors import JournalError

MAGIC = b"EVERETTJ"
VERSION = 1
KEY, DRAW, WORDS, STEP, STATE, LOAD, CLOSE, USE, DROP, GROUP = range(1, 11)
TYPES = dict(enumerate(("key", "draw", "words", "step", "state", "load", "close", "use", "drop", "group"), start=1))
DRAWN = ("fresh", "stretched", "shared", "reused", "replayed")
FAMILIES = ("rank", "world", "graph", "to share")
_NAMELESS = {2: "for captured graphs", 3: "for a group of processes"}
STORES = ("host", "pool", "lane")
ENCRYPTED = "AES-256-GCM"
IN_CLEAR = "none: whoever reads this file knows every key"

# How `everett replay` tells a program that it is replayed; REPORT: a folder for what became of it.
REPLAY_VARIABLE = "EVERETT_REPLAY"
REPLAY_KEY_FILE_VARIABLE = "EVERETT_REPLAY_KEY_FILE"
REPLAY_ALLOW_VERSIONS_VARIABLE = "EVERETT_REPLAY_ALLOW_VERSIONS"
REPLAY_REPORT_VARIABLE = "EVERETT_REPLAY_REPORT"

_START = struct.Struct("<8sII")
_U32 = struct.Struct("<I")
_HEAD = struct.Struct("<BBBBiIIQ16s")
_TAG = 16
_LONGEST = (1 << 26) + _HEAD.size + _TAG + 4  # the writer splits direct words after 64 MiB
_LONGEST_HEADER = 1 << 20


# --- records ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Record:
    """One record. index: its number in the file, from 0. `data` of a key is the key itself, so it is never printed."""

    index: int
    type: int
    drawn: int = 0
    family: int = 0
    store: int = 0
    device: int = -1
    generator: int = 0
    ticket: int = 0
    number: bytes = bytes(16)  # of a key or draw: the nonce; of a step, load or close: a count in the first 8 bytes
    data: bytes = b""

    @classmethod
    def from_body(cls, index: int, body: bytes) -> "Record":
        type_, drawn, family, store, device, generator, zero, ticket, number = _HEAD.unpack_from(body)
        data = bytes(body[_HEAD.size :])
        known = type_ in TYPES and drawn < len(DRAWN) and family < len(FAMILIES) and store < len(STORES) and not zero
        if not known or (type_ in (KEY, GROUP) and len(data) != 32) or (type_ in (DRAW, STEP) and data):
            raise ValueError("its fields have values that this version does not know")
        return cls(index, type_, drawn, family, store, device, generator, ticket, number, data)

    @property
    def head(self) -> bytes:
        """The head as it stands in the file, without the data."""
        return _HEAD.pack(
            self.type, self.drawn, self.family, self.store, self.device, self.generator, 0, self.ticket, self.number
        )

    @property
    def count(self) -> int:
        """The number of a step, load or closing record."""
        return int.from_bytes(self.number[:8], "little")

    def __str__(self) -> str:
        """What it says, without any key material."""
        where = "the CPU" if self.device == -1 else f"cuda:{self.device}"
        if self.type in (KEY, DRAW) and self.family in _NAMELESS:
            return f"draw {self.ticket}: a {DRAWN[self.drawn]} key {_NAMELESS[self.family]}"
        if self.type in (KEY, DRAW):
            return (
                f"draw {self.ticket}: {DRAWN[self.drawn]}, {FAMILIES[self.family]} family, nonce {self.number.hex()} of "
                f"generator {self.generator} of {where}"
            )
        if self.type == GROUP:
            return f"a key of the {FAMILIES[self.family]} family for a group of processes"
        if self.type == WORDS:
            return f"take {self.ticket}: {len(self.data)} bytes of direct words for {where} ({STORES[self.store]})"
        if self.type == STEP:
            return f"end of step {self.count} after draw {self.ticket}"
        if self.type == STATE:
            return f"state of torch's generator of {where} ({len(self.data)} bytes)"
        if self.type == LOAD:
            return f"counters continue from draw {self.ticket}, step {self.count}"
        if self.type == USE:
            return f"an op on {where} uses {self.count} granules of direct words ({STORES[self.store]})"
        if self.type == DROP:
            return f"unused direct words on {where} are destroyed ({STORES[self.store]})"
        return f"end of the journal after {self.count} records ({self.data.decode(errors='replace')})"

    __repr__ = __str__


# --- header and keys --------------------------------------------------------------------------------------------------


def encode_header(facts: dict) -> bytes:
    """The bytes of a header; facts: what JSON can hold."""
    text = json.dumps(facts, sort_keys=True).encode()
    start = _START.pack(MAGIC, VERSION, len(text)) + text
    return start + _U32.pack(_C.crc32c(start))


def header_hash(header: bytes) -> bytes:
    """What each encrypted record is bound to: SHA-256 of the whole header."""
    return hashlib.sha256(header).digest()


def check_key(key: bytes) -> None:
    """TypeError or ValueError unless `key` can encrypt a journal: at least 16 bytes that nobody can guess."""
    if not isinstance(key, (bytes, bytearray)):
        raise TypeError(f"key: bytes, got {type(key).__name__}; read it from a file, or use secrets.token_bytes(32)")
    if len(key) < 16:
        raise ValueError(f"key: at least 16 bytes of a random key (not a password), got {len(key)}")


def file_key(key: bytes, salt: bytes) -> bytes:
    """HKDF-SHA256 (RFC 5869) of the user's key: 32 bytes, for the file with this salt only."""
    extracted = hmac.digest(salt, bytes(key), "sha256")
    return hmac.digest(extracted, b"everett/1/journal\x01", "sha256")


def read_key_file(path: str | os.PathLike) -> bytes:
    """The whole content of a key file, byte for byte. JournalError unless it is a regular file that only its owner may
    read."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise JournalError(f"key file {path}: not a regular file")
            if about.st_mode & 0o077:
                raise JournalError(f"key file {path}: others than its owner may read or change it; chmod 600 it")
            key = file.read(4096)
    except OSError as error:
        raise JournalError(f"key file {path}: {error.strerror}") from None
    try:
        check_key(key)
    except ValueError as error:
        raise JournalError(f"key file {path}: {error}") from None
    return key


# --- reader -----------------------------------------------------------------------------------------------------------


class JournalReader:
    """The records of a journal, in order; iterate over it once. Open one with `read_journal`.

    header: what the writer said of itself. Once the iteration is over, `closed` tells whether the closing record came,
    `end` why it was over, and `good_bytes` how long the undamaged beginning is.
    """

    def __init__(self, path: str | os.PathLike, key: bytes | None = None):
        self.path = Path(path)
        if key is not None:
            check_key(key)
        try:
            self._file = open(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=1 << 16)
        except OSError as error:
            raise JournalError(f"{self.path}: {error.strerror}; a journal is written by ev.journal(FILE)") from None
        try:
            self._read_header()
            self._cipher = self._open_cipher(key)
        except BaseException:
            self._file.close()
            raise
        self.closed = False
        self.end = ""
        self.records = 0

    def _read_header(self) -> None:
        start = self._file.read(_START.size)
        if not MAGIC.startswith(start[:8]) or (len(start) >= 8 and start[:8] != MAGIC):
            raise JournalError(f"{self.path}: not a journal (it does not begin with {MAGIC.decode()})")
        if len(start) == _START.size:
            _, version, length = _START.unpack(start)
            if version != VERSION:
                raise JournalError(
                    f"{self.path}: journal version {version}, and this everett_cuda reads version {VERSION}; read it with "
                    "the one that wrote it"
                )
            if length <= _LONGEST_HEADER:
                text, crc = self._file.read(length), self._file.read(4)
                if len(crc) == 4 and _U32.unpack(crc)[0] == _C.crc32c(start + text):
                    self.header: dict = json.loads(text)
                    self.header_hash = header_hash(start + text + crc)
                    self.good_bytes = _START.size + length + 4
                    return
        raise JournalError(f"{self.path}: its header is torn or damaged, so no record can be read")

    def _open_cipher(self, key: bytes | None):
        self.encrypted = self.header.get("encryption") == ENCRYPTED
        if not self.encrypted:
            return None
        if key is None:
            raise JournalError(f"{self.path} is encrypted: give its key (key=..., or --key-file FILE)")
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
            from cryptography.hazmat.primitives.hashes import SHA256
            from cryptography.hazmat.primitives.kdf.hkdf import HKDF
        except ImportError:
            raise JournalError(
                "reading an encrypted journal needs the package cryptography: pip install 'everett_cuda[sign]'"
            ) from None
        salt = bytes.fromhex(self.header["salt"])
        return AESGCM(HKDF(SHA256(), 32, salt, b"everett/1/journal").derive(bytes(key)))

    def __iter__(self) -> Iterator[Record]:
        try:
            while (record := self._next()) is not None:
                yield record
        finally:
            self.close()

    def _next(self) -> Record | None:
        if self.closed:
            return None
        index, at = self.records, self.good_bytes
        length_bytes = self._file.read(4)
        if not length_bytes:
            return self._stop(f"no closing record: the writer was killed or lost power after {index} records")
        length = _U32.unpack(length_bytes)[0] if len(length_bytes) == 4 else 0
        if len(length_bytes) == 4 and not _HEAD.size + 4 <= length <= _LONGEST:
            return self._stop(f"record {index} at byte {at} is damaged: its length is {length}")
        rest = self._file.read(length)
        if len(length_bytes) < 4 or len(rest) < length:
            return self._stop(f"record {index} at byte {at} is torn: the file ends within it")
        body = rest[:-4]
        if _U32.unpack(rest[-4:])[0] != _C.crc32c(length_bytes + body):
            return self._stop(f"record {index} at byte {at} is damaged: its checksum does not match")
        if self._cipher is not None:
            body = self._decrypt(index, body)
            if body is None:
                if index == 0:
                    raise JournalError(f"{self.path}: this is not the key it was encrypted with (or it was forged)")
                return self._stop(f"record {index} at byte {at} was altered: it does not decrypt under the journal's key")
        try:
            record = Record.from_body(index, body)
        except ValueError as error:
            return self._stop(f"record {index} at byte {at}: {error}")
        self.good_bytes += 4 + length
        self.records += 1
        if record.type == CLOSE:
            self.closed = record.count == index
            self.end = (
                f"closed after {index} records" if self.closed else f"its closing record counts {record.count} records"
            )
            if self._file.read(1):
                self.end += "; there are bytes behind the closing record"
        return record

    def _decrypt(self, index: int, body: bytes) -> bytes | None:
        from cryptography.exceptions import InvalidTag

        try:
            return self._cipher.decrypt(index.to_bytes(12, "little"), body, self.header_hash)
        except InvalidTag:
            return None

    def _stop(self, why: str) -> None:
        self.end = self.end or why

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "JournalReader":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_journal(path: str | os.PathLike, key: bytes | None = None) -> JournalReader:
    """Opens a journal for reading; iterate over the result for its `Record`s.

    key: the user's key of an encrypted one. Damage ends the iteration, never with an error: `end` says where and why, and
    every record before it has been given. JournalError: no such file, not a journal, another version, a damaged header, or
    not the right key (said at the first record).
    """
    return JournalReader(path, key)
