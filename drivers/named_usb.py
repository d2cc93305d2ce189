"""Which USB device a URI means: one by its serial number, one by its place on the bus, or the only one that is there."""

from urllib.parse import quote

from ..errors import DeviceNotFound, SourceError
from .contract import Finding
from .permission import holders, in_words
from .uri import SourceURI
from .usb import UsbDevice


def usb_uri(scheme: str, device: UsbDevice) -> str:
    """The URI that opens exactly this device."""
    return f"{scheme}:{quote(device.serial, safe='')}" if device.serial else f"{scheme}:path={device.path}"


def close_all(devices: list[UsbDevice]) -> None:
    """Closes each."""
    for device in devices:
        device.close()


def named_device(uri: SourceURI, devices: list[UsbDevice], looks_for: str) -> UsbDevice:
    """The one of `devices` that the URI names, closed; all others are given up. DeviceNotFound for none, SourceError for
    several.

    `uri.rest` is a serial number, the parameter `path` a place such as 1-2.3.
    """
    path = uri.given.get("path", "")
    wanted = [d for d in devices if uri.rest in ("", d.serial) and path in ("", d.path)]
    there = ", ".join(usb_uri(uri.scheme, d) for d in devices) or "none"
    choice = " or ".join(usb_uri(uri.scheme, d) for d in wanted)
    close_all([d for d in devices if len(wanted) != 1 or d is not wanted[0]])
    if len(wanted) == 1:
        return wanted[0]
    if wanted:
        raise SourceError(f"{uri.text} could mean any of {len(wanted)} devices; name one: {choice}")
    raise DeviceNotFound(
        f"{uri.text}: no such device is attached (there: {there}); it looks for {looks_for}. Check the cable; a container "
        "needs /dev/bus/usb, a virtual machine the device itself"
    )


def usb_state(device: UsbDevice) -> str:
    """ "ready", or in a few words why a listed device cannot be opened now. Leaves it open; the caller closes it."""
    others = holders(device.node)
    if others:
        return f"in use by {in_words(others)}"
    try:
        device.open()
    except SourceError as error:
        return "no permission" if device.forbidden(error) else str(error)
    return "ready"


def usb_findings(device: UsbDevice) -> list[Finding]:
    """For the doctor: may this user open the device's node, is a kernel driver bound to it, has somebody claimed it?

    Ends at the first fail. Leaves the device open; the caller closes it. A kernel driver is left where it is.
    """
    findings = []
    try:
        device.open()
        findings = [Finding("permission", "ok", f"this user may open {device.node}")]
        if device.kernel_driver_active():
            driver = device.kernel_driver() or "a kernel driver"
            text = f"{driver} is bound to it; it is detached at opening, and comes back when the device is plugged in again"
            step = f"to detach it by hand: `echo {device.path}:1.0 > /sys/bus/usb/drivers/{driver}/unbind`"
            return [*findings, Finding("kernel driver", "note", text, step)]
        device.claim(1, 0)
    except SourceError as error:
        if device.forbidden(error):
            return [Finding("permission", "fail", str(error), device.permission_hint())]
        return [*findings, Finding("other process", "fail", str(error), "stop that first")]
    return [*findings, Finding("other process", "ok", "nobody else has claimed it")]
