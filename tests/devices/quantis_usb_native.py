"""The emulated Quantis with a data endpoint in C: for drivers, this bus is libusb, and its bulk transfers need no GIL."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

from .quantis_usb import QuantisUsb
from .seeded_bytes import Seeded
from .usb_bus import Handle, UsbBus

SOURCE = Path(__file__).with_name("quantis_usb_bulk.c")
FAULTS = ("none", "short", "stall", "overflow", "io", "silence", "unplug", "late")


class _Device(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("seed", "served", "fault_at")),
        *((name, ctypes.c_double) for name in ("rate", "made_at")),
        *((name, ctypes.c_int32) for name in ("fault", "gone", "silent", "halted", "running", "calls")),
    ]


def why_not() -> str:
    """What is missing for this emulation, "" when nothing is."""
    return "" if shutil.which("gcc") else "gcc is not installed"


def build(folder: Path) -> Path:
    """Compiles the endpoint into `folder`; returns the library."""
    library = folder / "quantis_usb_bulk.so"
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library, SOURCE], check=True)
    return library


class NativeQuantis(QuantisUsb):
    """Its random bytes are those of `seed`. `data` is the endpoint's state; control requests are the parent's."""

    def __init__(self, seed: int, rate_bytes_per_s: float = 0.0, **more):
        super().__init__(Seeded(seed), **more)
        self.data = _Device(seed=seed, rate=rate_bytes_per_s)

    @property
    def served(self) -> int:
        return self.data.served

    def fault(self, kind: str, at: int) -> None:
        """As the parent's, and "late": a transfer's time is over when half of its bytes are there."""
        self.data.fault_at = at
        self.data.fault = FAULTS.index(kind)

    def silence(self) -> None:
        self.data.silent = 1

    def speak(self) -> None:
        self.data.silent = 0

    def unplug(self) -> None:
        super().unplug()
        self.data.gone = 1

    def plug(self) -> None:
        """As the parent's; the stream goes on where it was."""
        self.data.gone = self.data.halted = self.data.silent = 0
        super().plug()

    def enumerable(self) -> bool:
        return self.plugged and not self.data.gone

    def clear_halt(self) -> None:
        self.data.halted = 0


class NativeBus(UsbBus):
    """A bus of `NativeQuantis` devices."""

    def __init__(self, library: Path, *devices: NativeQuantis):
        super().__init__(*devices)
        # No `ctx`: it is one bus, not a libusb of which there can be many contexts.
        self.lib = SimpleNamespace(libusb_bulk_transfer=ctypes.CDLL(str(library)).bulk_transfer)

    def open_device(self, device: NativeQuantis) -> Handle:
        handle = super().open_device(device)
        handle.handle = ctypes.c_void_p(ctypes.addressof(device.data))
        return handle
