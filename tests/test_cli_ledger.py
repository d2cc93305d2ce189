"""`everett ledger` and `everett verify`: their words, their exit codes, and that they start no heavy module."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from commands import everett
from ledger_checks import records_of, written

from everett_cuda.source import Source

pytest.importorskip("cryptography", reason="needs the extra 'sign'")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run, which is the current one."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def key(run, tmp_path):
    made = everett("ledger", "keygen")
    assert made.exit_code == 0
    return tmp_path / "config" / "everett" / "ledger.key"


@pytest.fixture
def signed(run, key):
    with Source.open("sim:seed=5", ring_bytes=16384) as source:
        source.take(320)
        return written(run / "run.evl", source, key=key, fresh=9, stretched=3)


def test_a_key_is_made_outside_the_run(run, key, tmp_path):
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and key.with_name("ledger.key.pub").exists()
    again = everett("ledger", "keygen")
    assert again.exit_code == 1 and "never written over" in again.stderr
    inside = everett("ledger", "keygen", "--out", "k")
    assert inside.exit_code == 1 and "in the run's folder" in inside.stderr and not list(run.iterdir())
    made = everett("ledger", "keygen", "--out", tmp_path / "keys" / "k")
    assert made.exit_code == 0
    private = (tmp_path / "keys" / "k").read_text()
    assert "PRIVATE" not in made.output and not any(line in made.output for line in private.splitlines())


def test_show_sums_up(signed):
    shown = everett("ledger", "show", signed)
    assert shown.exit_code == 0
    assert "sim:seed=5: simulated source (Philox, seed 5), serial seed-5" in shown.stdout
    assert "NOT QUANTUM (simulated)" in shown.stdout and "320 handed out" in shown.stdout
    assert "keys:         9 fresh, 3 stretched" in shown.stdout and "signer not checked" in shown.stdout
    document = json.loads(everett("ledger", "show", signed, "--json").stdout)
    assert (document["draws"]["fresh"], document["ended"], document["damage"], document["torn_bytes"]) == (9, True, "", 0)
    data = signed.read_bytes()
    signed.write_bytes(data[:-600])
    assert "unfinished: it ends with line" in everett("ledger", "show", signed).stdout
    signed.write_bytes(data.replace(b'"why":"end"', b'"why":"enb"'))
    broken = everett("ledger", "show", signed)
    assert broken.exit_code == 1 and "BROKEN at line" in broken.stdout


def test_verify_with_and_without_the_key(signed, key):
    pub = f"{key}.pub"
    good = everett("verify", signed, "--key", pub)
    assert good.exit_code == 0 and good.stdout.startswith(f"{signed}: consistent, signed by the given key\n")
    public = records_of(signed)[0]["signed_by"]
    assert everett("verify", signed, "--key", public).stdout == good.stdout
    for words in ("not proved:", "that any bit was quantum", "that no other runs were made"):
        assert words in good.stdout
    unchecked = everett("verify", signed)
    assert unchecked.exit_code == 0 and "consistent, signer not checked" in unchecked.stdout
    other = everett("verify", signed, "--key", "11" * 32)
    assert other.exit_code == 1 and "NOT signed by the given key" in other.stdout
    for wrong in ("xyz", str(signed), "11" * 31):
        refused = everett("verify", signed, "--key", wrong)
        assert refused.exit_code == 2 and "--key" in refused.stderr
    document = json.loads(everett("verify", signed, "--key", pub, "--json").stdout)
    (found,) = document["ledgers"]
    assert document["good"] and (found["chain"], found["signer"], found["signed_by"]) == ("whole", "verified", public)


def test_verify_of_bad_files(signed, run):
    data = signed.read_bytes()
    (run / "cut.evl").write_bytes(data[:-500])
    cut = everett("verify", "cut.evl")
    assert cut.exit_code == 1 and re.search(r"unfinished: consistent to line \d+, signer not checked", cut.stdout)
    (run / "torn.evl").write_bytes(data.replace(b'"bytes_handed_out":320', b'"bytes_handed_out":321', 1))
    broken = everett("verify", "torn.evl")
    assert broken.exit_code == 1 and "PROBLEM" in broken.stdout and "the chain breaks at line" in broken.stdout
    for name in ("none.evl", "."):
        assert everett("verify", name).exit_code == 1
    assert everett("verify").exit_code == 2
    twice = everett("verify", "run.evl", "run.evl")
    assert twice.exit_code == 1 and "named twice" in twice.stderr


def test_a_ledger_steers_no_terminal(run):
    from ledger_checks import chained

    records = records_of(written(run / "run.evl"))
    records[0]["host"] = "\x1b[2Jme"
    chained(run / "odd.evl", records)
    for command in (["verify", "odd.evl"], ["ledger", "show", "odd.evl"]):
        assert "\x1b" not in everett(*command).output and "\\x1b[2Jme" in everett(*command).output


def test_a_read_given_twice_leaves_with_the_code_of_an_alarm(run, tmp_path, monkeypatch):
    from devices.qcicada import QCicada

    with QCicada(tmp_path / "ttyUSB0") as device:
        for n in range(2):
            monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / f"state{n}"))
            with Source.open(f"qcicada:{device.path}?attest=1", ring_bytes=16384) as source:
                written(run / f"{n}.evl", source)
            device.replay_signature = True
    assert everett("verify", "0.evl").exit_code == 0
    both = everett("verify", "0.evl", "1.evl")
    assert both.exit_code == 4 and "ALARM" in both.stdout


def test_these_commands_import_neither_torch_nor_numpy(signed):
    code = f"""
import sys
from everett_cuda.cli import app
for command in (["verify", {str(signed)!r}], ["ledger", "show", {str(signed)!r}]):
    try:
        app(command)
    except SystemExit:
        pass
print("imported:", sorted({{"torch", "numpy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == 0 and done.stdout.endswith("imported: []\n"), done.stderr


def test_the_documentation_names_every_option_and_json_field(signed):
    text = (ROOT / "docs" / "cli.md").read_text()
    for command in (["ledger", "keygen"], ["ledger", "show"], ["verify"]):
        assert f"\n## {command[0]}\n" in text and f"`everett {' '.join(command)}" in text
        options = set(re.findall(r"--[a-z][a-z-]+", everett(*command, "--help").stdout)) - {"--help"}
        assert options and not [o for o in options if o not in text]
    shown = json.loads(everett("ledger", "show", signed, "--json").stdout)
    checked = json.loads(everett("verify", signed, "--json").stdout)
    fields = {*shown, *shown["sources"][0], *checked, *checked["ledgers"][0]}
    assert not [name for name in fields if f"`{name}`" not in text]


def test_the_documentation_names_every_record_and_its_fields():
    from everett_cuda.ledgers.schema import COUNTS, FIELDS

    text = (ROOT / "docs" / "ledger.md").read_text()
    for kind, fields in FIELDS.items():
        (row,) = (line for line in text.splitlines() if line.startswith(f"| `{kind}` |"))
        assert not [name for name in fields if f"`{name}`" not in row], kind
    assert not [name for name in COUNTS if f"`{name}`" not in text]
