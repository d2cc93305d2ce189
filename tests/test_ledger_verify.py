"""What `verify` finds: forgeries, wrong signers, counts that cannot be, attestations, and what was served twice."""

import copy
import re

import pytest
from devices.web_server import KEY, WebServer
from ledger_checks import Run, chained, records_of, until, written

from everett_cuda.errors import LedgerError, SourceError
from everett_cuda.ledgers.verify import NOT_PROVED, verify_ledgers
from everett_cuda.ledgers.writer import Ledger
from everett_cuda.source import Source

signature = pytest.importorskip("everett_cuda.ledgers.signature")
pytest.importorskip("cryptography", reason="needs the extra 'sign'")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def keys(tmp_path):
    """Two signers: (path of the private key, public key) each."""
    (tmp_path / "keys").mkdir()
    return [(path, signature.generate(path).public) for path in (tmp_path / "keys" / "a", tmp_path / "keys" / "b")]


@pytest.fixture
def sim():
    with Source.open("sim:seed=5", ring_bytes=16384) as source:
        yield source


def verdict(path, key=None):
    (found,) = verify_ledgers([path], key).ledgers
    return found


# --- signers ---


def test_a_signature_counts_against_a_key_from_elsewhere_only(folder, keys, sim):
    (private, public), (_, other) = keys
    path = written(folder / "run.evl", sim, key=private, counts=2)
    lines = len(records_of(path))
    good = verdict(path, public)
    assert good.words == "consistent, signed by the given key" and not good.problems
    assert (good.signed_by, good.signed_lines, good.lines) == (public, lines, lines)
    unchecked = verdict(path)
    assert unchecked.words == "consistent, signer not checked" and not unchecked.problems
    wrong = verdict(path, other)
    assert wrong.words == "consistent, NOT signed by the given key" and other not in str(wrong.problems)
    unsigned = written(folder / "unsigned.evl", sim)
    assert verdict(unsigned).words == "consistent, NOT SIGNED: anybody could have written it"
    assert not verdict(unsigned).problems and verdict(unsigned, public).problems == ["it is not signed"]


def test_a_forger_without_the_key_is_found(folder, keys, sim):
    (private, public), (own, own_public) = keys
    path = written(folder / "run.evl", sim, key=private, counts=2)
    records = records_of(path)
    forged = folder / "forged.evl"

    def words(changed):
        found = verdict(chained(forged, changed), public)
        assert found.problems and found.chain == "whole"
        return found.signer, found.problems[0]

    counts = next(i for i, r in enumerate(records) if r["type"] == "counts")
    changed = copy.deepcopy(records)
    changed[counts]["sources"]["1"]["transport_errors"] += 1
    for r in changed[counts + 1 :]:
        if r["type"] == "counts":
            r["sources"]["1"]["transport_errors"] += 1
    assert words(changed) == ("wrong", f"the signature in line {counts + 2} is wrong")
    unsigned = [r for r in changed if r["type"] != "signature"]
    assert words(unsigned) == ("unsigned", "it is not signed, although its first record names a key")
    unsigned[0] = {**unsigned[0], "signed_by": None}
    assert words(unsigned) == ("unsigned", "it is not signed")
    other = records_of(written(folder / "other.evl", sim, key=own))
    assert words(other) == ("wrong", f"it is signed by {own_public}, not by the given key")
    other[0] = {**other[0], "signed_by": public}
    assert words(other)[1].endswith("is signed by another key than the first record names")
    # the last signature is left out: what stands behind the one before is anybody's
    assert words(records[:-1]) == ("verified", "its end is not signed")


@pytest.mark.parametrize("sign", [False, True])
def test_every_cut_is_unfinished_and_says_how_far_it_is_signed(folder, keys, sign):
    private, public = keys[0]
    path = written(folder / "run.evl", key=private if sign else None, counts=2)
    lines = path.read_bytes().splitlines(keepends=True)
    kinds = [r["type"] for r in records_of(path)]
    cut = folder / "cut.evl"
    for n in range(1, len(lines) - 1 - sign):
        cut.write_bytes(b"".join(lines[:n]) + lines[n][:7])
        found = verdict(cut, public if sign else None)
        assert found.chain == "unfinished" and found.words.startswith(f"unfinished: consistent to line {n}, ")
        assert "7 bytes of a torn line" in found.problems[0]
        signed = max((i + 1 for i in range(n) if kinds[i] == "signature"), default=0)
        assert found.signed_lines == signed
        if sign and signed:
            assert found.words.endswith("signed by the given key" + (f", but only to line {signed}" if signed < n else ""))


