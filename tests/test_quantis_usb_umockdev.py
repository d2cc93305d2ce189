"""quantis-usb through the real libusb and pyusb, to an emulated device on the wire (umockdev), in processes of their own."""

import hashlib
import json
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from devices.quantis_usb_wire import Client, ClientError, Wire, build, why_not
from devices.seeded_bytes import seeded_bytes

MISSING = why_not()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no emulated USB device: {MISSING}")

SERIAL = "1000231A410"
DISCARDED = 4096
SET_UP = """
import os, sys, threading, time
from everett_cuda import drivers, source
from everett_cuda.drivers import attached, driver_of, open_driver, parse_uri
from everett_cuda.source import Source

def read(driver, n):
    out, at = bytearray(n), 0
    while at < n:
        at += driver.readinto(memoryview(out)[at:], 0.2)
    return bytes(out)

def held():
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
"""


@pytest.fixture(scope="module")
def wire(tmp_path_factory):
    wire = Wire(build(tmp_path_factory.mktemp("umockdev")))
    yield wire
    wire.close()


def start(wire, before=""):
    client = Client(wire)
    client.do(before + SET_UP)
    return client


@pytest.fixture(scope="module")
def client(wire):
    """A process that uses the libusb of libusb-package."""
    client = start(wire)
    yield client
    client.close()


@pytest.fixture(scope="module")
def system_client(wire):
    """A process that uses the system's libusb, as where libusb-package is not installed."""
    client = start(wire, "import sys; sys.modules['libusb_package'] = None\n")
    client.do("from usb.backend import libusb1")
    if not client.ask("libusb1.get_backend() is not None"):
        client.close()
        pytest.skip("the system has no libusb-1.0 of its own")
    yield client
    client.close()


@pytest.fixture
def device(wire):
    """Plugged in, with the stream of seed 7 from its start."""
    for command in ("rate 0", "status 1", "ais31 0", "packets 0", f"plug {SERIAL} 7"):
        wire.tell(command)
    yield wire
    wire.tell("unplug")


@pytest.fixture
def driver(device, client):
    """Open in the client as `driver`."""
    client.do("driver = open_driver('quantis-usb:')")
    yield device
    client.do("driver.close()")


def hashes(raw, n=80):
    return b"".join(hashlib.sha256(raw[i : i + n]).digest() for i in range(0, len(raw) - n + 1, n))


def test_it_is_listed_without_a_byte_being_read(device, client):
    (row,) = client.ask("[(d.uri, d.serial, d.kind, d.state) for d in attached()[0] if 'quantis-usb' in d.uri]")
    assert row == (f"quantis-usb:{SERIAL}", SERIAL, "quantum", "ready")
    assert device.served() == 0


def test_doctor_finds_nothing_in_the_way(device, client):
    found = client.ask(
        "[(f.check, f.verdict) for f in driver_of(parse_uri('quantis-usb:')).examine(parse_uri('quantis-usb:'))]"
    )
    assert found == [(check, "ok") for check in ("cable", "permission", "other process", "firmware", "modules")]


@pytest.mark.parametrize("transfer", ["512", "4KiB", "64KiB"])
def test_bytes_are_those_of_the_device_in_order(device, client, transfer):
    client.do(f"driver = open_driver('quantis-usb:{SERIAL}?transfer={transfer}')")
    first = max(DISCARDED, client.ask("int(driver.details['transfer'].split()[0])"))
    assert client.ask("read(driver, 30_000)") == seeded_bytes(7, first, 30_000)
    assert client.ask("type(driver._reader).__name__") == "_NativeReader"
    client.do("driver.close(); driver.close()")


def test_auto_measures_and_falls_back(device, client):
    client.do("driver = open_driver('quantis-usb:transfer=auto')")
    size = client.ask("int(driver.details['transfer'].split()[0])")
    assert size > 512  # a transfer costs the emulation a millisecond, whatever its size
    device.tell("packets 1")
    with pytest.raises(ClientError, match="ShortTransfer: .* came short"):
        client.ask("read(driver, 300_000)")
    begun = device.served()
    assert client.ask("read(driver, 10_000)") == seeded_bytes(7, begun + DISCARDED, 10_000)
    assert f"one packet, since {size} bytes failed" in client.ask("driver.details['transfer']")
    client.do("driver.close()")


