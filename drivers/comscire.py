"""`comscire:SERIAL`: ComScire's PureQuantum and R generators, 2 to 128 Mbit/s of transistor noise over an FTDI chip.

The vendor calls them quantum; their noise is the shot and thermal noise of an integrated circuit, and nothing published
tells the one from the other, so here they are `electronic`. Never seen on hardware here.

    comscire:            the only one attached           comscire:QWR40123, comscire:path=1-2
    latency=20           ms after which the FTDI chip sends what it has (the vendor's value)
    transfer=8KiB        bytes asked for at once, 512 to 512KiB; by default 20 ms of the model's rate, at most 64 KiB
    status=30            s between looks at the device's own statistics, for which the stream has to stop for about 0.1 s;
                         0: only when the stream begins
    bits=msb|lsb         which bit of a byte was made first (not documented; msb)
    conditioned=0|1      whether the model processes its bits, where that is not known (then: 1, which claims less)
    unlisted=1           takes a model whose letter is not known; see `comscire_models`
"""

import threading
import time
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..errors import DeviceNotFound, SourceError
from .comscire_models import IDS, PREFIX, model_of
from .comscire_protocol import ANSWER_S, BAD_STATISTICS, SYNCHRONIZE_S, Generator
from .contract import Attached, DeviceFault, DeviceLost, Driver, Finding, TransportError
from .named_usb import close_all, named_device, usb_findings, usb_state, usb_uri
from .permission import holders, in_words
from .reconnection import try_until
from .serial_port import ports
from .uri import SourceURI, parse_count, parse_flag, parse_size
from .usb import UsbDevice, find

if TYPE_CHECKING:
    from .ftdi_pipe import FtdiPipe

_SMALLEST_TRANSFER, _LARGE_TRANSFER = 512, 65536  # of the vendor's library for slow and fast models (V)
_LARGEST_TRANSFER = 1 << 19  # 1 MiB lost data for others (libusb issue 1286)
_GATHER_S = 0.02  # a read returns with the bytes of so long, or a full buffer
_SLOWEST_BYTES_PER_S = 100e3 / 8  # of the models that are taken
_SILENCE_S = 5.0  # the vendor's time-out of a stream; then it is stopped and started


def parse_latency(text: str) -> int:
    """1 to 255 ms."""
    if not 1 <= (value := parse_count(text)) <= 255:
        raise ValueError("1 to 255, in ms")
    return value


def parse_transfer(text: str) -> int:
    """512 to 512 KiB."""
    if not _SMALLEST_TRANSFER <= (size := parse_size(text)) <= _LARGEST_TRANSFER:
        raise ValueError("512 to 512KiB")
    return size


def parse_bits(text: str) -> str:
    """`msb` or `lsb`."""
    if text not in ("msb", "lsb"):
        raise ValueError("msb or lsb")
    return f"{text}_first"