def test_nothing_may_stand_behind_the_end(folder, keys):
    for key in (None, keys[0][0]):
        path = written(folder / f"{key is None}.evl", key=key)
        records = records_of(path)
        for more in (records[-2:-1], [records[0]], records[-1:]):
            found = verdict(chained(folder / "more.evl", records + more))
            assert found.chain == "broken" and "something stands behind its end" in found.problems
        (folder / "torn.evl").write_bytes(path.read_bytes() + b"{")
        assert verdict(folder / "torn.evl").chain == "broken"


def test_a_broken_chain_is_told_with_its_line(folder):
    path = written(folder / "run.evl", counts=3)
    path.write_bytes(path.read_bytes().replace(b'"why":"asked for"', b'"why":"asked fox"', 1))
    found = verdict(path)
    assert found.chain == "broken" and found.words.startswith("BROKEN: consistent to line 2 only")
    assert found.problems[0].startswith("the chain breaks at line 3: it does not follow the line before it")


# --- arithmetic ---


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda c: c["draws"].update(fresh=9), "the draws are not the sum of their kinds"),
        (lambda c: c["draws"].update(draws=1, fresh=1), "fresh goes back"),
        (lambda c: c["sources"]["1"].update(bytes_handed_out=10**9), "handed out more than was conditioned"),
        (lambda c: c["sources"]["1"].update(conditioned_bytes_out=10**9), "conditioned more than came in"),
        (lambda c: c["sources"]["1"].update(transport_errors=-1), "transport_errors of source 1 goes back"),
        (lambda c: c.update(keyring=-1), "steps or keyrings go back"),
        (lambda c: c.update(steps=-1), "steps or keyrings go back"),
    ],
)
def test_counts_that_cannot_be(folder, sim, change, said):
    path = folder / "run.evl"
    with Ledger(path, Run(sim, fresh=2, stretched=1), interval_s=600) as ledger:
        sim.take(64)
        ledger.count()
    assert verify_ledgers([path]).good
    records = records_of(path)
    change(records[-2])
    found = verdict(chained(folder / "forged.evl", records))
    assert [p for p in found.problems if said in p], found.problems


def test_records_of_a_source_that_was_never_opened(folder, sim):
    records = [r for r in records_of(written(folder / "run.evl", sim)) if r["type"] != "source"]
    with pytest.raises(LedgerError, match="line 2 is about source 1, which was never opened"):
        verify_ledgers([chained(folder / "forged.evl", records)])


# --- several ledgers ---


def test_one_run_in_two_files_and_one_file_twice(folder, sim):
    path = written(folder / "run.evl", sim)
    (folder / "copy.evl").write_bytes(path.read_bytes())
    both = verify_ledgers([path, folder / "copy.evl"])
    assert not both.good and both.across[0].startswith("one run in several files: ")
    with pytest.raises(LedgerError, match="named twice"):
        verify_ledgers([path, folder / ".." / "run" / "run.evl"])
    assert verify_ledgers([path, written(folder / "two.evl", sim)]).good


def test_a_response_that_two_hosts_were_served_is_named_with_both(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("EVERETT_QRYPT_TOKEN", KEY)
    paths = []
    for machine, seed in (("one", b"same"), ("two", b"same"), ("three", b"other")):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / machine))
        monkeypatch.setattr("socket.gethostname", lambda machine=machine: machine)
        with WebServer(seed=seed) as server, Source.open(f"qrypt:?size=4&url={server.url}") as source:
            paths.append(written(folder / f"{machine}.evl", source))
            served = [len(data) for data in server.served]
        rows = [row for r in records_of(paths[-1]) if r["type"] == "responses" for row in r["responses"]]
        assert rows and [row["n_bytes"] for row in rows] == served[: len(rows)]
        assert len(paths) != 1 or verify_ledgers(paths).good
    repeated = verify_ledgers(paths)
    assert not repeated.good and len(repeated.across) == len(
        {row["commitment"] for r in records_of(paths[0]) if r["type"] == "responses" for row in r["responses"]}
    )
    for text in repeated.across:
        assert text.startswith("one response of 4096 bytes was served 2 times (commitment ")
        assert " on one at 20" in text and " on two at 20" in text and " on three " not in text
    assert verify_ledgers(paths[1:]).good


