"""The `everett` command against every emulated device: listed, examined, watched, recorded, and refused with a reason."""

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli_checks import CHECKS, Rig, check_capture, check_interruption, check_refusal, quicken
from commands import everett
from devices.comscire import ComScire
from devices.kernel_double import KernelDouble, run_pytest
from devices.kernel_double import why_not as why_no_kernel_double
from devices.qcicada import CAPACITY, QCicada
from devices.quantis_usb import QuantisUsb
from devices.quantis_usb_wire import Client, Wire, build
from devices.quantis_usb_wire import why_not as why_no_wire
from devices.seeded_bytes import Seeded, seeded_bytes
from devices.swiftrng import SwiftRng
from devices.truerng import TrueRNG
from devices.usb_bus import UsbBus
from devices.web_server import KEY, WebServer

from everett_cuda.drivers import patience

QUANTIS_SERIAL = "1000231A410"
QUANTIS_DISCARDED = 4096
TESTS = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quicken(monkeypatch)


# --- the devices ---


@pytest.fixture
def quantis_usb(machine):
    device = QuantisUsb(Seeded(7), QUANTIS_SERIAL)
    bus = UsbBus(device)
    with bus.plugged_into_pyusb():
        listed = (f"quantis-usb:{QUANTIS_SERIAL}", QUANTIS_SERIAL, 5e5)
        sent = lambda n: seeded_bytes(7, QUANTIS_DISCARDED, n)  # noqa: E731
        yield Rig("quantis-usb:", "quantum", QUANTIS_SERIAL, sent, listed, device=device)
    assert bus.open_handles == 0, "a device was left open"


@pytest.fixture
def comscire(machine):
    device = ComScire("QWR40123")
    machine.bus.gadgets.append(device)
    listed = ("comscire:QWR40123", "QWR40123", 5e5)
    yield Rig("comscire:", "electronic", "QWR40123", lambda n: bytes(device.runs[0][:n]), listed, True, device=device)
    assert machine.bus.open_handles == 0, "a device was left open"


@pytest.fixture
def qcicada(machine):
    path = machine.by_id / "usb-Crypta_Labs_QCicada_DK0HFP4T-if00-port0"
    with QCicada(path) as device:
        listed = ("qcicada:DK0HFP4T", "DK0HFP4T", 12_500.0)
        sent = lambda n: bytes(device.sent[CAPACITY:][:n])  # noqa: E731 - what it had made before is thrown away
        yield Rig("qcicada:", "quantum", "QC0000000217", sent, listed, conditioned=True, device=device)


@pytest.fixture
def swiftrng(machine, tmp_path):
    with SwiftRng(tmp_path / "usb-TectroLabs_SwiftRNG-if00") as device:
        machine.plug_in_port(device.path, 0x3975, 0x0002, "FD1", "SwiftRNG")
        sent = lambda n: bytes(device.firmware.sent[:n])  # noqa: E731
        yield Rig("swiftrng:", "electronic", "SWRNG-012345-A1", sent, ("swiftrng:FD1", "FD1", None), device=device)


@pytest.fixture
def truerng(machine, tmp_path):
    with TrueRNG(tmp_path / "usb-TrueRNG-if00") as device:
        machine.plug_in_port(device.path, 0x04D8, 0xF5FE, "T1", "TrueRNG")
        sent = lambda n: bytes(device.sent[1024:][:n])  # noqa: E731
        yield Rig("truerng:", "electronic", "T1", sent, ("truerng:T1", "T1", 5e4), conditioned=True, device=device)


