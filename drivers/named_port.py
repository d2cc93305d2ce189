"""Which serial port a URI means: one by its path, one by its serial number, or the only one that is there."""

import os

from ..errors import DeviceNotFound, SourceError
from .contract import Finding
from .serial_port import Port, ports
from .uri import SourceURI


def named_port(uri: SourceURI, found: list[Port], looks_for: str) -> Port:
    """The port among `found` that `uri.rest` names; DeviceNotFound when it is not there, SourceError when more than
    one could be meant.

    A path (it begins with /) may be any serial port: what the kernel says of it comes back, or a Port that says nothing.
    """
    rest = uri.rest
    if rest.startswith("/"):
        real = os.path.realpath(rest)
        known = next((p for p in ports() if p.device == real), Port(real))
        # The name that the user gave is kept: a link under /dev/serial/by-id outlives a replug, ttyACM0 may not.
        return Port(rest, known.vid, known.pid, known.serial, known.product, known.manufacturer)
    if rest:
        same = [p for p in found if rest in (p.serial, p.device)]
        if not same:
            there = ", ".join(port_uri(uri.scheme, p) for p in found) or "none"
            raise DeviceNotFound(f"{uri.text}: no such device is attached (there: {there}); it looks for {looks_for}")
        return same[0]
    if not found:
        raise DeviceNotFound(f"{uri.text}: no device was found; it looks for {looks_for}. Connect one, or name its port")
    if len(found) > 1:
        there = " or ".join(port_uri(uri.scheme, p) for p in found)
        raise SourceError(f"{uri.text} could mean any of {len(found)} devices; name one: {there}")
    return found[0]


def port_uri(scheme: str, port: Port) -> str:
    """The URI that opens exactly this port: by its serial number where it has one."""
    return f"{scheme}:{port.serial or port.device}"


def found_finding(uri: SourceURI, found: list[Port], looks_for: str) -> tuple[Port | None, Finding]:
    """(the port that the URI means or None, what the doctor says of it)."""
    try:
        port = named_port(uri, found, looks_for)
    except SourceError as error:
        step = "check the cable and that `dmesg` shows a new tty (module cdc_acm); then name the port in the URI"
        return None, Finding("device", "fail", str(error), step, isinstance(error, DeviceNotFound))
    about = " ".join(w for w in (port.product, port.serial and f"serial {port.serial}") if w)
    identity = f"{port.vid:04x}:{port.pid:04x}" if port.vid is not None and port.pid is not None else "no USB identity"
    return port, Finding("device", "ok", f"{port.device}: {about or 'says nothing of itself'} ({identity})")