class ComScireDriver(Driver):
    """See the module."""

    scheme = "comscire"
    parameters = {
        "path": str, "latency": parse_latency, "transfer": parse_transfer, "status": parse_count, "bits": parse_bits,
        "conditioned": parse_flag, "unlisted": parse_flag,
    }  # fmt: skip
    looks_for = f"ComScire generators on USB (0403:6001 and 0403:6014 with a serial number {PREFIX}...)"
    kind = "electronic"

    def __init__(self, device: UsbDevice, values: dict[str, object]):
        """Takes over `device`, found and closed; closes it on an error. values: the URI's parameters, parsed."""
        self._values = values
        self._reading = threading.Lock()  # held by whoever talks to the device
        self._closed = threading.Event()
        self._generator: Generator | None = None  # while the device is there
        self.serial, self.min_entropy = device.serial, self.claim(values)
        self.bit_order = values.get("bits", "msb_first")
        self._status_every_s = values.get("status", 30)
        try:
            self._model = model = model_of(device.serial, values.get("unlisted", False))
            self.name = f"ComScire {model.name}"
            self.rate_bytes_per_s = model.rate_bytes_per_s
            known = model.conditioned is not None
            self.conditioned = model.conditioned if known else values.get("conditioned", True)
            self._transfer = values.get("transfer", _transfer(model.rate_bytes_per_s))
            self._connect(device, SYNCHRONIZE_S)
        except BaseException:
            device.close()
            raise
        self.chunk_bytes = max(4096, self._transfer)

    @classmethod
    def open(cls, uri: SourceURI) -> "ComScireDriver":
        values = uri.parameters(cls.parameters)
        return cls(named_device(uri, _generators(), cls.looks_for), values)

    @classmethod
    def attached(cls) -> list[Attached]:
        devices, rows = _generators(), []
        try:
            for device in devices:
                name, rate, state = "ComScire", None, ""
                try:
                    model = model_of(device.serial)
                    name, rate = f"ComScire {model.name}", model.rate_bytes_per_s
                except SourceError as error:
                    state = f"refused: {error}"
                rows.append(
                    Attached(usb_uri(cls.scheme, device), name, device.serial, cls.kind, rate, state or usb_state(device))
                )
            return rows
        finally:
            close_all(devices)

    # --- opening ---

    def _connect(self, device: UsbDevice, limit_s: float) -> None:
        """Takes it from the kernel's serial driver, sets it up and brings it into step. The caller closes it on an error."""
        from .ftdi_pipe import FtdiPipe  # with numpy and pyftdi, which looking for devices does without

        _take_from_kernel(device)
        pipe = FtdiPipe(device, self._transfer, self._values.get("latency", 20), synchronous=self._model.generation >= 4)
        generator = Generator(pipe, self._model.generation)
        generator.synchronize(limit_s)
        if generator.answers:
            generator.clear_statistics()
        self._generator, self._path = generator, device.path
        self._begin_anew()
        self._clear = False
        self._about = {
            "model": self._model.name,
            "generation": str(self._model.generation),
            "transfer": f"{pipe.transfer_bytes} bytes",
            "USB": f"{device.vendor:04x}:{device.product:04x} at {device.speed}",
        }
        self._show("not asked yet" if generator.answers else "not told by this generation")

    def _show(self, statistics: str) -> None:
        self.details = MappingProxyType({**self._about, "its statistics": statistics})

    def _begin_anew(self) -> None:
        """What came is dropped, and the stream will be stopped and started."""
        self._streaming = False
        self._rest = memoryview(b"")  # bytes that did not fit into the caller's buffer

    def _begin(self, generator: Generator, limit_s: float) -> None:
        """From any state to the stream's first usable byte. DeviceFault when its own statistics are bad."""
        generator.synchronize(limit_s)
        if generator.answers:
            if self._clear:
                generator.clear_statistics()
                self._clear = False
            status = generator.status()
            if status & BAD_STATISTICS:
                # Cleared once the alarm is raised: what lasts sets it again, and that alarm is permanent.
                self._clear = True
                self._show(f"bad (status {status:#06x})")
                raise DeviceFault(f"{self.name} {self.serial}: its own statistics are bad", status & BAD_STATISTICS, 0)
            self._show(f"good (status {status:#06x})")
        self._rest = generator.start(self.rate_bytes_per_s or _SLOWEST_BYTES_PER_S)
        self._streaming = True
        self._asked_at = self._last_byte = time.monotonic()

    # --- reading ---

    def readinto(self, buffer: memoryview, timeout_s: float) -> int:
        with self._reading:
            generator = self._generator
            if generator is None or self._closed.is_set():
                raise self._gone()
            try:
                if self._streaming and self._status_every_s and time.monotonic() - self._asked_at > self._status_every_s:
                    self._begin_anew()
                if not self._streaming:
                    self._begin(generator, ANSWER_S + timeout_s)
                return self._fill(generator.pipe, buffer, timeout_s)
            except SourceError as error:
                self._begin_anew()
                if self._closed.is_set():
                    raise self._gone() from error
                raise

    def _fill(self, pipe: "FtdiPipe", buffer: memoryview, timeout_s: float) -> int:
        start = now = time.monotonic()
        at = 0
        while True:
            got = min(len(self._rest), len(buffer) - at)
            buffer[at : at + got] = self._rest[:got]
            self._rest = self._rest[got:]
            at += got
            if at == len(buffer) or now - start >= (_GATHER_S if at else timeout_s) or self._closed.is_set():
                break
            self._rest = memoryview(pipe.read(max(pipe.latency_s, min(timeout_s, _GATHER_S))))
            now = time.monotonic()
        if at:
            self._last_byte = now
        elif now - self._last_byte > _SILENCE_S:
            raise TransportError(f"{self.name} {self.serial} gave nothing for {_SILENCE_S:g} s; its stream is started anew")
        return at

    def _gone(self) -> DeviceLost:
        return DeviceLost(f"{self.name} {self.serial} {'was closed' if self._closed.is_set() else 'is not attached'}")

    # --- loss and end ---

    def reconnect(self, timeout_s: float) -> None:
        try_until(timeout_s, lambda: self._reconnect_now(timeout_s))

    def _reconnect_now(self, limit_s: float) -> None:
        with self._reading:
            self._let_go()
            if self._closed.is_set():
                raise self._gone()
            devices = _generators()
            try:
                same = next((d for d in devices if d.serial == self.serial), None)
                other = next((d for d in devices if d.path == self._path and d.path), None)
                if same is None and other is not None:
                    raise SourceError(
                        f"where {self.serial} was there is now {other.serial}, another device; plug in {self.serial} again, "
                        f"or open {usb_uri(self.scheme, other)}"
                    )
                if same is None:
                    raise self._gone()
                try:
                    self._connect(same, limit_s)
                except SourceError as error:  # udev has not given permission yet, or it is not ready
                    raise DeviceLost(f"{self.serial} is attached, but: {error}") from error
                devices.remove(same)
            finally:
                close_all(devices)

    def _let_go(self) -> None:
        if self._generator is not None:
            try:
                self._generator.stop()  # it need not stream to nobody
            except SourceError:  # it is gone
                pass
            self._generator.pipe.close()
            self._generator = None

    def close(self) -> None:
        self._closed.set()
        with self._reading:
            self._let_go()

    # --- the doctor ---

    @classmethod
    def examine(cls, uri: SourceURI) -> list[Finding]:
        values = uri.parameters(cls.parameters)
        try:
            device = named_device(uri, _generators(), cls.looks_for)
        except SourceError as error:
            step = "connect the device; `lsusb -d 0403:` must list it"
            return [Finding("cable", "fail", str(error), step, isinstance(error, DeviceNotFound))]
        try:
            return list(_findings(device, values.get("unlisted", False)))
        finally:
            device.close()