@pytest.fixture
def server(machine, tmp_path, monkeypatch):
    """All web services; keys are in the environment, and spending records in a folder of this test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for variable in ("EVERETT_ANU_KEY", "EVERETT_OUTSHIFT_KEY", "EVERETT_QRYPT_TOKEN"):
        monkeypatch.setenv(variable, KEY)
    monkeypatch.setattr(patience, "BACKOFF_S", 0.01)
    monkeypatch.setattr(patience, "PATIENCE_AT_OPEN_S", 0.5)
    with WebServer() as opened:
        yield opened


def service(uri, server, serial=None, metered=True):
    sent = lambda n: b"".join(server.served)[:n]  # noqa: E731
    return Rig(uri + server.url, "quantum-remote", serial, sent, None, True, metered, server)


@pytest.fixture
def anu(server):
    return service("anu:?budget_usd=9&url=", server)


@pytest.fixture
def outshift(server):
    return service("outshift:?url=", server)


@pytest.fixture
def qrypt(server):
    return service("qrypt:?size=4&url=", server)


@pytest.fixture
def quantis_appliance(server):
    return service("quantis-appliance:?url=", server, "127.0.0.1", metered=False)


LOCAL = ["quantis_usb", "comscire", "qcicada", "swiftrng", "truerng"]
SERVICES = ["anu", "outshift", "qrypt", "quantis_appliance"]


@pytest.fixture(params=LOCAL + SERVICES)
def rig(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=SERVICES)
def remote(request):
    return request.getfixturevalue(request.param)


# --- all is well ---


@pytest.mark.parametrize("check", CHECKS)
def test_it_is_well(rig, check):
    check(everett, rig)


def test_a_recording_is_the_devices_bytes(rig, tmp_path):
    about = check_capture(everett, rig, tmp_path)
    assert KEY not in str(about)


def test_the_key_of_a_service_is_never_shown(remote):
    server = remote.device
    server.key = "another-key"  # the server's own; what is sent is wrong now
    said = everett("doctor", remote.uri, "--seconds", 0.1).output + everett("monitor", remote.uri, "--once", "--json").output
    assert server.asked and KEY not in said


# --- what stands in the way ---


def test_a_quantis_that_this_user_may_not_open(quantis_usb, tmp_path):
    quantis_usb.device.forbidden = True
    check_refusal(everett, "quantis-usb:", tmp_path, 1, "no permission to open /dev/bus/usb", "doctor --install-udev")


def test_a_quantis_that_another_process_has(quantis_usb, tmp_path):
    quantis_usb.device.busy = True
    check_refusal(everett, "quantis-usb:", tmp_path, 1, "in use by", "stop what has it")


def test_two_that_could_be_meant_are_not_called_absent(quantis_usb, tmp_path):
    quantis_usb.device.plug()
    other = QuantisUsb(Seeded(8), "OTHER-1", port=2)
    with UsbBus(quantis_usb.device, other).plugged_into_pyusb():
        check_refusal(everett, "quantis-usb:", tmp_path, 1, "2 are attached", "name one of quantis-usb:")
        check_refusal(everett, "quantis-usb:NONE", tmp_path, 3, "no such Quantis USB is attached", "connect the device")


def test_a_quantis_is_pulled_out_in_the_middle_of_a_recording(quantis_usb, tmp_path):
    quantis_usb.device.fault("unplug", 100_000)
    check_interruption(everett, quantis_usb.uri, tmp_path, 1, "is gone")


@pytest.mark.parametrize("uri, said", [
    ("quantis-usb:", "no such Quantis USB is attached"), ("comscire:", "no such device is attached"),
    ("qcicada:", "no device was found"), ("qcicada:QC0000000217", "no device with this serial number answers"),
    ("qcicada:/dev/no-such-tty", "does not exist|No such file"), ("swiftrng:", "no device was found"),
    ("swiftrng:FD1", "no such device is attached"), ("truerng:T1", "no such device is attached"),
    ("truerng:/dev/no-such-tty?unproven=1", "does not exist|No such file"),
])  # fmt: skip
def test_nothing_is_attached(machine, tmp_path, uri, said):
    check_refusal(everett, uri, tmp_path, 3, said, "connect the device|check the cable|name the port")


def test_a_qcicada_that_another_process_has(qcicada, tmp_path):
    descriptor = os.open(qcicada.device.path, os.O_RDONLY | os.O_NOCTTY)
    try:
        check_refusal(everett, "qcicada:", tmp_path, 1, "this process", "close that first")
    finally:
        os.close(descriptor)


def test_a_qcicada_whose_own_tests_fail(qcicada, tmp_path):
    qcicada.device.flags = 0x81
    check_refusal(everett, "qcicada:", tmp_path, 1, "test failed", "reset=1", open_code=4)


def test_a_swiftrng_whose_noise_sources_fail(swiftrng, tmp_path):
    swiftrng.device.firmware.status = 1
    said = r"device status 0x1 instead of 0x0|failure of its noise sources, status 0x01"
    check_refusal(everett, "swiftrng:", tmp_path, 4, said, "another cable")


def test_a_swiftrng_is_pulled_out_in_the_middle_of_a_recording(swiftrng, tmp_path):
    made = swiftrng.device.firmware.noise.make

    def make(n):
        if len(swiftrng.device.firmware.sent) >= 100_000:
            swiftrng.device.cut_at = 1000
        return made(n)

    swiftrng.device.firmware.noise.make = make
    check_interruption(everett, swiftrng.uri, tmp_path, 1, "is gone|hung up")


def test_a_truerng_in_a_text_mode(truerng, tmp_path):
    truerng.device.mode = "millivolts"
    check_refusal(everett, "truerng:", tmp_path, 1, "sends text", "set mode=normal")


def test_a_comscire_that_another_process_has(comscire, tmp_path):
    comscire.device.busy = True
    check_refusal(everett, "comscire:", tmp_path, 1, "in use by", "stop that first")


def test_a_comscire_is_pulled_out_in_the_middle_of_a_recording(comscire, tmp_path):
    comscire.device.unplug_after = 100_000
    check_interruption(everett, comscire.uri, tmp_path, 1, "is gone|is not attached")


def test_a_wrong_key(request, tmp_path, server):
    for name, status, step in (
        ("anu", 403, "check it"), ("outshift", 401, "get a new one"), ("qrypt", 401, "get a new one"),
    ):  # fmt: skip
        rig = request.getfixturevalue(name)
        server.key = "another-key"
        check_refusal(everett, rig.uri, tmp_path, 1, f"status {status}: the (key|token) is missing", step)


def test_no_key_and_no_budget(anu, tmp_path, monkeypatch):
    check_refusal(everett, f"anu:?url={anu.device.url}", tmp_path, 1, "budget_usd", "budget_usd=")
    monkeypatch.delenv("EVERETT_ANU_KEY")
    check_refusal(everett, anu.uri, tmp_path, 1, "no API key", "EVERETT_ANU_KEY")
    assert anu.device.asked == []


def test_an_appliance_that_is_not_there(quantis_appliance, tmp_path):
    quantis_appliance.device.close()
    check_refusal(everett, quantis_appliance.uri, tmp_path, 1, "refused|cannot be reached|connection", "check the network")


# --- below libc: cards, kernel generators, ChaosKeys ---


def test_the_emulated_nodes():
    reason = why_no_kernel_double()
    if reason:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to the other user of one test
        os.chmod(folder, 0o755)
        run_pytest(KernelDouble(Path(folder)), "emulated_commands.py")


# --- below libusb: a Quantis on the wire ---


@pytest.fixture(scope="module")
def wire(tmp_path_factory):
    missing = why_no_wire()
    if missing:
        pytest.skip(f"no USB device on the wire: {missing}")
    opened = Wire(build(tmp_path_factory.mktemp("umockdev")))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def client(wire):
    """A process in which the commands are run, as `everett` runs them here."""
    process = Client(wire)
    process.do(f"import sys; sys.path[:0] = [{str(TESTS)!r}]")
    process.do("import os, pytest\nfrom commands import everett\nfrom cli_checks import quicken")
    process.do("quicken(pytest.MonkeyPatch())")
    yield process
    process.close()


@pytest.fixture
def run(client):
    def command(*arguments):
        words = [str(word) for word in arguments]
        code, out, err = client.ask(f"(lambda r: (int(r.exit_code), r.stdout, r.stderr))(everett(*{words!r}))")
        return SimpleNamespace(exit_code=code, stdout=out, stderr=err)

    return command


@pytest.fixture
def wired(wire):
    for command in ("rate 0", "status 1", "ais31 0", "packets 0", f"plug {QUANTIS_SERIAL} 7"):
        wire.tell(command)
    listed = (f"quantis-usb:{QUANTIS_SERIAL}", QUANTIS_SERIAL, 5e5)
    yield Rig("quantis-usb:", "quantum", QUANTIS_SERIAL, lambda n: seeded_bytes(7, QUANTIS_DISCARDED, n), listed)
    wire.tell("unplug")


@pytest.mark.parametrize("check", CHECKS)
def test_it_is_well_on_the_wire(run, wired, check):
    check(run, wired)


def test_a_recording_is_the_devices_bytes_on_the_wire(run, wired, tmp_path):
    check_capture(run, wired, tmp_path)


def test_on_the_wire_without_permission(wire, wired, client, run, tmp_path):
    # As root, first: the other user may not be able to read the modules that the commands import.
    check_refusal(run, "quantis-usb:NONE", tmp_path, 3, "no such Quantis USB is attached", "connect the device")
    wire.forbid()
    client.do("mine = os.geteuid()\nif mine == 0: os.seteuid(65534)")
    try:
        with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to the other user
            os.chmod(folder, 0o777)
            said = "no permission to open /dev/bus/usb/001/"
            check_refusal(run, "quantis-usb:", Path(folder), 1, said, "--install-udev")
    finally:
        client.do("os.seteuid(mine)")


def test_on_the_wire_unplugged(wire, wired, run, tmp_path):
    wire.tell("fault unplug 100000")
    check_interruption(run, "quantis-usb:", tmp_path, 1, "is gone")
    check_refusal(run, "quantis-usb:", tmp_path, 3, "no such Quantis USB is attached", "connect the device")
