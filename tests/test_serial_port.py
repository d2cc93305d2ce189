"""Serial ports: found, opened for one process, read exactly or not at all, and how a device that is gone looks."""

import dataclasses
import errno
import fcntl
import grp
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
import tty

import pytest
from processes import in_forked_child

import everett_cuda
from everett_cuda.drivers import DeviceLost, TransportError, serial_port
from everett_cuda.drivers.permission import holders
from everett_cuda.drivers.serial_port import Port, close_port, drain, open_port, read_exact, read_some, write_all
from everett_cuda.errors import SourceError


class Line:
    """A pseudo-terminal: `path` is the port, `master` the device's end of the cable."""

    def __init__(self):
        self.master, slave = pty.openpty()
        tty.setraw(slave)
        self.path = os.ttyname(slave)
        os.close(slave)

    def unplug(self):
        if self.master is not None:
            os.close(self.master)
            self.master = None


@pytest.fixture
def line():
    line = Line()
    yield line
    line.unplug()


@pytest.fixture
def port(line):
    port = open_port(line.path, 1_000_000, 1.0)
    yield port
    close_port(port)


def read(port, n=1000, timeout_s=1.0):
    buffer = bytearray(n)
    return bytes(buffer[: read_some(port, memoryview(buffer), timeout_s)])


# --- finding ---

FTDI = """\
P: /devices/pci0000:00/usb1/1-1
N: bus/usb/001/004
E: DEVTYPE=usb_device
E: SUBSYSTEM=usb
E: DEVNAME=/dev/bus/usb/001/004
A: idVendor=0403\\n
A: idProduct=6015\\n
A: serial=DK0HFP4T\\n
A: manufacturer=Crypta Labs\\n
A: product=QCicada QRNG\\n
A: bNumInterfaces= 1\\n

P: /devices/pci0000:00/usb1/1-1/1-1:1.0
E: DEVTYPE=usb_interface
E: SUBSYSTEM=usb

P: /devices/pci0000:00/usb1/1-1/1-1:1.0/ttyUSB0
E: SUBSYSTEM=usb-serial

P: /devices/pci0000:00/usb1/1-1/1-1:1.0/ttyUSB0/tty/ttyUSB0
N: ttyUSB0
E: DEVNAME=/dev/ttyUSB0
E: SUBSYSTEM=tty
A: dev=188:0\\n
L: device=../../../ttyUSB0
"""


# Importing the package imports torch, which takes seconds, and what runs here is the drivers only.
WITHOUT_TORCH = f"""
import sys, types
package = types.ModuleType("everett_cuda")
package.__path__ = [{os.path.dirname(everett_cuda.__file__)!r}]
sys.modules["everett_cuda"] = package
"""


