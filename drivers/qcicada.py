"""`qcicada:/dev/ttyUSB0`, `qcicada:SERIAL` or `qcicada:`: Crypta Labs' QCicada on its USB serial port.

Its randomness is photonic shot noise of an LED on a sensor (the vendor's word; kind `quantum`), at about 12.5 kB/s
(qcicada 0.2.2, README and `device.rs`). Nothing here was seen on hardware. Parameters:

    post=sha          the device's SHA-256 output (default), raw-noise or raw-samples: written to its configuration
    mode=oneshot      every read is asked for and comes with the device's health flags (default); continuous streams,
                      and is interrupted every 64 KiB, or after a second of silence, to ask for the flags
    bits=msb          which bit of a byte was made first: msb (default) or lsb; not documented by the vendor
    attest=1          a signed read before the stream begins; root=FILE names the vendor's key for its certificate
    repair=1          switches the device's own tests on and `generate on error` off, where they are not so
    reset=1           restarts the device's generation, start-up test and statistics at opening

The firmware can be set to go on delivering after its tests have failed ("generate on error"): such a device is refused.
"""

import os
import threading
import time
from types import MappingProxyType

from ..errors import BadParameter, SourceError
from . import serial_port
from .contract import Attached, DeviceFault, DeviceLost, Driver, Finding, TransportError
from .qcicada_protocol import BAUDRATE, ONE_SHOT_BYTES, POST_PROCESSING, Config, Info, Link, Statistics, Status
from .uri import SourceURI, parse_flag

# What the USB strings of a device are expected to say. The FTDI chip's strings of a real one are not documented; one
# that says nothing of the kind must be named by its path, for bytes sent to a stranger's port may do harm.
_WORDS = ("cicada", "crypta labs")
STARTING_S = 10.0  # for the device's own start-up test, whose length is not documented
ENOUGH_BYTES = 2048  # a read waits for so many, or for its time-out: 0.16 s at the usual rate
CHECK_BYTES = 65536
SILENCE_S = 1.0
LOOK_S = 2.0  # one-shot reads see the health flags each time, and configuration and statistics after so long


def _one_of(*names: str):
    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return text

    return parse


