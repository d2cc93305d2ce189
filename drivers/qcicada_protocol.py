"""The command protocol of Crypta Labs' generators (QCicada; Firefly speaks it too) on an open serial port.

One command byte with its payload, one response byte with its payload; all numbers little endian. Sources: the vendor's
C library QCC (`cmdctrl_types.h`, `qcc.c`, 2023) for everything but the commands from 0xF0 on, which are from
`amenti-labs/qcicada` 0.2.2 (Python and Rust). Neither was seen on a wire here.

The traps: in continuous mode the random bytes come bare, so any command but STOP is answered by a NACK byte in their
midst and must not be sent; STOP is answered behind the bytes that were under way; START one-shot is refused (NACK) for
zero bytes and for more bytes than are ready.
"""

import re
import struct
import time
from dataclasses import dataclass, replace

from . import serial_port
from .contract import TransportError

GET_STATUS, START, STOP, GET_CONFIG, SET_CONFIG, GET_STATISTICS, RESET, GET_INFO = 1, 4, 5, 7, 8, 9, 10, 11
SIGNED_READ, GET_PUBLIC_KEY, GET_CERTIFICATE = 0x51, 0xF7, 0xF9
ACK, NACK = 0x11, 0x12
CONTINUOUS, ONE_SHOT = 0, 1
# Command -> (response byte, bytes of its payload). A signed read's bytes and signature follow its bare response byte.
RESPONSES = {
    GET_STATUS: (ACK, 5), START: (ACK, 5), STOP: (ACK, 5), SET_CONFIG: (ACK, 5), RESET: (ACK, 5),
    GET_CONFIG: (0x17, 12), GET_STATISTICS: (0x19, 30), GET_INFO: (0x1B, 56),
    SIGNED_READ: (0x52, 0), GET_PUBLIC_KEY: (0xF9, 64), GET_CERTIFICATE: (0xFB, 64),
}  # fmt: skip
BAUDRATE = 1_000_000
KEY_BYTES = SIGNATURE_BYTES = 64  # x and y of a P-256 point; r and s of an ECDSA signature
# The protocol allows 65,535; larger reads than this were seen to time out on USB (qcicada 0.2.1, change log).
ONE_SHOT_BYTES = 8192
POST_PROCESSING = {"sha": 0, "raw-noise": 1, "raw-samples": 2}

ANSWER_S = 0.5  # the vendor's default for a command
# How long the line must be silent behind what looks like the answer to STOP: an FTDI chip holds bytes back for 16 ms.
QUIET_S = 0.04
STOPPING_S = 2.0


class Refused(TransportError):
    """The device answered NACK: it understood nothing, or will not do it now."""


@dataclass(frozen=True)
class Status:
    """The five bytes behind every ACK. flags: the byte as sent; ready_bytes: what a one-shot read may ask for."""

    flags: int
    ready_bytes: int

    HEALTHY = 0x01
    NAMES = (
        "not initialized", "start-up test in progress", "supply voltage low", "supply voltage high",
        "supply voltage undefined", "bit count test failed", "repetition count test failed",
        "adaptive proportion test failed",
    )  # fmt: skip

    @classmethod
    def parse(cls, payload: bytes) -> "Status":
        return cls(*struct.unpack("<BI", payload))

    @property
    def healthy(self) -> bool:
        return self.flags == self.HEALTHY

    @property
    def starting(self) -> bool:
        """Its own start-up test runs, or it has not come that far yet; nothing has failed."""
        return self.flags in (0x00, 0x02, 0x03)

    def __str__(self) -> str:
        wrong = self.flags ^ self.HEALTHY
        return ", ".join(name for bit, name in enumerate(self.NAMES) if wrong >> bit & 1) or "ok"


@dataclass(frozen=True)
class Config:
    """The device's configuration, 12 bytes. tests: bits 0-5 of the flag byte, as the constants below name them."""

    post_processing: int
    initial_level: float
    flags: int
    lsbits: int
    hash_input_bytes: int
    block_bytes: int
    calibration_target: int

    STARTUP_TEST, AUTO_CALIBRATION, REPETITION_COUNT, ADAPTIVE_PROPORTION, BIT_COUNT, GENERATE_ON_ERROR = (
        1 << bit for bit in range(6)
    )
    NEEDED = STARTUP_TEST | REPETITION_COUNT | ADAPTIVE_PROPORTION
    _FORMAT = "<BfBBBHH"

    @classmethod
    def parse(cls, payload: bytes) -> "Config":
        return cls(*struct.unpack(cls._FORMAT, payload))

    def pack(self) -> bytes:
        return struct.pack(
            self._FORMAT, self.post_processing, self.initial_level, self.flags, self.lsbits, self.hash_input_bytes,
            self.block_bytes, self.calibration_target,
        )  # fmt: skip

    @property
    def tests_off(self) -> list[str]:
        """The tests of the device that are switched off, of those that it needs."""
        names = {
            self.STARTUP_TEST: "start-up", self.REPETITION_COUNT: "repetition count",
            self.ADAPTIVE_PROPORTION: "adaptive proportion",
        }  # fmt: skip
        return [name for bit, name in names.items() if not self.flags & bit]

    def with_post_processing(self, post_processing: int) -> "Config":
        return replace(self, post_processing=post_processing)

    def repaired(self) -> "Config":
        """With its tests on, and silent when one fails."""
        return replace(self, flags=(self.flags | self.NEEDED) & ~self.GENERATE_ON_ERROR)