# --- attestations ---


@pytest.fixture
def device(tmp_path, monkeypatch):
    from devices.qcicada import QCicada

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with QCicada(tmp_path / "ttyUSB0") as opened:
        (tmp_path / "root.pem").write_bytes(opened.root_pem())
        yield opened


def attested(path, device):
    with Source.open(f"qcicada:{device.path}?attest=1", ring_bytes=16384) as source:
        return written(path, source)


def test_a_signed_read_is_checked_again_and_trusted_for_what_it_is(folder, device, tmp_path):
    path = attested(folder / "run.evl", device)
    (record,) = [r for r in records_of(path) if r["type"] == "attestation"]
    assert (record["bytes"], record["signature"]) == tuple(part.hex() for part in device.signed[0])
    (source,) = [r for r in records_of(path) if r["type"] == "source"]
    assert not {"signature", "attested bytes"} & source["device"].keys() and "firmware" in source["device"]
    (text,) = verdict(path).attestations
    assert "signed 64 bytes at 20" in text and text.endswith("trust on first use, because no root key was given")
    (found,) = verify_ledgers([path], root=str(tmp_path / "root.pem")).ledgers
    assert found.attestations[0].endswith("genuine device: the given root certified it as QC0000000217, CICADA-QRNG-1.1")
    with pytest.raises(SourceError, match="root="):
        verify_ledgers([path], root=str(path))


@pytest.mark.parametrize(
    "field, said",
    [
        ("bytes", "the signature of the attestation by QC0000000217 is wrong"),
        ("signature", "the signature of the attestation by QC0000000217 is wrong"),
        ("key", "malformed|is wrong"),
        ("certificate", "the root key does not vouch for QC0000000217"),
    ],
)
def test_a_changed_attestation_is_found(folder, device, tmp_path, field, said):
    records = records_of(attested(folder / "run.evl", device))
    (record,) = [r for r in records if r["type"] == "attestation"]
    for spoilt in (record[field][:-1] + format(int(record[field][-1], 16) ^ 1, "x"), "xyz"):
        record[field] = spoilt
        path = chained(folder / "forged.evl", records)
        (found,) = verify_ledgers([path], root=str(tmp_path / "root.pem")).ledgers
        assert not found.attestations
        assert re.search(f"{said}|malformed", found.problems[0])


def test_a_read_that_is_given_again_is_an_alarm(folder, device, tmp_path, monkeypatch):
    first = attested(folder / "one.evl", device)
    device.replay_signature = True
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))  # a host that has not seen the first
    second = attested(folder / "two.evl", device)
    assert verify_ledgers([first]).good and verify_ledgers([second]).good
    both = verify_ledgers([first, second])
    assert both.alarm and not both.good and both.across[-1].startswith("ALARM: a signed read was given more than once")


def test_two_ledgers_of_one_opening_hold_the_same_read(folder, device):
    with Source.open(f"qcicada:{device.path}?attest=1", ring_bytes=16384) as source:
        paths = [written(folder / f"{n}.evl", source) for n in range(2)]
    assert verify_ledgers(paths).good


def test_another_key_of_the_same_serial_number_is_told(folder, device, tmp_path, monkeypatch):
    from devices.qcicada import QCicada

    first = attested(folder / "one.evl", device)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
    with QCicada(tmp_path / "ttyUSB1", seed=2) as other:
        second = attested(folder / "two.evl", other)
    both = verify_ledgers([first, second])
    assert not both.good and both.across[0].startswith("QC0000000217 signs with several keys (")


def test_a_device_that_was_plugged_in_again_is_attested_again(folder, device):
    path = folder / "run.evl"
    with Source.open(f"qcicada:{device.path}?attest=1", ring_bytes=16384) as source:
        with Ledger(path, Run(source), interval_s=0.1):
            device.unplug()
            device.plug()
            source.take(50_000, timeout_s=20)
            until(lambda: len([r for r in records_of(path) if r["type"] == "attestation"]) == 2)
    last = [r for r in records_of(path) if r["type"] == "counts"][-1]["sources"]["1"]
    assert (last["reconnections"], last["startup_tests"]) == (1, 2) and last["transport_errors"] >= 1
    assert len(verdict(path).attestations) == 2 and verify_ledgers([path]).good


def test_it_says_what_it_does_not_prove():
    text = " ".join(NOT_PROVED)
    assert "quantum" in text and "no other runs were made" in text
