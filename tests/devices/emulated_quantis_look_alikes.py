"""Look-alikes of Quantis cards, other processes, closing, and the doctor; run by test_quantis_pcie.py."""

import os
import subprocess
import threading
import time

import pytest
from devices.emulated import examine, read, verdicts
from devices.kernel_double import GONE, HANG
from processes import in_forked_child
from source_checks import nothing_left, take_until_end, wait_until

from everett_cuda.drivers import DeviceLost, attached, open_driver
from everett_cuda.errors import SourceError
from everett_cuda.source import Source

# --- look-alikes ---


def look_alike(kernel, kind):
    node = kernel.root / "dev/qrandom0"
    if kind == "link":
        kernel.chip_card(1)
        node.symlink_to("qrandom1")
    elif kind == "pipe":
        os.mkfifo(node)
    elif kind == "daemon":
        kernel.foreign("qrandom0", "cuse")
    elif kind == "phone":
        kernel.foreign("qrandom0", "misc")
    elif kind == "class without card":
        kernel.foreign("qrandom0", "qrandom")
    elif kind == "no answers":
        kernel.pci_card("0000:04:00.0", 0x179A, 1)
        kernel.foreign("qrandom0", "qrandom")
    elif kind == "other major":
        kernel.module_card(1)
        kernel.foreign("qrandom0", "qrandom")
    elif kind == "unknown number":
        kernel.foreign("qrandom0", "cuse")
        (kernel.root / "sys/dev/char/235:0").unlink()


ALIKE = {
    "link": "it is a symbolic link",
    "pipe": "not a character device",
    "daemon": "under class cuse, not under",
    "phone": "under class misc",
    "class without card": "no card 179a:0001 is on the PCI bus",
    "no answers": r"does not answer .*requests 0 and 3 \(Inappropriate ioctl",
    "other major": "names 250 as the driver's major number, and the node's is 235",
    "unknown number": "under no class",
}


@pytest.mark.parametrize("kind", ALIKE)
def test_look_alikes_are_refused_and_never_listed(kernel, kind):
    look_alike(kernel, kind)
    with pytest.raises(SourceError, match=ALIKE[kind]):
        open_driver("quantis-pcie:0")
    found = examine("quantis-pcie:0")
    assert found[-1].verdict == "fail" and all(f.verdict != "fail" for f in found[:-1])
    states = {row.uri: row.state for row in attached()[0]}
    assert "proven" in states.get("quantis-pcie:0", "proven")


@pytest.mark.parametrize("kind", [k for k in ALIKE if k not in ("link", "pipe")])
def test_unproven_nodes_are_read_by_request_and_never_called_quantum(kernel, kind):
    look_alike(kernel, kind)
    with Source.open("quantis-pcie:0?unproven=1") as opened:
        opened.take(1000)
        status = opened.status()
    assert (status.kind, status.label) == ("simulated", "NOT QUANTUM (simulated)")
    assert status.name.startswith("unproven node /dev/qrandom0")
    assert status.device["proof"].startswith("none (unproven=1): ")
    assert verdicts("quantis-pcie:0?unproven=1")["proof"] == "note"


def test_a_link_to_a_real_card_is_followed_by_request_and_proven(kernel):
    look_alike(kernel, "link")
    driver = open_driver("quantis-pcie:0?unproven=1")
    assert (driver.kind, driver.serial) == ("quantum", "2101ABC240M")  # the proof is the descriptor's, not the name's
    driver.close()


def test_an_unproven_node_that_was_lost_is_not_taken_again(kernel, impatient):
    kernel.foreign("qrandom0")
    node = kernel.root / "dev/qrandom0"
    with Source.open("quantis-pcie:0?unproven=1") as opened:
        opened.take(1000)
        kernel._nodes[0].fault_at, kernel._nodes[0].fault = 0, GONE
        node.unlink()
        _, error = take_until_end(opened)
        assert "an unproven node cannot be told from another one" in str(error)


# --- others who use it ---


def test_a_second_process_is_refused_with_the_name_of_the_first(kernel):
    kernel.chip_card(0)
    says, opened = os.pipe()
    may_go, go = os.pipe()
    other = os.fork()
    if other == 0:
        os.close(go)
        open_driver("quantis-pcie:0")
        os.write(opened, b"open")
        os.read(may_go, 1)
        os._exit(0)
    try:
        assert os.read(says, 4) == b"open"
        with pytest.raises(SourceError, match=rf"/dev/qrandom0 is in use by .* \(pid {other}\)"):
            open_driver("quantis-pcie:0")
        assert f"(pid {other})" in attached()[0][0].state
        assert verdicts("quantis-pcie:0")["other process"] == "fail"
    finally:
        for fd in (go, may_go, says, opened):
            os.close(fd)
        os.waitpid(other, 0)
    open_driver("quantis-pcie:0").close()


