"""Attestation reads of a QCicada: the device signs random bytes with its own P-256 key, and here is what that proves.

A signature covers exactly the bytes that come with it, with no challenge of ours. So who verifies it must know the
bytes, and a recording of an old answer verifies as well. Therefore an attestation read is a read of its own, whose
bytes are published and never reach the ring, and a signature or its bytes seen before is a health alarm. That the
signer is a genuine device needs the vendor's root key; without it the key is trusted on first use, and a change of it
is refused.

Wire facts: `amenti-labs/qcicada` 0.2.2 (`device.py`, `crypto.py`): keys are x, y and signatures r, s, each big endian
in 32 bytes, over SHA-256. The certificate is the root's signature of 00 00, hardware major and minor (a byte each),
the serial number (4 bytes, little endian) and the key. The vendor publishes its root as a PEM file (pyqcicada manual).
"""

import fcntl
import hashlib
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from ..errors import HealthAlarm, SourceError
from .contract import require
from .qcicada_protocol import KEY_BYTES, SIGNATURE_BYTES, Info, Link, Refused
from .spend import now_utc

ec = require("cryptography.hazmat.primitives.asymmetric.ec", "sign", "cryptography")
utils = require("cryptography.hazmat.primitives.asymmetric.utils", "sign", "cryptography")
hashes = require("cryptography.hazmat.primitives.hashes", "sign", "cryptography")
serialization = require("cryptography.hazmat.primitives.serialization", "sign", "cryptography")
InvalidSignature = require("cryptography.exceptions", "sign", "cryptography").InvalidSignature

# Two honest reads of 64 bytes are never equal, so the duplicate test has no false alarm.
READ_BYTES = 64


@dataclass(frozen=True)
class Attestation:
    """One signed read and what it shows. data and signature are public from now on.

    key, certificate: 64 bytes each, as the device gave them. genuine: the configured root vouches for the key.
    """

    serial: str
    data: bytes
    signature: bytes
    key: bytes
    certificate: bytes
    genuine: bool
    verdict: str
    date: str

    def details(self) -> dict[str, str]:
        """For a driver's `details`, and so for status and ledger; all that it takes to verify it again."""
        return {
            "attestation": self.verdict,
            "attested at": self.date,
            "attested bytes": self.data.hex(),
            "signature": self.signature.hex(),
            "device key": self.key.hex(),
            "certificate": self.certificate.hex(),
        }


