"""Emulated Quantis PCI/PCIe cards, kernel generators and ChaosKeys, behind real paths of a preloaded process.

`KernelDouble(folder)` lays out sysfs, /proc/qrandom and the nodes under `folder`; a process that is started with its
`environment()` finds them under /sys, /proc and /dev (see kernel_double.c). Devices are added, changed and taken away
while such processes run.
"""

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np

NODES = 16
MODULES_2010, MODULES_LATER, CHIPS, HWRNG, CHAOSKEY, FOREIGN = range(1, 7)
WELL, IO_ERROR, HANG, GONE, ZERO_READ = range(5)
NEVER = (1 << 64) - 1
_MAJORS = {MODULES_2010: 250, MODULES_LATER: 250, CHIPS: 240, HWRNG: 10, CHAOSKEY: 180, FOREIGN: 235}
_lock = threading.Lock()


class Node(ctypes.Structure):
    """`struct node` of kernel_double.c: the state of one device, shared with the processes that use it."""

    _fields_ = (
        [("inode", ctypes.c_uint64)]
        + [(name, ctypes.c_uint32) for name in (
            "kind", "major", "minor", "driver_version", "board_version", "mask", "status", "mode", "next_mode", "ais31",
            "busy", "fault", "fault_times",
        )]
        + [(name, ctypes.c_uint64) for name in (
            "fault_at", "seed", "offset", "stuck_at", "biased_at", "claims_more_at", "reads", "zero_reads", "first_read",
            "smallest_read", "largest_read", "garbage",
        )]
        + [("armed", ctypes.c_uint32), ("requests", ctypes.c_uint32 * 16)]
        + [("bytes_per_s", ctypes.c_double), ("made_at", ctypes.c_double)]
        + [("serial", ctypes.c_char * 256)]
    )  # fmt: skip


def build() -> Path:
    """Compiles the double once, beside its source's newest version; FileNotFoundError without a C compiler."""
    source = Path(__file__).with_suffix(".c")
    made = Path(os.environ.get("TMPDIR", "/tmp")) / f"everett-kernel-double-{os.getuid()}-{source.stat().st_mtime_ns}.so"
    if not made.exists():
        compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
        if compiler is None:
            raise FileNotFoundError("no C compiler")
        scratch = made.with_suffix(f".{os.getpid()}")
        command = [compiler, "-shared", "-fPIC", "-O2", "-o", str(scratch), str(source), "-ldl"]
        subprocess.run(command, check=True, capture_output=True)
        scratch.replace(made)
    return made


def why_not() -> str:
    """Why no process can be given emulated devices here; "" when one can."""
    libc, _, version = os.confstr("CS_GNU_LIBC_VERSION").partition(" ") if sys.platform == "linux" else ("", "", "")
    if libc != "glibc" or tuple(map(int, version.split("."))) < (2, 33):  # older ones have stat(2) under other names
        return "emulated devices need Linux with glibc 2.33 or newer"
    try:
        build()
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        return f"the double of the kernel cannot be compiled: {error}"
    return ""