@pytest.mark.parametrize("kind, words", [("short", "came short"), ("stall", "errno 32"), ("io", "errno 5")])
def test_failed_transfers_lose_their_bytes_and_the_device_goes_on(driver, client, kind, words):
    driver.tell(f"fault {kind} 20480")
    with pytest.raises(ClientError, match=words):
        client.ask("read(driver, 300_000)")
    begun = driver.served()
    assert 20480 <= begun < 20480 + 512
    assert client.ask("read(driver, 5000)") == seeded_bytes(7, begun + DISCARDED, 5000)


def test_silence_is_no_error_and_loses_nothing(driver, client):
    driver.tell("fault silence 20480")
    client.do("""
out, quiet, buffer = b"", 0, bytearray(65536)
while quiet < 3:
    n = driver.readinto(memoryview(buffer), 0.1)
    out, quiet = out + buffer[:n], quiet + 1 if n == 0 else 0
""")
    driver.tell("speak")
    assert client.ask("bytes(out)") + client.ask("read(driver, 5000)") == seeded_bytes(
        7, DISCARDED, 20480 - DISCARDED + 5000
    )


def test_unplugged_it_is_lost_and_comes_back(driver, client):
    driver.tell("fault unplug 20480")
    with pytest.raises(ClientError, match="DeviceLost: .* is gone"):
        client.ask("read(driver, 300_000)")
    with pytest.raises(ClientError, match=f"DeviceLost: Quantis USB {SERIAL} is not attached"):
        client.do("driver.reconnect(0.1)")
    driver.tell(f"plug {SERIAL} 8")
    client.do("driver.reconnect(5.0)")
    assert client.ask("read(driver, 5000)") == seeded_bytes(8, DISCARDED, 5000)
    driver.tell("unplug")  # between reads
    with pytest.raises(ClientError, match="DeviceLost"):
        client.ask("read(driver, 300_000)")
    driver.tell("plug STRANGER 9")
    with pytest.raises(ClientError, match=f"^SourceError: where Quantis USB {SERIAL} was there is now STRANGER"):
        client.do("driver.reconnect(5.0)")
    assert driver.served() == 0


def test_a_second_process_is_told_who_has_it_and_may_have_it_after_a_kill(device, client):
    program = (
        "import usb.core, libusb_package; d = libusb_package.find(idVendor=0x0aba); d.set_configuration(); "
        "d.read(0x86, 512); print(1, flush=True); input()"
    )
    other = subprocess.Popen([sys.executable, "-c", program], env=device.environment, stdout=subprocess.PIPE,
                             stdin=subprocess.PIPE)  # fmt: skip
    try:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(
            ClientError, match=rf"^DeviceBusy: .* is in use by python.* \(pid {other.pid}\); stop that first"
        ):
            client.do("open_driver('quantis-usb:')")
        assert f"(pid {other.pid})" in client.ask("attached()[0][0].state")
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    client.do("driver = open_driver('quantis-usb:')")
    assert len(client.ask("read(driver, 1000)")) == 1000
    assert client.ask("attached()[0][0].state") == "in use by this process"
    client.do("driver.close()")


def test_a_kernel_driver_that_has_it_is_named(device, client):
    device.tell("driver usbtest")
    with pytest.raises(ClientError, match=r"in use by the kernel driver usbtest \(unbind it: `echo 1-1:1.0 > /sys/bus/usb/"):
        client.do("open_driver('quantis-usb:')")
    checks = client.ask(
        "[(f.check, f.verdict) for f in driver_of(parse_uri('quantis-usb:')).examine(parse_uri('quantis-usb:'))]"
    )
    assert checks == [("cable", "ok"), ("permission", "ok"), ("kernel driver", "fail")]


def test_missing_permission_names_the_rule(device, client):
    device.forbid()
    client.do("mine = os.geteuid()\nif mine == 0: os.seteuid(65534)")
    try:
        assert client.ask("attached()[0][0].state") == "no permission"
        with pytest.raises(
            ClientError, match=r'no permission to open /dev/bus/usb/001/\d+; .*idProduct}=="0102", MODE="0660"'
        ):
            client.do("open_driver('quantis-usb:')")
    finally:
        client.do("os.seteuid(mine)")
    assert device.served() == 0


