"""Ed25519 keys that sign ledgers: made, kept away from the run, used and checked.

What a signature of the user's own key proves: who wrote the ledger, and that it is unaltered since. Not that its bits
were quantum, nor that no other ledger was written. A public key that comes with the ledger proves nothing at all, so a
signature counts only against a key that the checking person has from elsewhere.

A private key is PKCS#8 in PEM, mode 0600, as `openssl genpkey -algorithm ed25519` makes it too. A run's folder is copied,
archived and shared as a whole, so no key is made or used in one.
"""

import os
import re
import stat
from pathlib import Path

from ..drivers.contract import require
from ..errors import LedgerError

_LABEL = b"everett/1/ledger\0"  # so that a signature of a ledger's hash is a signature of nothing else
_MAX_KEY_FILE = 4096


def _ed25519():
    return require("cryptography.hazmat.primitives.asymmetric.ed25519", "sign", "cryptography")


def _serialization():
    return require("cryptography.hazmat.primitives.serialization", "sign", "cryptography")


def default_key_path() -> Path:
    """$XDG_CONFIG_HOME/everett/ledger.key, by default in ~/.config."""
    given = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".config") / "everett" / "ledger.key"


def refuse_in_run_folder(key: Path, *folders: Path) -> None:
    """LedgerError when `key` lies in one of these folders, or below one (unless that holds the home folder: everything
    of a user lies below it)."""
    parent = Path(os.path.realpath(key)).parent
    home = Path(os.path.realpath(Path.home()))
    for folder in folders:
        run = Path(os.path.realpath(folder))
        below = run in parent.parents and not home.is_relative_to(run)
        if parent == run or below:
            raise LedgerError(
                f"{key} would be in the run's folder {run}, which is copied and shared as a whole; keep the key "
                f"elsewhere, such as {default_key_path()}"
            )


class Signer:
    """A private key that signs the hashes of one ledger. `public`: 64 hexadecimal digits."""

    def __init__(self, private):
        self._private = private
        raw = _serialization()
        self.public = private.public_key().public_bytes(raw.Encoding.Raw, raw.PublicFormat.Raw).hex()

    def sign(self, head: str) -> str:
        """The signature (128 hexadecimal digits) of a line's hash, and so of all lines up to it."""
        return self._private.sign(_LABEL + bytes.fromhex(head)).hex()


def verify(public: str, head: str, signature: str) -> bool:
    """Whether `signature` is this key's signature of a line's hash; all three in hexadecimal digits."""
    if not all(
        isinstance(text, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", text)
        for text, digits in ((public, 64), (head, 64), (signature, 128))
    ):
        return False
    invalid = require("cryptography.exceptions", "sign", "cryptography").InvalidSignature
    try:
        key = _ed25519().Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(bytes.fromhex(signature), _LABEL + bytes.fromhex(head))
    except (invalid, ValueError):  # ValueError: the digits are no point of the curve
        return False
    return True


def generate(path: Path) -> Signer:
    """Makes a key: the private one in `path` (0600, which must not exist), the public one in `path`.pub (0644).

    Raises LedgerError when the folder is the current one or below it, when either file exists, or cannot be written.
    """
    refuse_in_run_folder(path, Path.cwd())
    private = _ed25519().Ed25519PrivateKey.generate()
    form = _serialization()
    secret = private.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    public = private.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    beside = Path(f"{path}.pub")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_new(path, secret, 0o600)
        try:
            _write_new(beside, public, 0o644)
        except BaseException:
            path.unlink()
            raise
    except FileExistsError as error:
        raise LedgerError(f"{error.filename} exists, and a key is never written over; name another by --out") from None
    except OSError as error:
        raise LedgerError(f"the key cannot be written: {error}; name another place by --out") from None
    return Signer(private)


def _write_new(path: Path, data: bytes, mode: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with open(fd, "wb") as file:
        os.fchmod(fd, mode)
        file.write(data)
        file.flush()
        os.fsync(fd)


def load_signer(path: str | os.PathLike, *run_folders: Path) -> Signer:
    """The private key in a file; LedgerError unless it is a regular file of this user (or root), read by nobody else, is
    an Ed25519 key, and lies in none of these folders."""
    path = Path(path)
    refuse_in_run_folder(path, *run_folders)
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode) or about.st_uid not in (0, os.geteuid()) or about.st_mode & 0o077:
                raise LedgerError(f"{path} must be a regular file of yours that nobody else can read; chmod 600 it")
            text = file.read(_MAX_KEY_FILE)
    except OSError as error:
        why = "it is a symbolic link" if path.is_symlink() else error.strerror
        raise LedgerError(f"the key {path} cannot be read: {why}; `everett ledger keygen` makes one") from None
    try:
        private = _serialization().load_pem_private_key(text, password=None)
    except (ValueError, TypeError) as error:
        raise LedgerError(f"{path} is no private key in PEM without a password: {error}") from None
    if not isinstance(private, _ed25519().Ed25519PrivateKey):
        raise LedgerError(f"{path} is no Ed25519 key; `everett ledger keygen` makes one")
    return Signer(private)


def load_public(text: str) -> str:
    """The 64 hexadecimal digits of a public key that is given as these, or as a PEM file; LedgerError otherwise."""
    if re.fullmatch(r"[0-9A-Fa-f]{64}", text):
        return text.lower()
    try:
        with open(text, "rb") as file:
            data = file.read(_MAX_KEY_FILE)
    except OSError as error:
        raise LedgerError(f"--key {text}: neither 64 hexadecimal digits nor a file: {error.strerror}") from None
    form = _serialization()
    try:
        key = form.load_pem_public_key(data)
    except ValueError:
        raise LedgerError(f"--key {text} is no public key in PEM; name the .pub file that keygen made") from None
    if not isinstance(key, _ed25519().Ed25519PublicKey):
        raise LedgerError(f"--key {text} is no Ed25519 public key")
    return key.public_bytes(form.Encoding.Raw, form.PublicFormat.Raw).hex()
