"""A QCicada on the wire: it answers its commands byte by byte on a pseudo-terminal, and breaks by request.

Written from the vendor's `cmdctrl_types.h` and qcicada 0.2.2, and from nothing of the driver's. Its bytes are a
function of (seed, mode, offset), and `sent` holds every random byte that went out on the wire, in order.
"""

import struct
import time
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

from .pty_device import PtyDevice

CAPACITY = 13_440  # what it makes ahead (Qbert0G's one-shot limit; `ready_bytes` in the README of qcicada)
BLOCK = 448
SHA, RAW_NOISE, RAW_SAMPLES = 0, 1, 2
HEALTHY, STARTING = 0x01, 0x03
GENERATE_ON_ERROR = 0x20
ACK, NACK = 0x11, 0x12
_PAYLOAD_BYTES = {0x04: 3, 0x08: 12, 0x51: 2, 0xF8: 2}  # of the commands that have one


def raw_key(key: ec.EllipticCurvePublicKey) -> bytes:
    numbers = key.public_numbers()
    return numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")


def sign(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    r, s = utils.decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


class QCicada(PtyDevice):
    """Faults, to be set at any time:

    flags           the health byte; anything but 1 stops the generation, unless configured otherwise
    flags_once      the health byte of the next answer to a status command only
    flags_at_start  the health byte from the next START command on, which is refused
    mute            takes commands and answers none
    allowance       how many bytes it will still make; None: as many as are asked for
    refuse          how many of the next START commands are answered by NACK
    garbage         bytes that go out before the next answer
    truncate        the next one-shot answer ends after so many bytes
    unplug_after    its cable comes off after so many more random bytes
    stuck_at        offset in `sent` from which all bytes are 0x00
    bias_at         offset in `sent` from which each bit is 1 with probability 1/8
    delay_s         wait before each piece of 256 random bytes
    bad_signature, replay_signature
    """

    def __init__(self, path: Path, serial="QC0000000217", hardware="CICADA-QRNG-1.1", firmware=(5, 14), seed=1,
                 post=SHA, tests=0x0F, streaming=False, starting_s=0.0):  # fmt: skip
        super().__init__(path)
        self.serial, self.hardware, self.firmware, self.seed = serial, hardware, firmware, seed
        self.config = [post, 45.5, tests, 4, 64, BLOCK, 2048]
        self.starting_s = starting_s
        self._certified = serial, hardware  # at the factory
        self.key, self.root = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        self.flags, self.flags_once, self.flags_at_start, self.allowance = HEALTHY, None, None, None
        self.mute, self.refuse, self.garbage, self.truncate, self.unplug_after = False, 0, b"", None, None
        self.stuck_at = self.bias_at = None
        self.delay_s = 0.0
        self.bad_signature = self.replay_signature = False
        self.sent = bytearray()
        self.commands: list[int] = []
        self.interrupted = 0  # streams that STOP has ended
        self.signed: list[tuple[bytes, bytes]] = []
        self.failures = [0, 0, 0]
        self._made = dict.fromkeys((SHA, RAW_NOISE, RAW_SAMPLES), 0)
        self._buffer = b""
        self._streaming, self._left_streaming = False, streaming
        self._command = b""

    def plug(self, serial: str | None = None) -> "QCicada":
        """Plugs it in (again); with another `serial` it is another device."""
        self.serial = serial or self.serial
        self.unplug_after, self._command, self._buffer = None, b"", b""
        self._streaming, self._left_streaming = self._left_streaming, False
        self._ready_at = time.monotonic() + self.starting_s
        return super().plug()

    def restart(self) -> None:
        """A brown-out: it starts anew as it left the factory, while its USB chip has noticed nothing."""
        self._buffer, self._streaming, self.config = b"", False, [SHA, *self.config[1:]]
        self._ready_at = time.monotonic() + self.starting_s

    # --- the generator ---

    def stream(self, post: int, at: int, n: int) -> bytes:
        """The bytes [at, at + n) of those that it makes in a mode; one count of Philox4x64 is 32 bytes."""
        first = at // 32
        philox = np.random.Philox(key=self.seed + (post << 64), counter=first)
        return philox.random_raw(4 * ((n + 63) // 32)).tobytes()[at - 32 * first :][:n]

    def _fill(self) -> None:
        """Makes ahead, if it is well, in the mode that is set now."""
        n = CAPACITY - len(self._buffer) if self._well else 0
        if self.allowance is not None:
            n = min(n, self.allowance)
            self.allowance -= n
        post = self.config[0]
        self._buffer += self.stream(post, self._made[post], n)
        self._made[post] += n

    def _take(self, n: int) -> bytes:
        """The next n bytes for the wire, or what there is, its physical faults included."""
        self._fill()
        out, self._buffer = np.frombuffer(self._buffer[:n], np.uint8).copy(), self._buffer[n:]
        at = len(self.sent)
        if self.stuck_at is not None:
            out[max(self.stuck_at - at, 0) :] = 0
        if self.bias_at is not None:
            biased = out[max(self.bias_at - at, 0) :]
            masks = np.random.default_rng(at).integers(0, 256, (2, len(biased)), np.uint8)
            biased &= masks[0] & masks[1]
        return out.tobytes()

    @property
    def _status(self) -> int:
        return STARTING if time.monotonic() < self._ready_at else self.flags

    @property
    def _well(self) -> bool:
        return self._status == HEALTHY or (self._status != STARTING and bool(self.config[2] & GENERATE_ON_ERROR))

    # --- the wire ---

    def serve(self) -> None:
        running = self._streaming and self._well and not self.mute
        self._command += self.receive(0.0 if running else 0.01)
        while self._command and len(self._command) > (n := _PAYLOAD_BYTES.get(self._command[0], 0)):
            code, payload, self._command = self._command[0], self._command[1 : n + 1], self._command[n + 1 :]
            self.commands.append(code)
            if not self.mute:
                before, self.garbage = self.garbage, b""
                self.send(before)
                self._execute(code, payload)
        if running and self._streaming:
            self._send_random(self._take(BLOCK))
            if not self.dtr:
                self.rest(0.005)  # it streams to nobody

    def _send_random(self, data: bytes) -> None:
        for at in range(0, len(data), 256):
            piece = data[at : at + 256]
            self.rest(self.delay_s)
            if self.unplug_after is not None:
                piece = piece[: self.unplug_after]
                self.unplug_after -= len(piece)
            self.sent += piece
            self.send(piece)
            if self.unplug_after == 0:
                self.rest(0.02)  # the bytes arrive, then the cable goes
                return self.pull()

    def _ack(self, flags: int | None = None) -> None:
        self._fill()
        self.send(struct.pack("<BBI", ACK, flags or self._status, len(self._buffer) if self._well else 0))

    def _execute(self, code: int, payload: bytes) -> None:
        if code == 0x05:
            self.interrupted += self._streaming
            self._streaming = False
            self._ack()
        elif self._streaming:
            self.send(bytes([NACK]))
        elif code == 0x01:
            once, self.flags_once = self.flags_once, None
            self._ack(once)
        elif code == 0x04:
            self._start(*struct.unpack("<BH", payload))
        elif code == 0x07:
            self.send(b"\x17" + struct.pack("<BfBBBHH", *self.config))
        elif code == 0x08:
            self._configure(list(struct.unpack("<BfBBBHH", payload)))
        elif code == 0x09:
            self.send(b"\x19" + struct.pack("<QIIIIHf", sum(self._made.values()), *self.failures, 100_696, 512, 45.5))
        elif code == 0x0A:
            self._buffer, self.failures, self.flags = b"", [0, 0, 0], HEALTHY
            self._ready_at = time.monotonic() + self.starting_s
            self._ack()
        elif code == 0x0B:
            major, minor = self.firmware
            strings = (s.encode().ljust(24, b"\0") for s in (self.serial, self.hardware))
            self.send(b"\x1b" + struct.pack("<II", 0x1000C, major << 16 | minor) + b"".join(strings))
        elif code in (0x51, 0xF7, 0xF9) and self.firmware >= (5, 13) and self._status == HEALTHY:
            self._attest(code, payload)
        else:
            self.send(bytes([NACK]))

    def _start(self, mode: int, n: int) -> None:
        self.flags, self.flags_at_start = self.flags_at_start or self.flags, None
        self._fill()
        possible = mode == 0 or (mode == 1 and 0 < n <= len(self._buffer))
        if self.refuse or not self._well or not possible:
            self.refuse = max(0, self.refuse - 1)
            self.send(bytes([NACK]))
            return
        self._ack()
        if mode == 0:
            self._streaming = True
            return
        data = self._take(n)
        if self.truncate is not None:
            data, self.truncate = data[: self.truncate], None
        self._send_random(data)

    def _configure(self, config: list) -> None:
        if config[5] == 0 or config[0] > RAW_SAMPLES:
            self.send(bytes([NACK]))
            return
        self.config = config  # what it has made in the other mode stays in its buffer
        self._ack()

    def _attest(self, code: int, payload: bytes) -> None:
        key = raw_key(self.key.public_key())
        if code == 0xF7:
            self.send(b"\xf9" + key)
        elif code == 0xF9:
            self.send(b"\xfb" + self._certificate(key))
        else:
            (n,) = struct.unpack("<H", payload)
            self._fill()
            if n > len(self._buffer):
                self.send(bytes([NACK]))
                return
            data = self._take(n)
            signed = (data, sign(self.key, data + b"!" if self.bad_signature else data))
            signed = self.signed[0] if self.replay_signature else signed
            self.signed.append(signed)
            self.send(b"\x52" + b"".join(signed))

    def _certificate(self, key: bytes) -> bytes:
        serial, hardware = self._certified
        major, minor = hardware.removeprefix("CICADA-QRNG-").split(".")
        return sign(self.root, struct.pack("<HBBI", 0, int(major), int(minor), int(serial.removeprefix("QC"))) + key)

    def root_pem(self) -> bytes:
        """The root's public key, as the vendor publishes it."""
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return self.root.public_key().public_bytes(serialization.Encoding.PEM, form)