def under_umockdev(tmp_path, code, description=FTDI):
    """Runs code where /sys and /dev hold an FTDI adapter behind ttyUSB0; returns what it prints."""
    if shutil.which("umockdev-run") is None:
        pytest.skip("umockdev-run not found (apt install umockdev): no emulated /sys to find a USB serial port in")
    (tmp_path / "ftdi.umockdev").write_text(description)
    command = ["umockdev-run", "-d", tmp_path / "ftdi.umockdev", "--", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ports_are_found_by_usb_identity_and_by_text(tmp_path):
    found = Port("/dev/ttyUSB0", 0x0403, 0x6015, "DK0HFP4T", "QCicada QRNG", "Crypta Labs")
    code = WITHOUT_TORCH + """
from everett_cuda.drivers import serial_port
from everett_cuda.drivers.serial_port import ports
for wanted in ({}, {"ids": {(0x0403, 0x6015)}}, {"text": "qcicada"}, {"text": "crypta labs"}, {"text": "dk0hfp4t"},
               {"ids": {(1, 2)}, "text": "QRNG"}, {"ids": {(0x0403, 0x6001)}}, {"text": "swiftrng"}):
    print(ports(**wanted))
print(serial_port.permission_hint("/dev/ttyUSB0"))
"""
    *lines, hint = under_umockdev(tmp_path, code).splitlines()
    assert lines == [str([found])] * 6 + ["[]"] * 2
    assert 'ATTRS{product}=="*icada*", MODE="0660", GROUP="everett"' in hint and "usermod -aG everett" in hint


def test_names_of_udev_serve_where_sysfs_is_silent(tmp_path, monkeypatch, line):
    monkeypatch.setattr(serial_port, "BY_ID", tmp_path)
    (tmp_path / "usb-TectroLabs_SwiftRNG_SWRNG1-if00").symlink_to(line.path)
    (tmp_path / "usb-Gone_Device_1-if00-port0").symlink_to("/dev/ttyUSB99")
    expected = [Port(line.path, None, None, "SWRNG1", "TectroLabs SwiftRNG")]
    assert serial_port.ports(text="TectroLabs SwiftRNG") == expected
    assert serial_port.ports(text="swiftrng") == expected and serial_port.ports(text="gone") == []


@pytest.mark.parametrize(
    "port, rule",
    [
        (Port("", 0x0403, 0x6001, "A1", "FT232R USB UART", "FTDI"), None),  # anybody's adapter
        (Port("", 0x0403, 0x6001, "A1", "QCicada", "FTDI"), 'product}=="*icada*"'),
        (Port("", 0x0403, 0x6015, "A1", "UART", "Crypta Labs Ltd"), 'manufacturer}=="Crypta Labs*"'),
        (Port("", 0x0403, 0x6001, "QWR4X123", "UART", "QWC"), 'serial}=="QWR*"'),
        (Port("", 0x04D8, 0xF5FE, "1", "TrueRNG", "ubld.it"), 'idProduct}=="f5fe|ebb5"'),
        (Port("", 0x1234, 0x5678, "1", "modem", "x"), None),
        (Port(""), None),
    ],
)
def test_a_forbidden_port_is_given_by_its_own_rule_or_by_its_group(line, monkeypatch, port, rule):
    monkeypatch.setattr(serial_port, "ports", lambda: [dataclasses.replace(port, device=line.path)])
    monkeypatch.setattr(grp, "getgrgid", lambda gid: grp.getgrnam("daemon"))
    hint = serial_port.permission_hint(line.path)
    assert (rule in hint and 'GROUP="everett"' in hint) if rule else ("udev" not in hint and "join its group" in hint)


# --- opening ---


def test_a_port_is_raw_at_its_speed(port):
    iflag, oflag, _, lflag, ispeed, ospeed, _ = termios.tcgetattr(port.fd)
    assert ispeed == ospeed == termios.B1000000
    assert not lflag & (termios.ICANON | termios.ECHO | termios.ISIG) and not oflag & termios.OPOST
    assert not iflag & (termios.IXON | termios.IXOFF | termios.ICRNL | termios.ISTRIP)


def test_a_port_serves_one_opener(line, port):
    with pytest.raises(SourceError, match=f"{line.path} is in use by this process; close that first"):
        open_port(line.path, 9600, 1.0)
    close_port(port)
    close_port(port)
    close_port(open_port(line.path, 9600, 1.0))


def test_another_process_is_named(line):
    code = f"""{WITHOUT_TORCH}
from everett_cuda.drivers import serial_port
port = serial_port.open_port({line.path!r}, 9600, 1.0)
print("open", flush=True)
sys.stdin.read()
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "open\n"
        with pytest.raises(SourceError, match=rf"in use by \S+ \(pid {child.pid}\); close that first"):
            open_port(line.path, 9600, 1.0)
        assert serial_port.state(line.path).endswith(f"(pid {child.pid})")
        other = serial_port.examine_port(line.path)[-1]
        assert (other.check, other.verdict) == ("other process", "fail") and f"(pid {child.pid})" in other.text
    finally:
        child.communicate(timeout=20)
    assert serial_port.state(line.path) == "ready"


def test_a_process_that_has_the_port_open_without_a_lock_is_refused_too(line):
    # Left behind by a shell that has ended, so that it is no child of this process; it holds the port as `cat` would.
    shell = ["sh", "-c", f"sleep 60 <{line.path} >/dev/null & echo $!"]
    pid = int(subprocess.run(shell, stdout=subprocess.PIPE, check=True, timeout=20).stdout)
    try:
        deadline = time.monotonic() + 10
        while (pid, "sleep") not in holders(line.path):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(SourceError, match=rf"in use by sleep \(pid {pid}\); close that first"):
            open_port(line.path, 9600, 1.0)
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_forked_child_does_not_keep_the_port_from_its_parent(line, port):
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # a data loader's worker, with everything inherited
        os.close(go[1])
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        close_port(port)
        again = open_port(line.path, 9600, 1.0)
        os.write(line.master, b"abc")
        assert read_exact(again, 3, 1.0) == b"abc"
        close_port(again)
    finally:
        for end in (*ready, *go):
            os.close(end)
        os.waitpid(child, 0)


def test_what_is_no_serial_port_is_refused(tmp_path, line):
    (tmp_path / "file").write_bytes(b"0123")
    os.mkfifo(tmp_path / "fifo")
    for path, message in (
        (tmp_path / "missing", "does not exist; connect the device"),
        (tmp_path / "file", "not a serial port"),
        (tmp_path / "fifo", "not a serial port"),
        (tmp_path, "not a serial port"),
        ("/dev/null", "cannot be opened as a serial port|in use by"),
    ):
        with pytest.raises(SourceError, match=message):
            open_port(str(path), 9600, 1.0)
    line.unplug()
    with pytest.raises(SourceError, match="does not exist|nothing were connected"):
        open_port(line.path, 9600, 1.0)


def test_a_forbidden_port_says_which_group_may(line):
    def child():
        os.chmod(line.path, 0)
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        found = serial_port.examine_port(line.path)[-1]
        assert (found.check, found.verdict) == ("permission", "fail") and "group" in found.next_step
        assert serial_port.state(line.path) == "no permission"
        open_port(line.path, 9600, 1.0)

    answer = in_forked_child(child)
    assert "SourceError" in answer and "no permission; " in answer and "group" in answer


def test_two_hundred_cycles_leave_no_descriptor(line):
    before = sorted(os.listdir("/proc/self/fd"))
    for k in range(200):
        port = open_port(line.path, 1_000_000, 1.0)
        if k % 10 == 0:
            with pytest.raises(SourceError):
                open_port(line.path, 1_000_000, 1.0)
        close_port(port)
    assert sorted(os.listdir("/proc/self/fd")) == before


# --- reading and writing ---


def test_reads_give_what_is_there_and_time_out(line, port):
    start = time.monotonic()
    assert read(port, timeout_s=0.1) == b"" and time.monotonic() - start >= 0.09
    os.write(line.master, bytes(range(256)))
    assert read(port, 100) == bytes(range(100))
    assert read(port) == bytes(range(100, 256))


def test_exact_reads_drop_what_came_short(line, port):
    os.write(line.master, b"abcdef")
    assert read_exact(port, 4, 1.0) == b"abcd"
    with pytest.raises(TransportError, match="gave 2 of 4 bytes in 0.1 s; they were dropped") as caught:
        read_exact(port, 4, 0.1)
    assert not isinstance(caught.value, DeviceLost)
    os.write(line.master, b"next")
    assert read_exact(port, 4, 1.0) == b"next"


def test_pieces_of_an_exact_read_may_come_late(line, port):
    def send():
        for k in range(10):
            time.sleep(0.01)
            os.write(line.master, bytes([k]))

    sender = threading.Thread(target=send)
    sender.start()
    assert read_exact(port, 10, 5.0) == bytes(range(10))
    sender.join()


def test_an_unplugged_device_is_lost(line, port):
    os.write(line.master, b"under way")  # the kernel drops what was not read before the hang-up
    line.unplug()
    for _ in range(2):
        with pytest.raises(DeviceLost):
            read(port)
    with pytest.raises(DeviceLost):
        write_all(port, b"x", 1.0)


def test_unplugging_wakes_a_waiting_read(line, port):
    threading.Timer(0.1, line.unplug).start()
    start = time.monotonic()
    with pytest.raises(DeviceLost):
        read_exact(port, 10, 10.0)
    assert time.monotonic() - start < 5


def test_a_closing_thread_ends_reads_for_good(port):
    threading.Timer(0.1, port.cancel_read).start()
    for _ in range(2):
        with pytest.raises(DeviceLost, match="being closed"):
            read_exact(port, 10, 10.0)
    close_port(port)
    for use in (lambda: read(port), lambda: write_all(port, b"x", 1.0)):
        with pytest.raises(DeviceLost, match="closed"):
            use()


def test_reads_work_beyond_descriptor_1023(line):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200:
        pytest.skip(f"this process may open {hard} files only, and 1,200 are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    many = [os.open("/dev/zero", os.O_RDONLY) for _ in range(1050)]
    try:
        port = open_port(line.path, 9600, 1.0)
        assert port.fd > 1023
        os.write(line.master, b"abc")
        assert read_exact(port, 3, 1.0) == b"abc"
        write_all(port, b"def", 1.0)
        assert os.read(line.master, 10) == b"def"
        close_port(port)
    finally:
        for fd in many:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_writes_arrive_whole_or_time_out(line, port):
    data = os.urandom(100_000)
    received = bytearray()

    def receive():
        while len(received) < len(data):
            received.extend(os.read(line.master, 65536))

    receiver = threading.Thread(target=receive)
    receiver.start()
    write_all(port, data, 10.0)
    receiver.join(10)
    assert received == data
    with pytest.raises(TransportError, match=r"took \d+ of 1000000 bytes in 0.1 s"):
        write_all(port, bytes(1_000_000), 0.1)


def test_draining_ends_with_silence_or_gives_up(line, port):
    assert drain(port, 0.01, 1.0) == 0
    os.write(line.master, bytes(3000))
    assert drain(port, 0.05, 1.0) == 3000
    done = threading.Event()

    def chatter():
        while not done.is_set():
            os.write(line.master, b"x")
            time.sleep(0.001)

    thread = threading.Thread(target=chatter)
    thread.start()
    try:
        with pytest.raises(TransportError, match="does not fall silent"):
            drain(port, 0.2, 0.3)
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(
    "error, gone",
    [
        (OSError(errno.EIO, "x"), True),
        (OSError(errno.ENODEV, "x"), True),
        (termios.error(errno.EIO, "x"), True),
        (DeviceLost("x"), True),
        (OSError(errno.EAGAIN, "x"), False),
        (serial_port.serial.SerialException("write failed"), False),
        (TransportError("short"), False),
        (None, False),
    ],
)
def test_errors_that_mean_a_lost_device(error, gone):
    assert serial_port.lost(error) is gone
    wrapped = serial_port.serial.SerialException("wrapped, without a number")
    wrapped.__cause__ = error
    assert serial_port.lost(wrapped) is gone


def test_errors_of_pyserial_on_an_unplugged_port_mean_a_lost_device(line, port):
    line.unplug()
    for use in (port.reset_input_buffer, lambda: port.write(b"x"), lambda: fcntl.ioctl(port.fd, termios.TIOCEXCL)):
        with pytest.raises(Exception) as caught:  # noqa: B017, PT011 - whichever it is
            use()
        assert serial_port.lost(caught.value)


# --- the doctor ---


def test_examination_ends_at_what_stands_in_the_way(line, tmp_path):
    assert [f.verdict for f in serial_port.examine_port(line.path)][:3] == ["ok", "ok", "ok"]
    (missing,) = serial_port.examine_port("/dev/ttyUSB99")
    assert missing.verdict == "fail" and "ftdi_sio" in missing.next_step
    (file,) = serial_port.examine_port(str(tmp_path))
    assert file.verdict == "fail" and "not a character device" in file.text


def test_daemons_that_open_serial_ports_are_named(tmp_path, line):
    shutil.copy(shutil.which("sleep"), tmp_path / "ModemManager")
    daemon = subprocess.Popen([tmp_path / "ModemManager", "60"])
    try:
        deadline = time.monotonic() + 10
        while (daemon.pid, "ModemManager") not in serial_port.meddlers():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        note = serial_port.examine_port(line.path)[-1]
        assert note.verdict == "note" and "ID_MM_DEVICE_IGNORE" in note.next_step
    finally:
        daemon.kill()
        daemon.wait()