class QCicadaDriver(Driver):
    """See the module."""

    scheme = "qcicada"
    parameters = {
        "post": _one_of(*POST_PROCESSING), "mode": _one_of("oneshot", "continuous"), "bits": _one_of("msb", "lsb"),
        "attest": parse_flag, "root": str, "repair": parse_flag, "reset": parse_flag,
    }  # fmt: skip
    looks_for = "a USB serial port whose strings name QCicada or Crypta Labs (another is named by qcicada:/dev/ttyUSB0)"
    kind = "quantum"
    chunk_bytes = ONE_SHOT_BYTES
    rate_bytes_per_s = 12_500.0

    def __init__(self, device: str, link: Link, info: Info, values: dict[str, object]):
        """Use `open`. link: an open port whose device has said `info`."""
        self._device, self._link, self._info = device, link, info
        self._usb_serial = _usb_serial(device)
        self.name = f"{info.hardware} on {device}"
        self.serial = info.serial
        self.min_entropy = self.claim(values)
        self._post = values.get("post", "sha")
        self.conditioned = self._post == "sha"
        self.bit_order = f"{values.get('bits', 'msb')}_first"
        self._continuous = values.get("mode") == "continuous"
        self._repair = values.get("repair", False)
        self._attest, self._root = values.get("attest", False), None
        self._attestation_due = self._attest  # once a connection
        if self._attest:
            from . import qcicada_attestation  # its extra is needed for nothing else

            self._attestation = qcicada_attestation
            if "root" in values:
                self._root = qcicada_attestation.load_root(values["root"])
        elif "root" in values:
            raise BadParameter("root= is for the certificate of an attestation; give attest=1 with it")
        self._lock = threading.Lock()  # whoever uses the port
        self._closed = threading.Event()
        self._in_step = False  # the device is where the next read expects it
        self._failures = 0  # to bring it there
        self._unchecked_bytes = 0  # of a stream, since the health flags were seen
        self._last_byte = self._last_look = 0.0
        self._attested: dict[str, str] = {}

    @classmethod
    def open(cls, uri: SourceURI) -> "QCicadaDriver":
        values = uri.parameters(cls.parameters)
        device, link, info = _connect(uri.rest)
        try:
            driver = cls(device, link, info, values)
            if values.get("reset"):
                link.reset()
            try:
                if not driver._begin(STARTING_S, info):
                    raise SourceError(f"{driver.name} is still starting (its own start-up test) after {STARTING_S:g} s")
            except DeviceFault:
                pass  # the first read raises it again, as the health alarm that it is
        except BaseException:
            serial_port.close_port(link.port)
            raise
        return driver

    @classmethod
    def attached(cls) -> list[Attached]:
        return [
            Attached(f"qcicada:{p.device}", p.product or "QCicada", p.serial, cls.kind, cls.rate_bytes_per_s,
                     serial_port.state(p.device))
            for p in _named_ports()
        ]  # fmt: skip

    # --- bringing the device to where bytes flow ---

    def _begin(self, patience_s: float, info: Info | None = None) -> bool:
        """From any state to just before fresh bytes; False while the device's own start-up test runs.

        What the device made before this moment is dropped, and so is what it made in another mode. info: what the
        device has just said, if it was asked.
        """
        link = self._link
        info = info or link.resynchronize(self._failures)
        if info.serial != self.serial:
            raise SourceError(f"{info.serial} answers on {self._device}, where {self.serial} did; open it anew")
        config = self._configure(link.config())
        deadline = time.monotonic() + patience_s
        signed_bytes = self._attestation.READ_BYTES if self._attestation_due else 0
        while (status := link.status()).starting or (status.healthy and status.ready_bytes < signed_bytes):
            if time.monotonic() > deadline or self._closed.wait(0.05):
                return False
        self._judge(status)
        if self._attestation_due:
            self._attested = self._attestation.attest(link, info, self._root).details()
            self._attestation_due = False
        link.discard(link.status().ready_bytes)
        self._info, self._config = info, config
        self._look()
        if self._continuous:
            link.start_continuous()
        self._unchecked_bytes, self._last_byte = 0, time.monotonic()
        self._in_step, self._failures = True, 0
        return True

    def _configure(self, config: Config) -> Config:
        """The configuration that is wanted, written where it differs; SourceError for one that hides failures."""
        wanted = config.with_post_processing(POST_PROCESSING[self._post])
        wanted = wanted.repaired() if self._repair else wanted
        problem = _problem(wanted)
        if problem:
            raise SourceError(f"{self.name}: {problem}; add repair=1 to change the device's configuration")
        if wanted != config:
            self._link.set_config(wanted)
            if self._link.config() != wanted:
                raise SourceError(f"{self.name} did not take the configuration for post={self._post}")
        return wanted

    def _judge(self, status: Status) -> None:
        """Nothing if the device is well, else the error that says what is wrong."""
        if status.healthy:
            return
        self._in_step = False
        if status.starting:
            raise TransportError(f"{self.name} has restarted by itself; what it held is dropped")
        raise DeviceFault(f"{self.name}: {status}", status.flags, Status.HEALTHY)

    def _look(self) -> None:
        """Asks a device that is not streaming for its health, configuration and statistics, and judges them."""
        status, config, statistics = self._link.status(), self._link.config(), self._link.statistics()
        self._judge(status)
        if config != self._config:  # it has restarted unseen, or somebody else has written it
            raise TransportError(f"{self.name} has lost its configuration; what it made since is dropped")
        # A failure that the device counted and recovered from is shown, not an alarm: the false-alarm rate of its
        # tests is not documented, and it hands out nothing from a failed block.
        self.details = MappingProxyType(
            {
                "port": self._device,
                "hardware": self._info.hardware,
                "firmware": Info.version(self._info.firmware_version),
                "mode": "continuous" if self._continuous else "oneshot",
                "post-processing": self._post,
                "device tests off": ", ".join(config.tests_off) or "none",
                "device health": str(status),
                "generated bytes": f"{statistics.generated_bytes}",
                "device test failures": f"{statistics.repetition_count_failures} repetition count, "
                f"{statistics.adaptive_proportion_failures} adaptive proportion, "
                f"{statistics.bit_count_failures} bit count",
                "speed as the device states it": f"{statistics.speed}",
                **self._attested,
            }
        )
        self._last_look = time.monotonic()

    # --- reading ---

    def readinto(self, buffer: memoryview, timeout_s: float) -> int:
        with self._lock:
            if self._closed.is_set():
                raise DeviceLost(f"{self.name} was closed")
            try:
                if not self._in_step and not self._begin(timeout_s):
                    return 0
                return (self._read_stream if self._continuous else self._read_one_shot)(buffer, timeout_s)
            except TransportError:
                self._in_step = False
                self._failures += 1
                raise

    def _read_one_shot(self, buffer: memoryview, timeout_s: float) -> int:
        if time.monotonic() - self._last_look > LOOK_S:
            self._look()
        want = min(len(buffer), ONE_SHOT_BYTES)
        deadline = time.monotonic() + timeout_s
        while True:
            status = self._link.status()
            self._judge(status)
            late = time.monotonic() >= deadline
            if status.ready_bytes >= min(want, ENOUGH_BYTES) or (late and status.ready_bytes):
                break
            if late or self._closed.wait(0.01):
                return 0
        before, data = self._link.one_shot(min(want, status.ready_bytes))
        self._judge(before)
        buffer[: len(data)] = data
        return len(data)

    def _read_stream(self, buffer: memoryview, timeout_s: float) -> int:
        silent = time.monotonic() - self._last_byte > SILENCE_S
        if silent or self._unchecked_bytes >= CHECK_BYTES:
            self._check_stream()
        got = serial_port.read_some(self._link.port, buffer, min(timeout_s, SILENCE_S))
        if got:
            self._unchecked_bytes += got
            self._last_byte = time.monotonic()
        return got

    def _check_stream(self) -> None:
        """Interrupts the stream for the health flags; the bytes that are under way meanwhile are dropped."""
        self._link.resynchronize()
        self._look()
        self._link.start_continuous()
        self._unchecked_bytes, self._last_byte = 0, time.monotonic()

    # --- life ---

    def reconnect(self, timeout_s: float) -> None:
        with self._lock:
            if self._closed.is_set():
                raise DeviceLost(f"{self.name} was closed")
            serial_port.close_port(self._link.port)
            failure = f"{self._device} is not there"
            for device in self._places():
                try:
                    self._link, info = _identify(device, attempts=1)
                except SourceError as error:  # not there yet, not permitted yet, or another daemon looks at it first
                    failure = str(error)
                    continue
                if info.serial != self.serial:
                    serial_port.close_port(self._link.port)
                    raise SourceError(f"{info.serial} answers on {device} in place of {self.serial}; open it anew")
                self._device, self._info, self.name = device, info, f"{info.hardware} on {device}"
                self._attestation_due = self._attest
                try:
                    if self._begin(timeout_s, info):
                        return
                    failure = "it is in its own start-up test"
                except TransportError as error:
                    failure = str(error)
            raise DeviceLost(f"{self.serial} is not back: {failure}")

    def _places(self) -> list[str]:
        """Where the device may be now: at its old path, or wherever its USB serial number has gone."""
        moved = [p.device for p in serial_port.ports() if self._usb_serial and p.serial == self._usb_serial]
        return [self._device, *(d for d in moved if d != self._device)]

    def close(self) -> None:
        self._closed.set()
        with self._lock:  # a read ends within a second or so
            port = self._link.port
            if port.is_open:
                try:
                    serial_port.write_all(port, b"\x05", 0.1)  # STOP: it need not stream to nobody
                except TransportError:
                    pass
                serial_port.close_port(port)

    @classmethod
    def examine(cls, uri: SourceURI) -> list[Finding]:
        values = uri.parameters(cls.parameters)
        try:
            devices = _candidates(uri.rest)
        except SourceError as error:
            return [Finding("device", "fail", str(error), "check the cable, or name the port: qcicada:/dev/ttyUSB0")]
        findings = serial_port.examine_port(devices[0])
        if findings[-1].verdict == "fail":
            return findings
        try:
            device, link, info = _connect(uri.rest)
        except SourceError as error:
            return [*findings, Finding("answer", "fail", str(error), "check that this is the port of a QCicada")]
        try:
            findings += _examine_device(info, link.config(), link.status(), link.statistics(), values, device)
        except TransportError as error:
            findings.append(Finding("answer", "fail", str(error), "unplug it and plug it in again"))
        finally:
            serial_port.close_port(link.port)
        return findings