def test_a_process_that_only_reads_along_is_a_note(kernel):
    kernel.chip_card(0)
    other = subprocess.Popen(["sleep", "60"], stdin=open(kernel.root / "dev/qrandom0", "rb"))  # noqa: SIM115
    try:
        found = {f.check: f for f in examine("quantis-pcie:0")}
        assert found["other process"].verdict == "note" and f"sleep (pid {other.pid})" in found["other process"].text
        assert list(found)[-1] == "modules"
    finally:
        other.kill()
        other.wait()


def test_a_forked_child_does_not_keep_the_card(kernel):
    kernel.chip_card(0)
    driver = open_driver("quantis-pcie:0")
    read(driver, 100)
    assert "forked from" in in_forked_child(lambda: driver.readinto(memoryview(bytearray(10)), 0.1))
    in_forked_child(driver.close)
    with pytest.raises(SourceError, match="in use by this process"):
        open_driver("quantis-pcie:0")
    assert len(read(driver, 100)) == 100
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        driver.close()
        open_driver("quantis-pcie:0").close()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_without_permission_the_error_has_the_udev_rule(kernel):
    kernel.module_card(0)
    (kernel.root / "dev/qrandom0").chmod(0o600)
    if os.getuid() != 0:
        (kernel.root / "dev/qrandom0").chmod(0)

    def as_nobody():
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        assert attached()[0][0].state == "no permission"
        assert verdicts("quantis-pcie:0") == {"card": "ok", "kernel driver": "ok", "node": "ok", "permission": "fail"}
        return open_driver("quantis-pcie:0")

    said = in_forked_child(as_nobody)
    assert "no permission; run `sudo everett doctor --install-udev`" in said and 'SUBSYSTEM=="qrandom"' in said


# --- the end ---


def test_close_twice_while_another_thread_reads(kernel):
    kernel.chip_card(0, bytes_per_s=1000)
    driver = open_driver("quantis-pcie:0")
    errors = []

    def reads():
        try:
            while True:
                driver.readinto(memoryview(bytearray(100)), 5.0)
        except SourceError as error:
            errors.append(error)

    thread = threading.Thread(target=reads)
    thread.start()
    time.sleep(0.1)
    driver.close()
    driver.close()
    thread.join(2.0)
    assert len(errors) == 1 and isinstance(errors[0], DeviceLost) and "was closed" in str(errors[0])
    for call in (lambda: driver.readinto(memoryview(bytearray(100)), 0.1), lambda: driver.reconnect(0.1)):
        with pytest.raises(DeviceLost, match="was closed"):
            call()
    kernel._nodes[0].bytes_per_s = 0  # lets the read return that the close had to leave behind


def test_nothing_is_left_after_many_openings(kernel):
    kernel.chip_card(0)
    with nothing_left():
        tasks = len(os.listdir("/proc/self/task"))
        for _ in range(200):
            driver = open_driver("quantis-pcie:0")
            while driver.readinto(memoryview(bytearray(100)), 1.0) == 0:
                pass
            driver.close()
        wait_until(lambda: len(os.listdir("/proc/self/task")) <= tasks)


# --- the doctor ---


def test_the_doctor_finds_a_healthy_card(kernel):
    kernel.chip_card(0, mode=1)
    assert verdicts("quantis-pcie:") == dict.fromkeys(
        ("card", "kernel driver", "node", "permission", "other process", "proof", "firmware", "mode", "modules"), "ok"
    )


def test_the_doctor_stops_at_what_stands_in_the_way(kernel):
    assert verdicts("quantis-pcie:") == {"card": "fail"}
    kernel.pci_card("0000:03:00.0", 0x1E89, 3, "vfio-pci")
    last = examine("quantis-pcie:")[-1]
    assert (last.check, last.verdict) == ("kernel driver", "fail") and "quantis_chip_pcie" in last.next_step
    kernel.clear()
    card = kernel.chip_card(0)
    assert verdicts("quantis-pcie:7")["node"] == "fail"
    assert verdicts("quantis-pcie:")["mode"] == "note"
    card.state.status = 0x7FF
    last = examine("quantis-pcie:")[-1]
    assert (last.check, last.verdict) == ("modules", "fail") and "modules=0x7ff" in last.next_step
    assert examine("quantis-pcie:?modules=0x7ff")[-1].verdict == "ok"
    card.state.fault = HANG