@dataclass(frozen=True)
class Statistics:
    """Counts since the device was reset. speed: the device's own figure; its unit is not documented (bit/s fits)."""

    generated_bytes: int
    repetition_count_failures: int
    adaptive_proportion_failures: int
    bit_count_failures: int
    speed: int
    sensor_average: int
    led_level: float

    @classmethod
    def parse(cls, payload: bytes) -> "Statistics":
        return cls(*struct.unpack("<QIIIIHf", payload))


@dataclass(frozen=True)
class Info:
    """Who the device says it is. Versions: major in the high 16 bits, minor in the low ones."""

    core_version: int
    firmware_version: int
    serial: str
    hardware: str

    @classmethod
    def parse(cls, payload: bytes) -> "Info":
        core, firmware, *strings = struct.unpack("<II24s24s", payload)
        serial, hardware = (s.partition(b"\0")[0].decode("ascii", "replace") for s in strings)
        # The serial number names a state file, and 57 stray bytes must not pass for an answer.
        if not (re.fullmatch(r"[A-Za-z0-9_-]{1,24}", serial) and re.fullmatch(r"[ -~]{1,24}", hardware)):
            raise TransportError("its identification holds no readable serial number and hardware name")
        return cls(core, firmware, serial, hardware)

    @staticmethod
    def version(number: int) -> str:
        return f"{number >> 16}.{number & 0xFFFF}"


class Link:
    """The protocol on one open port. Its methods raise TransportError or DeviceLost as `serial_port` does, and Refused.

    After any error but Refused the two sides may be out of step; `resynchronize` brings them together.
    """

    def __init__(self, port: "serial_port.serial.Serial"):
        self.port = port

    def command(self, code: int, payload: bytes = b"") -> bytes:
        """Sends a command and returns its response's payload."""
        serial_port.write_all(self.port, bytes([code]) + payload, ANSWER_S)
        expected, n = RESPONSES[code]
        (response,) = serial_port.read_exact(self.port, 1, ANSWER_S)
        if response == NACK:
            raise Refused(f"{self.port.port}: the device refused command {code:#04x}")
        if response != expected:
            raise TransportError(f"{self.port.port}: command {code:#04x} was answered by {response:#04x}")
        return serial_port.read_exact(self.port, n, ANSWER_S) if n else b""

    def resynchronize(self) -> Info:
        """Stops whatever the device is sending, drops it, and returns the answer to a fresh question.

        Random bytes can look like the answer to STOP, or the line be slow: then it raises, and may be called again.
        """
        serial_port.write_all(self.port, bytes([STOP]), ANSWER_S)
        buffer, last = bytearray(65536), b""
        deadline = time.monotonic() + STOPPING_S
        while time.monotonic() < deadline:
            answered = last == bytes([NACK]) or (len(last) == 6 and last[0] == ACK)
            got = serial_port.read_some(self.port, memoryview(buffer), QUIET_S if answered else ANSWER_S)
            if got == 0:
                return self.info()
            last = (last + buffer[:got])[-6:]
        raise TransportError(f"{self.port.port}: bytes still came {STOPPING_S:g} s after the device was told to stop")

    def status(self) -> Status:
        return Status.parse(self.command(GET_STATUS))

    def info(self) -> Info:
        return Info.parse(self.command(GET_INFO))

    def config(self) -> Config:
        return Config.parse(self.command(GET_CONFIG))

    def set_config(self, config: Config) -> Status:
        return Status.parse(self.command(SET_CONFIG, config.pack()))

    def statistics(self) -> Statistics:
        return Statistics.parse(self.command(GET_STATISTICS))

    def reset(self) -> Status:
        """Restarts the generation with the device's own start-up test, and its statistics."""
        return Status.parse(self.command(RESET))

    def start_continuous(self) -> Status:
        return Status.parse(self.command(START, struct.pack("<BH", CONTINUOUS, 0)))

    def one_shot(self, n: int) -> tuple[Status, bytes]:
        """n random bytes, at most `ONE_SHOT_BYTES` and at most what is ready, and the status that came before them."""
        status = Status.parse(self.command(START, struct.pack("<BH", ONE_SHOT, n)))
        return status, serial_port.read_exact(self.port, n, self.read_s(n))

    def signed_read(self, n: int) -> tuple[bytes, bytes]:
        """(n random bytes, the device's signature of them). Firmware from 5.13 on."""
        self.command(SIGNED_READ, struct.pack("<H", n))
        both = serial_port.read_exact(self.port, n + SIGNATURE_BYTES, self.read_s(n))
        return both[:n], both[n:]

    def public_key(self) -> bytes:
        return self.command(GET_PUBLIC_KEY)

    def certificate(self) -> bytes:
        return self.command(GET_CERTIFICATE)

    @staticmethod
    def read_s(n: int) -> float:
        """How long n bytes may take (qcicada 0.2.2): 1 Mbaud needs a tenth of the second term."""
        return 0.5 + 0.0001 * n

    def discard(self, n: int) -> None:
        """Reads n bytes that are ready and drops them: the device made them before they were asked for."""
        end = time.monotonic() + 5.0
        while n > 0 and time.monotonic() < end:
            take = min(n, ONE_SHOT_BYTES)
            self.one_shot(take)
            n -= take