def _findings(device: UsbDevice, unlisted: bool):
    """From the cable to what else has it, up to the first fail."""
    yield Finding("cable", "ok", f"{device} at {device.speed}")
    try:
        model = model_of(device.serial, unlisted)
    except SourceError as error:
        yield Finding("model", "fail", str(error), "use a generator that is meant as a source of random bits")
        return
    yield Finding("model", "ok", f"ComScire {model.name}, generation {model.generation}")
    tty, users = _tty_users(device)
    if users:
        text = f"{tty} of the kernel driver ftdi_sio is open in {in_words(users)}"
        yield Finding("other process", "fail", text, "close that first")
        return
    yield from usb_findings(device)


def _generators() -> list[UsbDevice]:
    """The FTDI devices with ComScire's serial numbers, whatever their model."""
    devices = find(IDS)
    close_all([d for d in devices if not d.serial.startswith(PREFIX)])
    return [d for d in devices if d.serial.startswith(PREFIX)]


def _tty_users(device: UsbDevice) -> tuple[str, list[tuple[int, str]]]:
    """(the tty that ftdi_sio made of it, processes that have that open)."""
    for port in ports(ids=IDS):
        if port.serial == device.serial:
            return port.device, holders(port.device)
    return "", []


def _take_from_kernel(device: UsbDevice) -> None:
    """Detaches ftdi_sio, which binds every FTDI chip, unless somebody reads through it."""
    tty, users = _tty_users(device)
    if users:
        raise SourceError(f"{device} is in use by {in_words(users)} as {tty}; close that first")
    device.detach_kernel_driver()


def _transfer(rate_bytes_per_s: float | None) -> int:
    """The power of two that holds 20 ms of the rate: so a transfer neither waits long nor hands over often."""
    if rate_bytes_per_s is None:
        return _LARGE_TRANSFER
    wanted = int(rate_bytes_per_s * _GATHER_S)
    return min(_LARGE_TRANSFER, max(_SMALLEST_TRANSFER, 1 << (wanted - 1).bit_length()))
