"""Attestation of a QCicada: what a signed read proves, whom it is trusted from, and that its bytes are never used."""

import hashlib
import os
import stat
import threading

import pytest
from devices.qcicada import CAPACITY, QCicada, raw_key

from everett_cuda.drivers import open_driver, qcicada, serial_port
from everett_cuda.drivers.qcicada_finding import identify
from everett_cuda.drivers.qcicada_protocol import Info
from everett_cuda.errors import BadParameter, HealthAlarm, SourceError
from everett_cuda.source import Source

attestation = pytest.importorskip("everett_cuda.drivers.qcicada_attestation", reason="needs the extra 'sign'")


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    """The folder in which attestation reads are remembered."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "everett"


@pytest.fixture
def device(tmp_path):
    with QCicada(tmp_path / "ttyUSB0") as device:
        yield device


def opened(device, query="attest=1"):
    driver = open_driver(f"qcicada:{device.path}?{query}")
    driver.close()
    return driver.details


# --- published vectors: RFC 6979, A.2.5 (P-256, SHA-256) ---

KEY = bytes.fromhex(
    "60FED4BA255A9D31C961EB74C6356D68C049B8923B61FA6CE669622E60F29FB6"
    "7903FE1008B8BC99A41AE9E95628BC64F2F1B20C2D7E9F5177A3C294D4462299"
)
SIGNATURES = {
    b"sample": "EFD48B2AACB6A8FD1140DD9CD45E81D69D2C877B56AAF991C34D0EA84EAF3716"
    "F7CB1C942D657C41D436C7A1B6E29F65F3E900DBB9AFF4064DC4AB2F843ACDA8",
    b"test": "F1ABB023518351CD71D881567B1EA663ED3EFCF6C5132B354F28D3B0B7D38367"
    "019F4113742A2B14BD25926B49C649155F267E60D3814B4C0CC84250E46F0083",
}


def test_published_signatures_verify_and_no_others():
    key = attestation.load_key(KEY)
    for message, signature in SIGNATURES.items():
        signature = bytes.fromhex(signature)
        assert attestation.verify(key, message, signature)
        for i in (0, 31, 32, 63):
            wrong = signature[:i] + bytes([signature[i] ^ 1]) + signature[i + 1 :]
            assert not attestation.verify(key, message, wrong)
        assert not attestation.verify(key, message + b"x", signature)
        assert not attestation.verify(key, message, signature[:63]) and not attestation.verify(key, message, b"")
        assert not attestation.verify(key, message, bytes(64))
    for wrong in (KEY[:63], KEY[:63] + b"\x00", bytes(64), b""):
        with pytest.raises(ValueError):
            attestation.load_key(wrong)


def test_the_certified_message_is_as_published():
    # qcicada 0.2.2, test_crypto.py: 00 00, hardware 1 and 2, 217 in 4 bytes little endian, the key
    info = Info(0x1000C, 0x5000E, "QC0000000217", "CICADA-QRNG-1.2")
    assert attestation.certified_message(info, b"\xaa" * 64) == bytes.fromhex("00000102d9000000") + b"\xaa" * 64
    for serial, hardware in (("QC1x", "CICADA-QRNG-1.1"), ("QC1", "FIREFLY-1.1"), ("QC4294967296", "CICADA-QRNG-1.1")):
        with pytest.raises(SourceError, match="cannot be checked"):
            attestation.certified_message(Info(1, 1, serial, hardware), bytes(64))


# --- verdicts ---


def test_without_a_root_a_key_is_trusted_on_first_use(device):
    key = hashlib.sha256(raw_key(device.key.public_key())).hexdigest()
    details = opened(device)
    assert details["attestation"] == f"key {key[:16]} signed 64 bytes; trust on first use: this key was not seen before"
    (data, signature), *_ = device.signed
    assert (details["attested bytes"], details["signature"]) == (data.hex(), signature.hex())
    assert attestation.fingerprint(bytes.fromhex(details["device key"])) == key
    assert len(bytes.fromhex(details["certificate"])) == 64 and details["attested at"].endswith("Z")
    again = opened(device)["attestation"]
    assert again.startswith(f"key {key[:16]} signed 64 bytes; trust on first use: this key was first seen on 20")
    assert "genuine" not in details["attestation"] + again


def test_only_a_configured_root_makes_a_device_genuine(device, tmp_path):
    (tmp_path / "root.pem").write_bytes(device.root_pem())
    (tmp_path / "root.hex").write_text(raw_key(device.root.public_key()).hex() + "\n")
    for name in ("root.pem", "root.hex"):
        verdict = opened(device, f"attest=1&root={tmp_path / name}")["attestation"]
        assert verdict.endswith("genuine device: the configured root certified it as QC0000000217, CICADA-QRNG-1.1")
    with QCicada(tmp_path / "other") as other:
        (tmp_path / "other.pem").write_bytes(other.root_pem())
        with pytest.raises(SourceError, match="was not signed by the key in root=; it may be an imitation"):
            opened(device, f"attest=1&root={tmp_path / 'other.pem'}")
    device.serial = "QC0000000218"  # a certificate is for one serial number
    with pytest.raises(SourceError, match="may be an imitation"):
        opened(device, f"attest=1&root={tmp_path / 'root.pem'}")


def test_roots_that_are_no_roots_are_refused(device, tmp_path):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "ed25519").write_bytes(ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(*form))
    (tmp_path / "p384").write_bytes(ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(*form))
    (tmp_path / "junk").write_bytes(b"junk")
    (tmp_path / "no point").write_text("11" * 64)
    for name in ("ed25519", "p384", "junk", "no point", "missing"):
        with pytest.raises(SourceError, match="root="):
            opened(device, f"attest=1&root={tmp_path / name}")
    with pytest.raises(BadParameter, match="give attest=1 with it"):
        opened(device, f"root={tmp_path / 'ed25519'}")
    assert device.signed == []


def test_a_device_that_has_made_nothing_yet_is_waited_for(device):
    device.allowance = 63
    threading.Timer(0.3, setattr, (device, "allowance", 10_000)).start()
    assert "signed 64 bytes" in opened(device)["attestation"]


def test_a_wrong_signature_is_refused(device, state):
    device.bad_signature = True
    with pytest.raises(SourceError, match="the signature of an attestation read is wrong"):
        opened(device)
    assert not state.exists()


def test_firmware_that_signs_nothing_is_named(tmp_path):
    with QCicada(tmp_path / "tty", firmware=(5, 12)) as device:
        with pytest.raises(SourceError, match=r"QC0000000217 signs nothing .*firmware 5.13; omit attest=1"):
            opened(device)
        assert "attestation" not in opened(device, "attest=0")


def test_a_replayed_signature_is_an_alarm_even_after_a_restart(device, tmp_path):
    opened(device)
    device.replay_signature = True
    for _ in range(2):
        with pytest.raises(HealthAlarm, match="gave an attestation read that it had given before"):
            opened(device)
    with pytest.raises(HealthAlarm):
        Source.open(f"qcicada:{device.path}?attest=1")
    (tmp_path / "root.pem").write_bytes(device.root_pem())
    with pytest.raises(HealthAlarm):  # a genuine key does not make an old answer new
        opened(device, f"attest=1&root={tmp_path / 'root.pem'}")
    device.replay_signature = False
    opened(device)


def test_auto_does_not_pass_over_an_alarm(device, tmp_path, monkeypatch):
    names = tmp_path / "by-id"
    names.mkdir()
    (names / "usb-Crypta_Labs_QCicada_A-if00-port0").symlink_to(os.path.realpath(device.path))
    monkeypatch.setattr(serial_port, "BY_ID", names)
    opened(device)
    device.replay_signature = True
    monkeypatch.setattr(qcicada.QCicadaDriver, "attached", classmethod(lambda cls: [
        qcicada.Attached(f"qcicada:{device.path}?attest=1", "QCicada", "A", "quantum", None)]))  # fmt: skip
    with pytest.raises(HealthAlarm):
        open_driver("auto")


def test_another_key_of_a_known_device_is_refused_unless_a_root_vouches_for_it(device, tmp_path, state):
    opened(device)
    with QCicada(tmp_path / "imitation") as imitation:  # the same serial number, another key
        with pytest.raises(SourceError, match=r"signs with key \w{16}, and it signed with \w{16} before.*root=FILE"):
            opened(imitation)
        (tmp_path / "root.pem").write_bytes(imitation.root_pem())
        assert "genuine" in opened(imitation, f"attest=1&root={tmp_path / 'root.pem'}")["attestation"]
    assert (state / "qcicada-QC0000000217.attested").read_text().count("key ") == 2


# --- memory ---


def test_reads_are_remembered_in_a_private_file_a_device(device, state):
    opened(device)
    path = state / "qcicada-QC0000000217.attested"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(state.stat().st_mode) == 0o700
    data, signature = device.signed[0]
    key, read = path.read_text().splitlines()
    assert key.split()[:2] == ["key", hashlib.sha256(raw_key(device.key.public_key())).hexdigest()]
    assert read.split()[:3] == ["read", hashlib.sha256(data).hexdigest(), hashlib.sha256(signature).hexdigest()]
    with open(path, "a") as file:
        file.write("read 12")  # a crash cut a line short
    opened(device)
    assert len(path.read_text().splitlines()) == 4 and path.read_text().splitlines()[2] == "read 12"
    device.replay_signature = True
    with pytest.raises(HealthAlarm):
        opened(device)


def test_a_memory_that_cannot_be_trusted_is_refused(device, state, tmp_path):
    state.mkdir(parents=True)
    (tmp_path / "elsewhere").write_text("")
    (state / "qcicada-QC0000000217.attested").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match="attestation reads must be remembered"):
        opened(device)
    assert (tmp_path / "elsewhere").read_text() == ""


# --- apart from the stream ---


@pytest.mark.parametrize("mode", ["oneshot", "continuous"])
def test_attested_bytes_are_published_and_never_used(device, mode):
    with Source.open(f"qcicada:{device.path}?attest=1&mode={mode}") as source:
        out = source.take(3200, timeout_s=20)
        published = source.status().device["attested bytes"]
        assert f"attested bytes {published}" in str(source.status())
    raw = bytes(device.sent[CAPACITY:])  # of what went out unsigned, all that came after the opening
    assert out == b"".join(hashlib.sha256(raw[i : i + 80]).digest() for i in range(0, 8000, 80))
    assert bytes.fromhex(published) == device.signed[0][0] and bytes.fromhex(published) not in raw
    assert len(device.signed) == 1


def test_a_device_that_was_plugged_in_again_is_attested_again(device):
    with Source.open(f"qcicada:{device.path}?attest=1", ring_bytes=16384) as source:
        first = source.status().device["signature"]
        device.unplug()
        device.plug()
        source.take(50_000, timeout_s=20)
        assert source.status().device["signature"] != first and len(device.signed) == 2


def test_the_record_can_be_checked_by_anybody(device):
    link, info = identify(str(device.path))
    record = attestation.attest(link, info, device.root.public_key())
    serial_port.close_port(link.port)
    assert record.genuine and record.serial == device.serial and len(record.data) == attestation.READ_BYTES
    assert attestation.verify(attestation.load_key(record.key), record.data, record.signature)
    assert record.details()["attested bytes"] == record.data.hex()