@pytest.mark.parametrize("which", ["client", "system_client"])
def test_a_forked_child_that_exits_does_not_disturb_its_parent(device, which, request):
    client = request.getfixturevalue(which)
    client.do("driver = open_driver('quantis-usb:')")
    before = client.ask("read(driver, 5000)")
    client.do("""
def event_threads():
    return sum(open(f"/proc/self/task/{t}/comm").read() == "libusb_event\\n" for t in os.listdir("/proc/self/task"))
before = event_threads()
child = os.fork()
if child == 0:
    try:
        driver.readinto(memoryview(bytearray(512)), 0.2)
    except Exception as error:
        told = "stopped" in str(error)
    try:
        open_driver("quantis-usb:")
    except Exception as error:
        told = told and "in use by" in str(error)
    os.close(1); os.close(0)
    import atexit, gc, signal
    driver = None
    gc.collect()
    signal.alarm(10)  # a child that hangs is a failure
    atexit._run_exitfuncs()  # what sys.exit would run
    os._exit(7 if told else 8)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
""")
    assert client.ask("status") == 7
    client.do("time.sleep(0.1)")
    assert client.ask("event_threads() == before == 1")
    after = client.ask("read(driver, 50_000)")
    assert before + after == seeded_bytes(7, DISCARDED, 55_000)
    client.do("driver.close()")


def test_open_and_close_leave_no_thread_and_no_file(device, client):
    client.do("""
def cycle():
    driver = open_driver("quantis-usb:")
    read(driver, 512)
    driver.close()
cycle()
before, threads = held(), threading.enumerate()
for _ in range(100):
    cycle()
deadline = time.monotonic() + 10
while held() != before and time.monotonic() < deadline:
    time.sleep(0.01)
""")
    assert client.ask("held() == before and threading.enumerate() == threads")


def test_bits_are_the_hashes_of_the_devices_bytes(device, client):
    client.do("opened = Source.open('quantis-usb:')")
    assert client.ask("opened.take(20_000, timeout_s=20)") == hashes(seeded_bytes(7, DISCARDED, 60_000))[:20_000]
    device.tell("ais31 1")
    client.do("""
deadline = time.monotonic() + 10
while opened.status().device["AIS-31 start-up test"] != "passed" and time.monotonic() < deadline:
    opened.ring.discard(4096, 0.01)
""")
    assert client.ask("opened.status().transport_errors") == 1
    client.do("opened.close()")
    assert client.ask("opened.status().alarms") == ()


def test_a_stuck_device_is_stopped(device, client):
    device.tell("stuck 40000")
    client.do("""
opened, out = Source.open("quantis-usb:transfer=4KiB"), b""
try:
    while True:
        out += opened.take(32, timeout_s=20)
except Exception as error:
    ended = f"{type(error).__name__}: {error}"
opened.close()
""")
    assert client.ask("ended").startswith("HealthAlarm: repetition count")
    first = client.ask("opened.status().alarms[0].offset")
    assert 40_000 - DISCARDED <= first < 40_000 - DISCARDED + 512
    assert hashes(seeded_bytes(7, DISCARDED, (first // 512 - 1) * 512)).startswith(client.ask("out"))


def test_the_systems_libusb_does_as_well(device, system_client):
    system_client.do("driver = open_driver('quantis-usb:')")
    assert system_client.ask("read(driver, 20_000)") == seeded_bytes(7, DISCARDED, 20_000)
    device.tell("unplug")
    with pytest.raises(ClientError, match="DeviceLost"):
        system_client.ask("read(driver, 300_000)")
    device.tell(f"plug {SERIAL} 8")
    system_client.do("driver.reconnect(5.0)")
    assert system_client.ask("read(driver, 5000)") == seeded_bytes(8, DISCARDED, 5000)
    system_client.do("driver.close()")


def test_the_demo_runs_on_it(tmp_path):
    command = [sys.executable, "-m", "tests.devices.with_quantis_usb", "--serial", "DEMO-1", "--"]
    demo = [sys.executable, "-m", "everett_cuda.demo", "--source", "quantis-usb:", "--steps", "2", "--out", tmp_path / "out"]
    done = subprocess.run([*command, *demo], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["label"], report["health"], report["fresh"], report["stretched"]) == ("quantum", "ok", 18, 0)


def test_the_runner_passes_exit_codes_on(tmp_path):
    command = [sys.executable, "-m", "tests.devices.with_quantis_usb", "--"]
    for program, code in (([sys.executable, "-S", "-c", "raise SystemExit(5)"], 5), (["./no-such-program"], 2)):
        assert subprocess.run([*command, *program], cwd=ROOT, capture_output=True, timeout=60).returncode == code