def run_pytest(kernel: "KernelDouble", *files: str) -> None:
    """Runs the tests in files of this folder in a process that sees the kernel's devices; fails with its output."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "devices.emulated", *files]
    here = Path(__file__).parent
    environment = kernel.environment() | {"PYTHONPATH": str(here.parent)}
    done = subprocess.run(
        command, env=environment, cwd=here, capture_output=True, text=True, timeout=300
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def stream(seed: int, start: int, n: int) -> bytes:
    """Bytes [start, start + n) of a device's stream, as long as it is neither stuck nor biased: SplitMix64."""
    first = start // 8
    i = np.arange(first, (start + n + 7) // 8, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + (i + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return z.astype("<u8").tobytes()[start - 8 * first :][:n]


class Device:
    """One device: `state` is its shared `Node`."""

    def __init__(self, kernel: "KernelDouble", state: Node, node: Path, folders: list[Path]):
        self.kernel, self.state, self.node, self._folders = kernel, state, node, folders

    def break_at(self, fault: int, offset: int | None = None, times: int = 0) -> None:
        """The read that would pass `offset` (default: the next) fails so, `times` times (0: from then on)."""
        self.state.fault_at = self.state.offset if offset is None else offset
        self.state.fault_times = times
        self.state.fault = fault

    def unplug(self, offset: int | None = None) -> None:
        """Takes it away: its node and folders go, and who has it open gets ENODEV; with `offset`, at that byte."""
        self.break_at(GONE, offset)
        self.forget()

    def forget(self) -> None:
        """Removes its node and folders."""
        self.node.unlink(missing_ok=True)
        for folder in self._folders:
            if folder.is_symlink():
                folder.unlink()
            else:
                shutil.rmtree(folder, ignore_errors=True)


class KernelDouble:
    """The emulated kernel of one folder."""

    def __init__(self, folder: Path):
        self.root = Path(folder)
        self.root.mkdir(parents=True, exist_ok=True)
        state = self.root / "state"
        size = NODES * ctypes.sizeof(Node)
        if not state.exists():
            state.write_bytes(bytes(size))
            state.chmod(0o666)  # a process of another user shares it too
        with open(state, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        self._nodes = (Node * NODES).from_buffer(self._map)
        for name in ("dev", "proc", "sys/dev/char", "sys/class", "sys/bus/pci/devices", "sys/devices"):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    def environment(self) -> dict[str, str]:
        """For a process that is to see these devices."""
        return {**os.environ, "LD_PRELOAD": str(build()), "KERNEL_DOUBLE": str(self.root)}

    def clear(self) -> None:
        """Takes all devices away, as if the machine had none. Processes must not have any open."""
        for name in ("dev", "proc", "sys/dev/char", "sys/class", "sys/bus/pci/devices", "sys/devices"):
            shutil.rmtree(self.root / name, ignore_errors=True)
            (self.root / name).mkdir(parents=True)
        for node in self._nodes:
            ctypes.memset(ctypes.byref(node), 0, ctypes.sizeof(node))

    # --- cards ---

    def chip_card(
        self, number: int = 0, chips: int = 12, serial: str = "2101ABC240M", pci: str = "0000:03:00.0", mode: int = 0,
        **state,
    ) -> Device:  # fmt: skip
        """A PCIe-240M (12 chips) or PCIe-40M (2), served by quantis_chip_pcie 20.2.4."""
        every = (1 << chips) - 1
        ids = {2: 0x0002, 12: 0x0003}
        place = self.pci_card(pci, 0x1E89, ids[chips], "quantis_chip_pcie")
        folder = place / "quantis_chip_pcie" / f"qrandom{number}"
        settings = {"driver_version": 202, "board_version": 0x01020304, "mask": every, "status": every, "mode": mode,
                    "next_mode": mode, "armed": 1, "serial": serial.encode()}  # fmt: skip
        return self._add(CHIPS, f"qrandom{number}", 32 + number, "quantis_chip_pcie", folder, settings | state, [place])

    def module_card(
        self, number: int = 0, modules: int = 0b1111, serial: str | None = None, pci: str = "0000:04:00.0",
        proc: bool = True, **state,
    ) -> Device:  # fmt: skip
        """A PCI or PCIe card with modules; with a serial number, served by the later driver."""
        kind = MODULES_2010 if serial is None else MODULES_LATER
        place = self.pci_card(pci, 0x179A, 0x0001, "quantis_pci")
        folder = self.root / "sys/devices/virtual/qrandom" / f"qrandom{number}"
        if proc:
            (self.root / "proc/qrandom").write_text(
                f"Quantis PCI RNG driver\ndriver name         : quantis_pci\ndevice major number : {_MAJORS[kind]}\n"
            )
        settings = {"driver_version": 20 if serial is None else 202, "board_version": 0x0A0B0C0D, "mask": modules,
                    "status": modules, "serial": (serial or "").encode()}  # fmt: skip
        return self._add(kind, f"qrandom{number}", number, "qrandom", folder, settings | state, [place])

    def pci_card(self, pci: str, vendor: int, device: int, driver: str = "") -> Path:
        """A card on the bus; without a driver nothing more."""
        place = self.root / "sys/devices/pci0000:00" / pci
        place.mkdir(parents=True, exist_ok=True)
        (place / "vendor").write_text(f"0x{vendor:04x}\n")
        (place / "device").write_text(f"0x{device:04x}\n")
        if driver:
            bound = self.root / "sys/bus/pci/drivers" / driver
            bound.mkdir(parents=True, exist_ok=True)
            self._link(place / "driver", bound)
        self._link(self.root / "sys/bus/pci/devices" / pci, place)
        return place

    # --- others ---

    def hwrng(self, current: str, available: str = "", **state) -> Device:
        """/dev/hwrng with a current source."""
        folder = self.root / "sys/devices/virtual/misc/hw_random"
        device = self._add(HWRNG, "hwrng", 183, "misc", folder, state, [], "hw_random")
        (folder / "rng_available").write_text(f"{available or current}\n")
        (folder / "rng_selected").write_text("0\n")
        (folder / "rng_quality").write_text("1024\n")
        self.set_current(current)
        return device

    def set_current(self, current: str) -> None:
        """What the kernel says is its current source."""
        path = self.root / "sys/devices/virtual/misc/hw_random/rng_current"
        scratch = path.with_suffix(".new")
        scratch.write_text(f"{current}\n")
        scratch.replace(path)

    def chaoskey(self, number: int = 0, serial: str = "00CAFE", ids: tuple[int, int] = (0x1D50, 0x60C6), **state) -> Device:
        """/dev/chaoskeyN behind a USB device."""
        usb = self.root / f"sys/devices/usb1/1-{number + 1}"
        folder = usb / f"1-{number + 1}:1.0/usbmisc/chaoskey{number}"
        folder.mkdir(parents=True)
        (usb / "idVendor").write_text(f"{ids[0]:04x}\n")
        (usb / "idProduct").write_text(f"{ids[1]:04x}\n")
        if serial:
            (usb / "serial").write_text(f"{serial}\n")
        return self._add(CHAOSKEY, f"chaoskey{number}", 224 + number, "usbmisc", folder, state, [usb])

    def foreign(self, name: str = "qrandom0", kind: str = "cuse", **state) -> Device:
        """A character device of another class that gives bytes under a name of ours."""
        return self._add(FOREIGN, name, 0, kind, self.root / "sys/devices/virtual" / kind / name, state, [])

    def _add(self, kind, name, minor, class_name, folder, state, parents, class_entry="") -> Device:
        entry = class_entry or name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dev").write_text(f"{_MAJORS[kind]}:{minor}\n")
        in_class = self.root / "sys/class" / class_name
        in_class.mkdir(parents=True, exist_ok=True)
        self._link(folder / "subsystem", in_class)
        if parents:
            interface = folder.parent.parent  # of a USB device, or the PCI device itself
            if kind in (CHIPS, CHAOSKEY):
                self._link(folder / "device", interface)
        self._link(in_class / entry, folder)
        by_number = self.root / "sys/dev/char" / f"{_MAJORS[kind]}:{minor}"
        self._link(by_number, folder)
        backing = self.root / "dev" / name
        backing.write_bytes(b"")
        with _lock:
            for old in self._nodes:  # a file that is gone and that no process has open any more
                if old.inode == backing.stat().st_ino:
                    old.inode = 0
            node = next(n for n in self._nodes if n.kind == 0)
            settings = {"seed": 7, "stuck_at": NEVER, "biased_at": NEVER, "claims_more_at": NEVER, **state}
            for key, value in settings.items():
                setattr(node, key, value)
            node.major, node.minor, node.inode = _MAJORS[kind], minor, backing.stat().st_ino
            node.kind = kind
        on_bus = [self.root / "sys/bus/pci/devices" / p.name for p in parents if kind != CHAOSKEY]
        return Device(self, node, backing, [in_class / entry, by_number, *on_bus, *parents, folder])

    @staticmethod
    def _link(link: Path, to: Path) -> None:
        if link.is_symlink():
            link.unlink()
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(to, link.parent))
