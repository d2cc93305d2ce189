"""This machine as if no device were attached to it: what looks for some finds what a test plugs in, and nothing else.

For drivers in this process; paths are replaced, and what pyusb and pyserial ask of the system.
"""

import os
from contextlib import contextmanager
from pathlib import Path

from devices.usb_bus import UsbBus

from everett_cuda.drivers import broker, chaoskey, hwrng, quantis_card, serial_port


class BareMachine:
    """`bus` is its USB; `plug_in_port` gives it a serial port; `by_id` is its /dev/serial/by-id."""

    def __init__(self, folder: Path):
        self.bus = UsbBus()
        self.by_id = folder / "by-id"
        self._ports: list[tuple] = []

    def plug_in_port(self, path: Path, vid: int, pid: int, serial: str, product: str) -> None:
        """The port at `path`, as long as it is there, has this USB identity."""
        self._ports.append((path, vid, pid, serial, product))

    def comports(self, *_) -> list:
        """As pyserial's, of the ports that are there."""
        from serial.tools.list_ports_common import ListPortInfo

        found = []
        for path, vid, pid, serial, product in self._ports:
            if path.exists():
                info = ListPortInfo(os.path.realpath(path), skip_link_detection=True)
                info.vid, info.pid, info.serial_number, info.product = vid, pid, serial, product
                found.append(info)
        return found


@contextmanager
def bare_machine(folder: Path, monkeypatch):
    """Inside, drivers see the machine that is yielded; `folder` is for its files."""
    machine = BareMachine(folder)
    machine.by_id.mkdir(parents=True)
    paths = {hwrng: ["_SYSFS"], chaoskey: ["_CLASS"], quantis_card: ["_CLASSES", "_PCI"], broker: ["DEFAULT_PATH"]}
    for module, names in paths.items():
        for name in names:
            monkeypatch.setattr(module, name, folder / "none")
    monkeypatch.setattr(serial_port, "BY_ID", machine.by_id)
    monkeypatch.setattr(serial_port.list_ports, "comports", machine.comports)
    with machine.bus.plugged_into_pyusb():
        yield machine
