"""A QCicada on the wire: a pseudo-terminal and a thread that answers its commands byte by byte, faults by request.

Written from `facts/devices.md` 5.1 and the vendor's `cmdctrl_types.h`, and from nothing of the driver's. Its bytes are a
function of (seed, mode, offset), and `sent` holds every random byte that went out on the wire, in order.
"""

import os
import pty
import select
import struct
import threading
import time
import tty
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

CAPACITY = 13_440  # what it makes ahead (Qbert0G's one-shot limit; `ready_bytes` in the README of qcicada)
BLOCK = 448
SHA, RAW_NOISE, RAW_SAMPLES = 0, 1, 2
HEALTHY = 0x01


def raw_key(key: ec.EllipticCurvePublicKey) -> bytes:
    numbers = key.public_numbers()
    return numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")


def sign(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    r, s = utils.decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


class QCicada:
    """Plugged in when made; `path` stays its name whatever pseudo-terminal is behind it. Use in a `with`.

    Faults, to be set at any time:
        flags           the health byte; anything but 1 stops the generation, unless configured otherwise
        flags_once      the health byte of the next answer to a status command only
        mute            takes commands and answers none
        allowance       how many bytes it will still make; None: as many as are asked for
        refuse          how many of the next START commands are answered by NACK
        garbage         bytes that go out before the next answer
        truncate        the next one-shot answer ends after so many bytes
        unplug_after    it is gone after so many more random bytes
        stuck_at        offset in `sent` from which all bytes are 0x00
        bias_at         offset in `sent` from which each bit is 1 with probability 1/8
        delay_s         wait before each piece of 256 random bytes
        bad_signature, replay_signature
    """

    def __init__(self, path: Path, serial="QC0000000217", hardware="CICADA-QRNG-1.1", firmware=(5, 14), seed=1,
                 post=SHA, tests=0x0F, streaming=False, starting_s=0.0):  # fmt: skip
        self.path = str(path)
        self.serial, self.hardware, self.firmware, self.seed = serial, hardware, firmware, seed
        self.config = [post, 45.5, tests, 4, 64, BLOCK, 2048]
        self.starting_s = starting_s
        self._certified = serial, hardware  # at the factory
        self.key, self.root = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        self.flags, self.flags_once, self.allowance = HEALTHY, None, None
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
        self._streaming = streaming
        self._thread = None
        self.plug()

    # --- the cable ---

    def plug(self, serial: str | None = None) -> None:
        """Plugs it in (again); with another `serial` it is another device."""
        self.serial = serial or self.serial
        self._master, slave = pty.openpty()
        tty.setraw(slave)
        Path(self.path).unlink(missing_ok=True)
        os.symlink(os.ttyname(slave), self.path)
        os.close(slave)
        os.set_blocking(self._master, False)
        self._out = threading.Event()
        self.unplug_after = None
        self._ready_at = time.monotonic() + self.starting_s
        self._thread = threading.Thread(target=self._serve, args=(self._master, self._out), daemon=True)
        self._thread.start()

    def unplug(self) -> None:
        """Pulls the cable out."""
        self._out.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def restart(self) -> None:
        """A brown-out: it starts anew as it left the factory, while its USB chip has noticed nothing."""
        self._buffer, self._streaming, self.config = b"", False, [SHA, *self.config[1:]]
        self._ready_at = time.monotonic() + self.starting_s

    def __enter__(self) -> "QCicada":
        return self

    def __exit__(self, *_) -> None:
        self.unplug()

    # --- the generator ---

    def stream(self, post: int, at: int, n: int) -> bytes:
        """The bytes [at, at + n) of those that it makes in a mode; one count of Philox4x64 is 32 bytes."""
        first = at // 32
        philox = np.random.Philox(key=self.seed + (post << 64), counter=first)
        return philox.random_raw(4 * ((n + 63) // 32)).tobytes()[at - 32 * first :][:n]

    def _make(self, n: int) -> bytes:
        post = self.config[0]
        at, self._made[post] = self._made[post], self._made[post] + n
        return self.stream(post, at, n)

    def _fill(self) -> None:
        if self._well:
            n = CAPACITY - len(self._buffer)
            if self.allowance is not None:
                n = min(n, self.allowance)
                self.allowance -= n
            self._buffer += self._make(n)

    def _take(self, n: int) -> bytes:
        """The next n bytes for the wire, its physical faults included."""
        self._fill()
        n = min(n, len(self._buffer))
        out, self._buffer = np.frombuffer(self._buffer[:n], np.uint8).copy(), self._buffer[n:]
        at = len(self.sent)
        if self.stuck_at is not None:
            out[max(self.stuck_at - at, 0) :] = 0
        if self.bias_at is not None:
            mask = np.random.default_rng(at)
            for _ in range(2):
                out[max(self.bias_at - at, 0) :] &= mask.integers(0, 256, n, np.uint8)[max(self.bias_at - at, 0) :]
        return out.tobytes()

    @property
    def _status(self) -> int:
        return 0x03 if time.monotonic() < self._ready_at else self.flags

    @property
    def _well(self) -> bool:
        return self._status == HEALTHY or (self._status != 0x03 and bool(self.config[2] & 0x20))

    # --- the wire ---

    def _serve(self, master: int, out: threading.Event) -> None:
        poll = select.poll()
        poll.register(master, select.POLLIN)
        command = b""
        while not out.is_set():
            events = dict(poll.poll(0 if self._streaming else 5))
            if events.get(master, 0) & select.POLLIN:
                try:
                    command = self._answer(command + os.read(master, 64))
                except OSError:
                    pass
            elif events.get(master, 0) & select.POLLHUP:  # nobody has it open
                command = b""
                time.sleep(0.002)
            elif self._streaming and self._well and not self.mute:
                self._send_random(self._take(BLOCK))
        os.close(master)
        Path(self.path).unlink(missing_ok=True)

    def _send(self, data: bytes) -> None:
        while data and not self._out.is_set():
            try:
                data = data[os.write(self._master, data) :]
            except BlockingIOError:  # the reader is slow
                time.sleep(0.001)
            except OSError:  # nobody has it open
                return

    def _send_random(self, data: bytes) -> None:
        for at in range(0, len(data), 256):
            piece = data[at : at + 256]
            if self.delay_s:
                self._out.wait(self.delay_s)
            if self.unplug_after is not None:
                piece = piece[: self.unplug_after]
                self.unplug_after -= len(piece)
            self.sent += piece
            self._send(piece)
            if self.unplug_after == 0:
                time.sleep(0.02)  # the bytes arrive, then the cable goes
                self.unplug()
            if self._out.is_set():
                return

    def _answer(self, command: bytes) -> bytes:
        """Answers the commands at the front; returns what is left of an incomplete one."""
        lengths = {0x04: 3, 0x08: 12, 0x51: 2, 0xF8: 2}
        while command and len(command) > (n := lengths.get(command[0], 0)):
            code, payload, command = command[0], command[1 : n + 1], command[n + 1 :]
            self.commands.append(code)
            if not self.mute:
                before, self.garbage = self.garbage, b""
                self._send(before)
                self._execute(code, payload)
        return command

    def _ack(self, flags: int | None = None) -> None:
        self._fill()
        self._send(struct.pack("<BBI", 0x11, flags or self._status, len(self._buffer) if self._well else 0))

    def _execute(self, code: int, payload: bytes) -> None:
        if code == 0x05:
            self.interrupted += self._streaming
            self._streaming = False
            self._ack()
        elif self._streaming:
            self._send(b"\x12")
        elif code == 0x01:
            once, self.flags_once = self.flags_once, None
            self._ack(once)
        elif code == 0x04:
            self._start(*struct.unpack("<BH", payload))
        elif code == 0x07:
            self._send(b"\x17" + struct.pack("<BfBBBHH", *self.config))
        elif code == 0x08:
            self._set(list(struct.unpack("<BfBBBHH", payload)))
        elif code == 0x09:
            self._send(b"\x19" + struct.pack("<QIIIIHf", sum(self._made.values()), *self.failures, 100_696, 512, 45.5))
        elif code == 0x0A:
            self._buffer, self.failures, self.flags = b"", [0, 0, 0], HEALTHY
            self._ready_at = time.monotonic() + self.starting_s
            self._ack()
        elif code == 0x0B:
            major, minor = self.firmware
            strings = (s.encode().ljust(24, b"\0") for s in (self.serial, self.hardware))
            self._send(b"\x1b" + struct.pack("<II", 0x1000C, major << 16 | minor) + b"".join(strings))
        elif code in (0x51, 0xF7, 0xF9) and self.firmware >= (5, 13) and self._status == HEALTHY:
            self._attest(code, payload)
        else:
            self._send(b"\x12")

    def _start(self, mode: int, n: int) -> None:
        self._fill()
        possible = mode == 0 or (mode == 1 and 0 < n <= len(self._buffer))
        if self.refuse or not self._well or not possible:
            self.refuse = max(0, self.refuse - 1)
            self._send(b"\x12")
            return
        self._ack()
        if mode == 0:
            self._streaming = True
            return
        data = self._take(n)
        if self.truncate is not None:
            data, self.truncate = data[: self.truncate], None
        self._send_random(data)

    def _set(self, config: list) -> None:
        if config[5] == 0 or config[0] > RAW_SAMPLES:
            self._send(b"\x12")
            return
        self.config = config  # what it has made in the other mode stays in its buffer
        self._ack()

    def _attest(self, code: int, payload: bytes) -> None:
        key = raw_key(self.key.public_key())
        if code == 0xF7:
            self._send(b"\xf9" + key)
        elif code == 0xF9:
            self._send(b"\xfb" + self.certificate(key))
        else:
            data = self._take(*struct.unpack("<H", payload))
            signed = (data, sign(self.key, data + b"!" if self.bad_signature else data))
            signed = self.signed[0] if self.replay_signature else signed
            self.signed.append(signed)
            self._send(b"\x52" + b"".join(signed))

    def certificate(self, key: bytes) -> bytes:
        serial, hardware = self._certified
        major, minor = hardware.removeprefix("CICADA-QRNG-").split(".")
        number = int(serial.removeprefix("QC"))
        return sign(self.root, struct.pack("<HBBI", 0, int(major), int(minor), number) + key)

    def root_pem(self) -> bytes:
        """The root's public key, as the vendor publishes it."""
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return self.root.public_key().public_bytes(serialization.Encoding.PEM, form)
