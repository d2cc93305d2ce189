"""Drivers: from a device, or a recording, to raw bytes. They know nothing of torch or CUDA.

A driver of another package is found through the entry point group `everett_cuda.drivers`: its name is the scheme, its
object a subclass of `Driver`. It is imported only when its scheme is asked for, or by `auto`.
"""

from importlib.metadata import EntryPoint, entry_points

from ..errors import SourceError, UnknownScheme
from .contract import (
    ASSUMED_MIN_ENTROPY,
    DeviceFault,
    DeviceLost,
    Driver,
    EndOfRecording,
    MinEntropy,
    TransportError,
)
from .replay import ReplayDriver
from .sim import SimulatedDriver
from .uri import SourceURI, parse_uri

__all__ = [
    "ASSUMED_MIN_ENTROPY", "DeviceFault", "DeviceLost", "Driver", "EndOfRecording", "MinEntropy", "SourceURI",
    "TransportError", "discover", "installed", "open_driver", "parse_uri",
]  # fmt: skip

GROUP = "everett_cuda.drivers"
_BUILT_IN: dict[str, type[Driver]] = {d.scheme: d for d in (ReplayDriver, SimulatedDriver)}


def installed() -> dict[str, type[Driver] | EntryPoint]:
    """Schemes and their drivers. A built-in scheme cannot be taken over by another package."""
    return {**{e.name: e for e in entry_points(group=GROUP)}, **_BUILT_IN}


def _load(scheme: str, found: type[Driver] | EntryPoint) -> type[Driver]:
    if isinstance(found, type):
        return found
    try:
        driver = found.load()
    except Exception as error:
        raise SourceError(f"the driver of {scheme}: ({found.value}) cannot be imported: {error}") from error
    if not (isinstance(driver, type) and issubclass(driver, Driver)):
        raise SourceError(f"the driver of {scheme}: ({found.value}) is not a subclass of everett_cuda.drivers.Driver")
    return driver


def discover() -> tuple[list[str], list[str]]:
    """(URIs of real local quantum devices that are present, lines that say what was looked for)."""
    uris, looked_for = [], []
    for scheme, found in sorted(installed().items()):
        try:
            driver = _load(scheme, found)
            if driver.looks_for:
                looked_for.append(f"{scheme}: {driver.looks_for}")
                uris += driver.discover()
        except SourceError as error:
            looked_for.append(f"{scheme}: not looked for: {error}")
    return uris, looked_for


def open_driver(text: str) -> Driver:
    """Opens the driver that a URI names; `auto` is the first real local quantum device.

    Raises UnknownScheme, BadParameter, SourceExhausted (a recording with no bytes) or SourceError.
    """
    uri = parse_uri(text)
    if uri.scheme == "auto":
        return _open_auto(uri)
    drivers = installed()
    if uri.scheme not in drivers:
        schemes = ", ".join(f"{s}:" for s in sorted(drivers))
        raise UnknownScheme(f"no driver for {uri.scheme}: in {text!r}; installed are {schemes}, and auto")
    return _load(uri.scheme, drivers[uri.scheme]).open(uri)


def _open_auto(uri: SourceURI) -> Driver:
    uri.parameters({})
    uris, looked_for = discover()
    if not uris:
        what = "".join(f"\n  {line}" for line in looked_for) or " nothing (no driver of a real device is installed)"
        raise SourceError(
            f"auto: no quantum device was found; looked for:{what}\nConnect a device or install its driver. Bits that "
            "are not quantum must be asked for by name: replay:FILE (recorded) or sim:seed=7 (simulated)."
        )
    query = "&".join(f"{k}={v}" for k, v in uri.given.items())
    driver = open_driver(uris[0] + (("&" if "?" in uris[0] else "?") + query if query else ""))
    if driver.kind != "quantum":
        driver.close()
        raise SourceError(f"auto: {uris[0]} is {driver.kind}, not quantum; name it to use it")
    return driver
