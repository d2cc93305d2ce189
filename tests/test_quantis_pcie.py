"""quantis-pcie: the ioctl answers, look-alikes of the real kernel, pipes, and emulated cards in a preloaded process."""

import os
import resource
import signal
import tempfile
import threading
from pathlib import Path

import pytest
from devices.kernel_double import KernelDouble, run_pytest, why_not
from processes import in_forked_child
from source_checks import blocks, cut, nothing_left, take_until_end, wait_until

from everett_cuda.drivers import char_node, open_driver, quantis_ioctl
from everett_cuda.errors import SourceError
from everett_cuda.source import Source

# --- answers: numbers as in the vendor's header for Linux, worked out by hand ---


def test_request_numbers_are_linuxs():
    assert quantis_ioctl.DRIVER_VERSION == 0x80047100 and quantis_ioctl.CARD_COUNT == 0x80047101
    assert quantis_ioctl.MODULES_MASK == 0x80047102 and quantis_ioctl.BOARD_VERSION == 0x80047103
    assert quantis_ioctl.MODULES_STATUS == 0x80047108 and quantis_ioctl.PCI_ID == 0x80047109
    assert quantis_ioctl.AIS31_FLAG == 0x8004710A and quantis_ioctl.AIS31_CLEAR == 0x4004710B
    assert quantis_ioctl.SERIAL == 0x8100710C and quantis_ioctl.CURRENT_MODE == 0x8004710F


@pytest.mark.parametrize(
    "answer, serial",
    [
        (b"2101ABC240M\0\xab\xab", "2101ABC240M"),
        (b"2101ABC240M", "2101ABC240M"),
        (bytes(256), None),
        (b"\xff" * 256, None),
        (b"AB CD\0", None),
        (b"AB\x7f\0", None),
        (b"", None),
    ],
)
def test_serial_numbers(answer, serial):
    assert quantis_ioctl.decode_serial(answer) == serial


def test_versions_and_masks_in_words():
    assert quantis_ioctl.driver_version(202) == "20.2" and quantis_ioctl.driver_version(5) == "0.5"
    assert quantis_ioctl.chip_board_version(0x01020304) == "PCB 1, firmware 2.3.4"
    words = {0: "none", 1: "0", 0b11: "0 and 1", 0b1011: "0, 1 and 3", 0b1111: "0 to 3", 0xFFF: "0 to 11", 0b1110: "1 to 3"}
    for mask, text in words.items():
        assert quantis_ioctl.modules(mask) == text
    assert quantis_ioctl.mode_in_words(0, 2) == "RNG (processed in the card)"
    assert quantis_ioctl.mode_in_words(None, 2) == "unknown (the driver does not say)"


def test_answers_of_a_descriptor_that_is_no_card_are_errors():
    reading, writing = os.pipe()
    card = quantis_ioctl.Card(reading)
    assert card.word_if_known(quantis_ioctl.CURRENT_MODE) is None and card.serial() is None
    for ask in (lambda: card.word(quantis_ioctl.DRIVER_VERSION), card.clear_ais31):
        with pytest.raises(OSError, match="Inappropriate ioctl"):
            ask()
    os.close(reading)
    os.close(writing)
    with pytest.raises(OSError, match="Bad file"):
        card.word_if_known(quantis_ioctl.CURRENT_MODE)


# --- look-alikes of the real kernel ---


@pytest.mark.parametrize("unproven", ["", "?unproven=1"])
@pytest.mark.parametrize(
    "node, why",
    [
        ("/dev/urandom", r"the kernel's own \(device 1:9\), no generator"),
        ("/dev/zero", "the kernel's own"),
        ("/dev/null", "the kernel's own"),
        ("FILE", "a regular file, so it is a recording; open it with replay:"),
        ("FOLDER", "not a character device"),
        ("MISSING", "No such file"),
    ],
)
def test_what_can_never_be_a_card_is_refused_even_unproven(tmp_path, node, why, unproven):
    (tmp_path / "file").write_bytes(os.urandom(5000))
    path = {"FILE": tmp_path / "file", "FOLDER": tmp_path, "MISSING": tmp_path / "none"}.get(node, node)
    with nothing_left(), pytest.raises(SourceError, match=why):
        open_driver(f"quantis-pcie:{path}{unproven}")


