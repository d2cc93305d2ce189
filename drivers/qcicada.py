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

import threading
import time
from types import MappingProxyType

from ..errors import BadParameter, SourceError
from . import serial_port
from .contract import Attached, DeviceFault, DeviceLost, Driver, Finding, TransportError
from .named_port import port_uri
from .qcicada_finding import connect, examine, identify, named_ports, problem_of
from .qcicada_protocol import ONE_SHOT_BYTES, POST_PROCESSING, STOP, Config, Info, Link, Refused, Status
from .reconnection import try_until
from .serial_port import Port
from .uri import SourceURI, parse_flag

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

    def __init__(self, port: Port, link: Link, info: Info, values: dict[str, object]):
        """Use `open`. link: on the open port, whose device has said `info`."""
        self._port, self._link, self._info = port, link, info
        self.name = f"{info.hardware} on {port.device}"
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
        self._unchecked_bytes = 0  # of a stream, since the health flags were seen
        self._last_byte = self._last_look = 0.0
        self._attested: dict[str, str] = {}

    @classmethod
    def open(cls, uri: SourceURI) -> "QCicadaDriver":
        values = uri.parameters(cls.parameters)
        port, link, info = connect(uri, cls.looks_for)
        try:
            driver = cls(port, link, info, values)
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
        rate = cls.rate_bytes_per_s
        return [
            Attached(port_uri(cls.scheme, p), p.product, p.serial, cls.kind, rate, serial_port.state(p.device))
            for p in named_ports()
        ]

    # --- bringing the device to where bytes flow ---

    def _begin(self, patience_s: float, info: Info | None = None) -> bool:
        """From any state to just before fresh bytes; False while the device's own start-up test runs.

        What the device made before this moment is dropped, and so is what it made in another mode. info: what the
        device has just said, if it was asked.
        """
        link = self._link
        info = info or link.resynchronize()
        if info.serial != self.serial:
            raise SourceError(f"{info.serial} answers on {self._port.device}, where {self.serial} did; open it anew")
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
        self._in_step = True
        return True

    def _configure(self, config: Config) -> Config:
        """The configuration that is wanted, written where it differs; SourceError for one that hides failures."""
        wanted = config.with_post_processing(POST_PROCESSING[self._post])
        wanted = wanted.repaired() if self._repair else wanted
        problem = problem_of(wanted)
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
                "port": self._port.device,
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
        try:
            before, data = self._link.one_shot(min(want, status.ready_bytes))
        except Refused:
            self._judge(self._link.status())  # it may have failed a test since it was asked
            raise
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
        try_until(timeout_s, self._reconnect_now)

    def _reconnect_now(self) -> None:
        with self._lock:
            if self._closed.is_set():
                raise DeviceLost(f"{self.name} was closed")
            serial_port.close_port(self._link.port)
            failure: object = f"{self._port.device} is not there"
            for port in self._places():
                try:
                    self._link, info = identify(port.device, attempts=1)
                except SourceError as error:  # not there yet, not permitted yet, or another daemon looks at it first
                    failure = error
                    continue
                if info.serial != self.serial:
                    serial_port.close_port(self._link.port)
                    raise SourceError(f"{info.serial} answers on {port.device} in place of {self.serial}; open it anew")
                self._port, self.name = port, f"{info.hardware} on {port.device}"
                self._attestation_due, self._in_step = self._attest, False
                try:
                    if self._begin(0.2, info):
                        return
                    failure = "it is in its own start-up test"
                except DeviceFault:
                    return  # as at the opening
                except TransportError as error:
                    failure = error
                serial_port.close_port(self._link.port)
            raise DeviceLost(f"{self.serial} is not back: {failure}")

    def _places(self) -> list[Port]:
        """Where the device may be now: at its old path, or wherever its USB serial number has gone."""
        moved = [p for p in serial_port.ports() if self._port.serial and p.serial == self._port.serial]
        return [self._port, *(p for p in moved if p.device != self._port.device)]

    def close(self) -> None:
        self._closed.set()
        with self._lock:  # a read ends within a second or so
            port = self._link.port
            if port.is_open:
                try:
                    serial_port.write_all(port, bytes([STOP]), 0.1)  # it need not stream to nobody
                except TransportError:
                    pass
                serial_port.close_port(port)

    @classmethod
    def examine(cls, uri: SourceURI) -> list[Finding]:
        return examine(uri, uri.parameters(cls.parameters), cls.looks_for)