def fingerprint(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def load_key(key: bytes) -> "ec.EllipticCurvePublicKey":
    """A P-256 public key from its 64 bytes x, y; ValueError when that is no point of the curve."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"a P-256 key has {KEY_BYTES} bytes, not {len(key)}")
    return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + key)


def verify(key: "ec.EllipticCurvePublicKey", message: bytes, signature: bytes) -> bool:
    """Whether `signature` (64 bytes r, s) is the key's ECDSA signature of SHA-256(message)."""
    if len(signature) != SIGNATURE_BYTES:
        return False
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    try:
        key.verify(utils.encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def certified_message(info: Info, key: bytes) -> bytes:
    """What the vendor's root signs: hardware version, serial number and key; SourceError if their form is unknown."""
    hardware = re.fullmatch(r"CICADA-QRNG-(\d{1,2})\.(\d{1,2})", info.hardware)
    serial = re.fullmatch(r"QC(\d{1,10})", info.serial)
    if not (hardware and serial and int(serial[1]) < 1 << 32):
        raise SourceError(
            f"the certificate of {info.serial} ({info.hardware}) cannot be checked: its form is known for hardware "
            "CICADA-QRNG-x.y and serial numbers QC... only; leave root= out"
        )
    return struct.pack("<HBBI", 0, int(hardware[1]), int(hardware[2]), int(serial[1])) + key


def load_root(path: str) -> "ec.EllipticCurvePublicKey":
    """The vendor's root key from a PEM file, or from a file of 128 hexadecimal digits (x, y); SourceError otherwise."""
    try:
        text = Path(path).read_bytes()
        if re.fullmatch(rb"\s*[0-9A-Fa-f]{128}\s*", text):
            return load_key(bytes.fromhex(text.decode()))
        key = serialization.load_pem_public_key(text)
    except (OSError, ValueError) as error:
        raise SourceError(f"root={path}: {error}; name the vendor's P-256 key (PEM, or 128 hex digits)") from None
    if not (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)):
        raise SourceError(f"root={path} is not a P-256 public key")
    return key


def attest(link: Link, info: Info, root: "ec.EllipticCurvePublicKey | None" = None) -> Attestation:
    """Does one signed read of `READ_BYTES` bytes on a device that is not streaming, judges it and remembers it.

    root: the vendor's key, or None to trust the device's key on first use. Raises SourceError (no signature, a wrong
    one, a key that the root does not vouch for, another key than before), HealthAlarm (the read is an old one given
    again) or TransportError.
    """
    try:
        key, certificate = link.public_key(), link.certificate()
        data, signature = link.signed_read(READ_BYTES)
    except Refused as error:
        raise SourceError(f"{info.serial} signs nothing ({error}): it needs firmware 5.13; omit attest=1") from None
    try:
        signer = load_key(key)
    except ValueError as error:
        raise SourceError(f"{info.serial} gave no P-256 key: {error}; it may be an imitation") from None
    if not verify(signer, data, signature):
        raise SourceError(f"{info.serial}: the signature of an attestation read is wrong; it may be an imitation")
    if root is not None and not verify(root, certified_message(info, key), certificate):
        raise SourceError(f"{info.serial}: its certificate was not signed by the key in root=; it may be an imitation")
    date = now_utc()
    first_seen = _remember(info.serial, key, data, signature, date, vouched_for=root is not None)
    if root is not None:
        trust = f"genuine device: the configured root certified it as {info.serial}, {info.hardware}"
    elif first_seen:
        trust = f"trust on first use: this key was first seen on {first_seen}"
    else:
        trust = "trust on first use: this key was not seen before"
    verdict = f"key {fingerprint(key)[:16]} signed {len(data)} bytes; {trust}"
    return Attestation(info.serial, data, signature, key, certificate, root is not None, verdict, date)


# --- memory: one file a device ---


def state_folder() -> Path:
    """Where what must survive a restart is kept: $XDG_STATE_HOME/everett, by default ~/.local/state/everett."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "everett"


def _remember(serial: str, key: bytes, data: bytes, signature: bytes, date: str, vouched_for: bool) -> str:
    """Notes key and read in the device's file; returns since when the key is known, "" if it is new.

    The file grows by one line a read: `key FINGERPRINT DATE` or `read SHA256(data) SHA256(signature) DATE`.
    """
    path = state_folder() / f"qcicada-{serial}.attested"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(path, flags, 0o600), "r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            text = file.readall()
            lines = [line.split() for line in text.decode("ascii", "replace").splitlines()]
            first_seen = _known_since(lines, fingerprint(key), path, serial, vouched_for)
            known = {digest for line in lines if line[:1] == ["read"] for digest in line[1:3]}
            again = {fingerprint(data), fingerprint(signature)} & known
            new = "" if text.endswith(b"\n") or not text else "\n"  # after a line that a crash cut short
            new += "" if first_seen else f"key {fingerprint(key)} {date}\n"
            new += f"read {fingerprint(data)} {fingerprint(signature)} {date}\n"
            file.write(new.encode())
            os.fsync(file.fileno())
    except OSError as error:
        why = f"{path}: {error.strerror}; attestation reads must be remembered, so make it writable"
        raise SourceError(why) from error
    if again:
        raise HealthAlarm(
            f"{serial} gave an attestation read that it had given before: a recording answers in its place, or it is "
            f"broken. Nothing was opened; {path} remembers the reads."
        )
    return first_seen


def _known_since(lines: list[list[str]], key: str, path: Path, serial: str, vouched_for: bool) -> str:
    keys = {line[1]: line[2] for line in reversed(lines) if line[:1] == ["key"] and len(line) == 3}
    if keys and key not in keys and not vouched_for:
        raise SourceError(
            f"{serial} signs with key {key[:16]}, and it signed with {', '.join(k[:16] for k in keys)} before: another "
            f"device, or a new key in it. Give the vendor's key by root=FILE, or delete {path} if you know why."
        )
    return keys.get(key, "")
