"""The `everett` command on Quantis cards, kernel generators and ChaosKeys; run by test_cli_on_devices.py in a preloaded
process."""

import gc
import json
import os

import pytest
from cli_checks import CHECKS, Rig, check_capture, check_interruption, check_refusal, quicken
from commands import everett
from devices.emulated import CHIP_START, MODULE_START, SEED, MiB
from devices.kernel_double import GONE, stream
from processes import in_forked_child

gc.collect()
gc.freeze()  # as devices.emulated does, with the command's own imports: half of the time was collecting these


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quicken(monkeypatch)


@pytest.fixture
def module_card(kernel):
    card = kernel.module_card(0, serial="M200X77")
    listed = ("quantis-pcie:M200X77", "M200X77", 2e6)
    return Rig("quantis-pcie:0", "quantum", "M200X77", lambda n: stream(SEED, MODULE_START, n), listed, device=card)


@pytest.fixture
def chip_card(kernel):
    card = kernel.chip_card(0, chips=2)
    listed = ("quantis-pcie:2101ABC240M", "2101ABC240M", 5e6)
    return Rig("quantis-pcie:", "quantum", "2101ABC240M", lambda n: stream(SEED, CHIP_START, n), listed, True, device=card)


@pytest.fixture
def hwrng(kernel):
    device = kernel.hwrng("tpm-rng-0")
    return Rig("hwrng:", "electronic", "tpm-rng-0", lambda n: stream(SEED, 64, n), ("hwrng:", "tpm-rng-0", None), True,
               device=device)  # fmt: skip


@pytest.fixture
def chaoskey(kernel):
    key = kernel.chaoskey(0)
    listed = ("chaoskey:00CAFE", "00CAFE", 1.25e6)
    return Rig("chaoskey:", "electronic", "00CAFE", lambda n: stream(SEED, 64, n), listed, True, device=key)


@pytest.fixture(params=["module_card", "chip_card", "hwrng", "chaoskey"])
def rig(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("check", CHECKS)
def test_it_is_well(rig, check):
    check(everett, rig)


def test_a_recording_is_the_devices_bytes(rig, tmp_path):
    check_capture(everett, rig, tmp_path)


# --- what stands in the way ---


def test_a_card_that_this_user_may_not_open(module_card, tmp_path):
    module_card.device.node.chmod(0 if os.getuid() else 0o600)
    folder = tmp_path if os.getuid() else module_card.device.kernel.root / "out"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o777)
    # As root, first: the other user may not be able to read the modules that the commands import.
    check_refusal(everett, "quantis-pcie:NONE", tmp_path, 3, "no such Quantis card", "name a card")

    def as_nobody():
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        report = check_refusal(everett, module_card.uri, folder, 1, "no permission|may not be read", "--install-udev")
        rows = json.loads(everett("devices", "--json").stdout)["devices"]
        (row,) = (r for r in rows if r["kind"] == "quantum")
        return report["findings"][-1]["check"], row["state"]

    assert in_forked_child(as_nobody) == "('permission', 'no permission')"


def test_a_card_with_a_dead_module(module_card, tmp_path):
    module_card.device.state.status = 0b1011
    check_refusal(everett, module_card.uri, tmp_path, 1, "0 to 3.* (2 failed|0, 1 and 3 do)", "modules=0xb", open_code=4)


def test_no_card(kernel, tmp_path):
    check_refusal(everett, "quantis-pcie:", tmp_path, 3, "no (such )?Quantis card", "lspci")


def test_a_card_is_taken_away_in_the_middle_of_a_recording(chip_card, tmp_path):
    chip_card.device.break_at(GONE, CHIP_START + MiB // 2)
    check_interruption(everett, chip_card.uri, tmp_path, 1, "is gone")


def test_a_kernel_without_a_current_generator(hwrng, tmp_path):
    hwrng.device.kernel.set_current("none")
    said = "no (current source|hardware generator).*available"
    check_refusal(everett, "hwrng:", tmp_path, 3, said, "load the kernel module")


def test_quantum_asked_of_a_tpm(hwrng, tmp_path):
    check_refusal(everett, "hwrng:?quantum=1", tmp_path, 1, "quantum=1 was asked for", "leave quantum=1 out")


def test_no_chaoskey(kernel, tmp_path):
    check_refusal(everett, "chaoskey:00CAFE", tmp_path, 3, "there is no such ChaosKey", "modprobe chaoskey")


def test_a_chaoskey_is_pulled_out_in_the_middle_of_a_recording(chaoskey, tmp_path):
    chaoskey.device.break_at(GONE, 100_000)
    check_interruption(everett, chaoskey.uri, tmp_path, 1, "is gone")
