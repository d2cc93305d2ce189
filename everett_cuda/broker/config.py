"""What a broker serves, to whom, and how much: from the command line, or from an INI file with one section [broker]."""

import configparser
import grp
import pwd
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from ..drivers import driver_of, parse_uri
from ..drivers.broker_connection import DEFAULT_PATH
from ..drivers.uri import parse_rate, parse_size
from ..errors import BadParameter


def _whole(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise ValueError("a whole number above 0")
    return int(text)


def _flag(text: str) -> bool:
    if text.lower() not in ("yes", "no", "1", "0"):
        raise ValueError("yes or no")
    return text.lower() in ("yes", "1")


def _rate(text: str) -> float:
    return 0.0 if text == "none" else parse_rate(text)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.replace(",", " ").split())


@dataclass(frozen=True)
class BrokerConfig:
    """sources: URIs. mix_kinds: sources of different kinds may be served together, and then all count as the weakest.

    failover: the first source that gives bits, in the order given; otherwise all take turns. group: who may use the socket,
    which has mode 0660; "" keeps the group of the process. quota, user_quota: bytes a second for a client and for a user, 0:
    no limit. allow_users, allow_groups: names; with none of them everybody who may open the socket is served.
    ring_bytes: what a client may have in stock, a power of two; 0: 64 KiB, or 4 KiB when a source is metered.
    metrics: where Prometheus finds figures, a socket's path or a port of this machine; "": nowhere. log: "text" or "json".
    """

    sources: tuple[str, ...] = ()
    socket: Path = DEFAULT_PATH
    group: str = "everett"
    mix_kinds: bool = False
    failover: bool = False
    quota: float = 0.0
    user_quota: float = 0.0
    max_clients: int = 2048
    max_clients_per_user: int = 1024
    allow_users: tuple[str, ...] = ()
    allow_groups: tuple[str, ...] = ()
    ring_bytes: int = 0
    metrics: str = ""
    log: str = "text"

    def __post_init__(self):
        if not self.sources:
            raise BadParameter("a broker needs at least one source; name its URI, such as quantis-usb:")
        for uri in self.sources:
            parsed = parse_uri(uri)
            if parsed.scheme == "auto":
                raise BadParameter("a broker's sources are named, such as quantis-usb:SERIAL; see `everett devices`")
            driver = driver_of(parsed)
            if driver.scheme == "broker":
                raise BadParameter(f"{uri}: a broker cannot serve another broker's bits")
            parsed.parameters(driver.parameters)
        if len(set(self.sources)) != len(self.sources):
            raise BadParameter("a source is named twice")
        r = self.ring_bytes
        if r and (not 4096 <= r <= 1 << 24 or r & (r - 1)):
            raise BadParameter(f"ring_bytes: a power of two from 4096 to 16 MiB, not {r}")
        if self.metrics:
            from .metrics import parse_address

            parse_address(self.metrics)
        if self.log not in ("text", "json"):
            raise BadParameter(f"log = {self.log}: text or json")
        self.users()
        self.groups()

    def users(self) -> list[int]:
        """The uids of allow_users; BadParameter for a name that there is not."""
        return [_number(name, lambda n: pwd.getpwnam(n).pw_uid, "user") for name in self.allow_users]

    def groups(self) -> list[int]:
        """The gids of allow_groups; BadParameter for a name that there is not."""
        return [_number(name, lambda n: grp.getgrnam(n).gr_gid, "group") for name in self.allow_groups]

    def rules(self, metered: bool) -> dict:
        """The keyword arguments of `_C.BrokerServer`. metered: a source costs money or quota a byte."""
        return {
            "ring_bytes": self.ring_bytes or (4096 if metered else 65536),
            "most_clients": self.max_clients,
            "most_clients_of_user": self.max_clients_per_user,
            "client_bytes_per_s": self.quota,
            "user_bytes_per_s": self.user_quota,
            "restricted": bool(self.allow_users or self.allow_groups),
            "users": self.users(),
            "groups": self.groups(),
            "failover": self.failover,
        }


def _number(name: str, look_up: Callable[[str], int], what: str) -> int:
    if name.isdigit():
        return int(name)
    try:
        return look_up(name)
    except KeyError:
        raise BadParameter(f"allow_{what}s: there is no {what} {name!r} on this machine") from None


_PARSERS: dict[str, Callable[[str], object]] = {
    "sources": lambda text: tuple(text.split()),
    "socket": Path,
    "group": str,
    "mix_kinds": _flag,
    "failover": _flag,
    "quota": _rate,
    "user_quota": _rate,
    "max_clients": _whole,
    "max_clients_per_user": _whole,
    "allow_users": _names,
    "allow_groups": _names,
    "ring_bytes": parse_size,
    "metrics": str,
    "log": str,
}
assert set(_PARSERS) == {f.name for f in fields(BrokerConfig)}


def parse_setting(name: str, text: str) -> object:
    """A setting's value from its text in a file or on the command line; BadParameter says what it must be."""
    try:
        return _PARSERS[name](text)
    except ValueError as error:
        raise BadParameter(f"{name} = {text}: it must be {error}") from None


def read_config(path: Path) -> dict[str, object]:
    """The settings of a file. OSError where it cannot be read, BadParameter for what it may not hold."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        with open(path, encoding="utf-8") as file:
            parser.read_file(file)
    except (configparser.Error, UnicodeDecodeError) as error:
        raise BadParameter(f"{path}: {error}") from error
    if parser.sections() != ["broker"] or parser.defaults():
        raise BadParameter(f"{path}: one section [broker] is needed, not {parser.sections()}")
    unknown = sorted(set(parser["broker"]) - set(_PARSERS))
    if unknown:
        raise BadParameter(f"{path}: unknown setting {unknown[0]!r}; there are {', '.join(sorted(_PARSERS))}")
    return {name: parse_setting(name, text) for name, text in parser["broker"].items()}
