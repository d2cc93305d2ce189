"""Drivers: from a device, or a recording, to raw bytes. They know nothing of torch or CUDA.

A driver of another package is found through the entry point group `everett_cuda.drivers`: its name is the scheme, its
object a subclass of `Driver`. Every driver is imported only when its scheme is asked for, or devices are looked for.
"""

from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points

from ..errors import DeviceNotFound, SourceError, UnknownScheme
from .contract import (
    ASSUMED_MIN_ENTROPY,
    Attached,
    DeviceBusy,
    DeviceFault,
    DeviceLost,
    Driver,
    EndOfRecording,
    Finding,
    MinEntropy,
    TransportError,
)
from .uri import SourceURI, parse_uri

__all__ = [
    "ASSUMED_MIN_ENTROPY", "Attached", "DeviceBusy", "DeviceFault", "DeviceLost", "Driver", "EndOfRecording", "Finding",
    "MinEntropy", "SourceURI", "TransportError", "attached", "driver_of", "installed", "open_driver", "parse_uri",
    "quantum_devices",
]  # fmt: skip

GROUP = "everett_cuda.drivers"
# In the order in which `auto` looks for them.
_BUILT_IN = {
    scheme: EntryPoint(scheme, f"everett_cuda.drivers.{place}", GROUP)
    for scheme, place in (
        ("broker", "broker:BrokerDriver"),
        ("quantis-pcie", "quantis_pcie:QuantisPcieDriver"),
        ("quantis-usb", "quantis_usb:QuantisUsbDriver"),
        ("qcicada", "qcicada:QCicadaDriver"),
        ("anu", "anu:AnuDriver"),
        ("chaoskey", "chaoskey:ChaosKeyDriver"),
        ("comscire", "comscire:ComScireDriver"),
        ("hwrng", "hwrng:HwrngDriver"),
        ("outshift", "outshift:OutshiftDriver"),
        ("qrypt", "qrypt:QryptDriver"),
        ("quantis-appliance", "quantis_appliance:QuantisApplianceDriver"),
        ("swiftrng", "swiftrng:SwiftRngDriver"),
        ("truerng", "truerng:TrueRngDriver"),
        ("replay", "replay:ReplayDriver"),
        ("sim", "sim:SimulatedDriver"),
    )
}
# No local device: neither listed as attached nor imported when devices are looked for (numpy alone would take 0.25 s).
_NOT_DEVICES = {"anu", "outshift", "qrypt", "quantis-appliance", "replay", "sim"}
# Services that publish what they give: fit to be audited against, unfit for keys that nobody else should know.
_BEACONS = ("nist", "curby", "random-org", "random.org", "drand")


def installed() -> dict[str, EntryPoint]:
    """Schemes and where their drivers are. A built-in scheme cannot be taken over by another package."""
    others = {e.name: e for e in sorted(entry_points(group=GROUP), key=lambda e: e.name)}
    return {**_BUILT_IN, **{scheme: e for scheme, e in others.items() if scheme not in _BUILT_IN}}


def _load(scheme: str, found: EntryPoint) -> type[Driver]:
    try:
        driver = found.load()
    except SourceError:  # a missing extra, named
        raise
    except Exception as error:
        raise SourceError(f"the driver of {scheme}: ({found.value}) cannot be imported: {error}") from error
    if not (isinstance(driver, type) and issubclass(driver, Driver)):
        raise SourceError(f"the driver of {scheme}: ({found.value}) is not a subclass of everett_cuda.drivers.Driver")
    return driver


def attached() -> tuple[list[Attached], list[str]]:
    """(devices that are present, whatever their kind; lines that say what was looked for), in the order of `auto`."""
    devices, looked_for = [], []
    for scheme, found in installed().items():
        if scheme in _NOT_DEVICES:
            continue
        try:
            driver = _load(scheme, found)
            if driver.looks_for:
                looked_for.append(f"{scheme}: {driver.looks_for}")
                devices += driver.attached()
        except SourceError as error:
            looked_for.append(f"{scheme}: not looked for: {error}")
    return devices, looked_for


def _refuse_beacon(scheme: str) -> None:
    if scheme in _BEACONS:
        raise UnknownScheme(
            f"{scheme}: is refused as a source of keys: a public beacon shows its values to everybody, and random.org is "
            "not quantum either. Services that give each client bytes of its own are anu:, outshift: and qrypt:"
        )


def driver_of(uri: SourceURI) -> type[Driver]:
    """The driver that serves a URI's scheme; UnknownScheme, or SourceError when it cannot be imported."""
    _refuse_beacon(uri.scheme)
    drivers = installed()
    if uri.scheme not in drivers:
        schemes = ", ".join(f"{s}:" for s in sorted(drivers))
        raise UnknownScheme(f"no driver for {uri.scheme}: in {uri.text!r}; installed are {schemes}, and auto")
    return _load(uri.scheme, drivers[uri.scheme])


def open_driver(text: str) -> Driver:
    """Opens the driver that a URI names; `auto` is the first real local quantum device that can be opened, or before
    that a broker that serves quantum bits.

    Raises UnknownScheme, BadParameter, DeviceNotFound, DeviceBusy, SourceExhausted (a recording with no bytes) or
    SourceError.
    """
    _refuse_beacon(str(text).partition(":")[0])  # before parsing: a scheme has no dot
    uri = parse_uri(text)
    if uri.scheme == "auto":
        return _open_auto(uri)
    try:
        return driver_of(uri).open(uri)
    except DeviceBusy as error:
        from .broker import hint_for  # here, because a broker's driver is no cheap import

        raise DeviceBusy(f"{error}. {hint_for(uri.scheme)}") from error


def quantum_devices(uri: SourceURI) -> list[Attached]:
    """What `auto` chooses from, in its order; the parameters of `uri`, an `auto` one, are in each device's URI.

    Raises DeviceNotFound, which says what was looked for, and BadParameter.
    """
    uri.parameters({})
    devices, looked_for = attached()
    found = [d for d in devices if d.kind == "quantum"]
    if not found:
        what = "".join(f"\n  {line}" for line in looked_for) or " nothing (no driver of a real device is installed)"
        others = "".join(f"\n  {d.uri}: {d.name}, {d.kind}" for d in devices)
        raise DeviceNotFound(
            f"auto: no quantum device was found; looked for:{what}"
            + (f"\nAttached, but not quantum:{others}" if others else "")
            + "\nConnect a device or install its driver. Bits that are not quantum must be asked for by name: "
            "replay:FILE (recorded) or sim:seed=7 (simulated)."
        )
    query = "&".join(f"{k}={v}" for k, v in uri.given.items())
    return [replace(d, uri=d.uri + (("&" if "?" in d.uri else "?") + query if query else "")) for d in found]


def _open_auto(uri: SourceURI) -> Driver:
    failed = []
    for device in quantum_devices(uri):
        try:
            driver = open_driver(device.uri)
        except SourceError as error:
            failed.append(f"\n  {device.uri}: {error}")
            continue
        if driver.kind == "quantum":
            return driver
        driver.close()
        failed.append(f"\n  {device.uri}: it is {driver.kind}, not quantum; name it to use it")
    raise SourceError(
        f"auto: none of the quantum devices that were found can be used:{''.join(failed)}\nRun `everett doctor URI` on "
        "one of them."
    )