def _examine_device(
    info: Info, config: Config, status: Status, statistics: Statistics, values: dict[str, object], device: str
) -> list[Finding]:
    firmware = f"{info.hardware}, serial {info.serial}, firmware {Info.version(info.firmware_version)} on {device}"
    findings = [Finding("firmware", "ok", firmware)]
    post = values.get("post", "sha")
    wanted = config.with_post_processing(POST_PROCESSING[post])
    problem = _problem(wanted)
    if problem and not values.get("repair"):
        return [*findings, Finding("configuration", "fail", problem, "add repair=1 to the URI")]
    findings.append(Finding("configuration", "ok", "its own tests are on, and it falls silent when one fails"))
    if wanted != config:
        findings.append(Finding("mode", "note", f"its post-processing will be set to {post}"))
    if post == "sha":
        findings.append(
            Finding("mode", "note", "its output is hashed: tests on this side see total failure only",
                    "post=raw-noise gives what was not hashed")
        )  # fmt: skip
    failures = (
        statistics.repetition_count_failures + statistics.adaptive_proportion_failures + statistics.bit_count_failures
    )
    if failures:
        findings.append(Finding("statistics", "note", f"its tests have failed {failures} times since it was reset"))
    healthy = status.healthy
    findings.append(
        Finding("device health", "ok" if healthy else "fail", str(status), "" if healthy else "try reset=1 in the URI")
    )
    return findings