def test_character_devices_pipes_and_links_are_refused_unless_unproven(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    master, slave = os.openpty()
    refused = {tmp_path / "pipe": "not proven", tmp_path / "link": "symbolic link", os.ttyname(slave): "not proven"}
    for path, why in refused.items():
        with nothing_left(), pytest.raises(SourceError, match=why):
            open_driver(f"quantis-pcie:{path}")
        driver = open_driver(f"quantis-pcie:{path}?unproven=1")
        assert (driver.kind, driver.serial) == ("simulated", str(path))
        driver.close()
    os.close(master)
    os.close(slave)


def test_a_pipe_is_read_by_request_until_its_writer_goes(tmp_path):
    path, data = tmp_path / "pipe", os.urandom(1 << 20)
    os.mkfifo(path)

    def write():
        with open(path, "wb", buffering=0) as pipe:
            pipe.write(bytes(10))  # dropped with the first read, together with what of the data comes with it
            for at in range(0, len(data), 65536):
                pipe.write(data[at : at + 65536])
            taken.wait(10)

    taken, writer = threading.Event(), threading.Thread(target=write)
    writer.start()
    with nothing_left(threads_too=False), Source.open(f"quantis-pcie:{path}?unproven=1") as opened:
        out = opened.take(200_000, timeout_s=10)
        with pytest.raises(SourceError, match="in use by this process"):
            open_driver(f"quantis-pcie:{path}?unproven=1")
        taken.set()
        more, error = take_until_end(opened)
        assert "nobody writes to it any more" in str(error) and "an unproven node cannot be told" in str(error)
    writer.join()
    # Where the first read ended is the kernel's doing: one of the offsets up to 64 KiB explains all.
    got = cut(out + more)
    start = next(s for s in range(65536 + 1) if blocks(data[s : s + 80])[0] == got[0])
    assert got == blocks(data[start:])[: len(got)]


def test_without_descriptors_the_error_names_the_device(tmp_path):
    os.mkfifo(tmp_path / "pipe")

    def child():
        driver = open_driver(f"quantis-pcie:{tmp_path}/pipe?unproven=1")
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        return driver.readinto(memoryview(bytearray(10)), 0.1)

    assert "SourceError('unproven node" in (said := in_forked_child(child)) and "cannot be read: duplicating" in said


# --- questions that hang ---


def test_a_question_is_answered_refused_or_given_up(monkeypatch):
    monkeypatch.setattr(char_node, "ANSWER_S", 0.1)
    late, discarded = threading.Event(), []

    def slow():
        late.wait(10)
        return "late"

    assert char_node.answer_within(lambda: 7, "it", discarded.append) == 7
    with pytest.raises(ZeroDivisionError):
        char_node.answer_within(lambda: 1 // 0, "it", discarded.append)
    with pytest.raises(SourceError, match="it has not answered for 0.1 s"):
        char_node.answer_within(slow, "it", discarded.append)
    assert discarded == []
    late.set()
    wait_until(lambda: discarded == ["late"])


def test_ctrl_c_ends_the_wait_and_the_late_answer_is_discarded():
    late, discarded = threading.Event(), []

    def slow():
        late.wait(10)
        return "late"

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            char_node.answer_within(slow, "it", discarded.append)
    finally:
        signal.signal(signal.SIGALRM, before)
    late.set()
    wait_until(lambda: discarded == ["late"])


# --- emulated cards ---


def test_the_emulated_cards():
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to the other user of one test
        os.chmod(folder, 0o755)
        files = (f"emulated_quantis_{about}.py" for about in ("cards", "faults", "look_alikes"))
        run_pytest(KernelDouble(Path(folder)), *files)