def _problem(config: Config) -> str:
    """What makes a configuration unfit, in words; "" for nothing."""
    if config.flags & Config.GENERATE_ON_ERROR:
        return "it is set to go on delivering when its tests fail (generate on error)"
    if config.post_processing == POST_PROCESSING["sha"] and config.tests_off:
        return f"its {', '.join(config.tests_off)} test is off, and nobody else sees what goes into its hash"
    return ""


# --- finding it ---


def _named_ports() -> list[serial_port.Port]:
    return sorted({port for word in _WORDS for port in serial_port.ports(text=word)})


def _usb_serial(device: str) -> str:
    real = os.path.realpath(device)
    return next((p.serial for p in serial_port.ports() if p.device == real), "")


def _candidates(rest: str) -> list[str]:
    """The ports that a URI's rest may mean: a path, a serial number (of the device or of its USB chip), or nothing."""
    if rest.startswith("/"):
        return [rest]
    named = _named_ports()
    exact = [p.device for p in serial_port.ports() if rest and p.serial == rest]
    found = exact or [p.device for p in named]
    if not found:
        others = [f"{p.device} ({p.product})" for p in serial_port.ports() if p.vid is not None]
        there = f"; USB serial ports present: {', '.join(others)}" if others else "; no USB serial port is present"
        raise SourceError(f"no port names a QCicada{there}. If one of them is it, name it: qcicada:/dev/ttyUSB0")
    if not rest and len(found) > 1:
        raise SourceError(f"several ports name a QCicada: {', '.join(found)}; name one of them")
    return found


def _connect(rest: str) -> tuple[str, Link, Info]:
    """Opens the device that a URI's rest names."""
    seen = []
    for device in _candidates(rest):
        try:
            link, info = _identify(device)
        except SourceError as error:
            seen.append(str(error))
            continue
        if rest.startswith("/") or rest in ("", info.serial, _usb_serial(device)):
            return device, link, info
        serial_port.close_port(link.port)
        seen.append(f"{info.serial} is on {device}")
    raise SourceError(f"qcicada:{rest} cannot be opened: {'; '.join(seen)}")


def _identify(device: str, attempts: int = 3) -> tuple[Link, Info]:
    """Opens a port and asks who is there; SourceError when it is no QCicada."""
    link = Link(serial_port.open_port(device, BAUDRATE, 1.0))
    for attempt in range(attempts):
        try:
            return link, link.resynchronize(attempt)
        except DeviceLost as error:
            failure = error
            break
        except TransportError as error:
            failure = error
    serial_port.close_port(link.port)
    raise SourceError(f"{device} does not answer as a QCicada does: {failure}") from failure
