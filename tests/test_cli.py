"""The command as a whole: it starts without torch, says what is wrong in one block, and keeps its exit codes."""

import ast
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import everett, everett_process
from sidecars import sidecar_of

import everett_cuda as ev

ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- what is imported when ---


def test_the_package_imports_torch_only_when_a_name_needs_it():
    code = """
import sys, everett_cuda as ev
assert "dropout" in dir(ev) and set(ev.__all__) <= set(dir(ev))
assert "torch" not in sys.modules
ev.SourceError
assert "torch" not in sys.modules and "numpy" not in sys.modules
first = ev.dropout
assert "torch" in sys.modules and vars(ev)["dropout"] is first
from everett_cuda import *
from everett_cuda import ops, session, nn as modules
assert dropout is ops.dropout and open is session.open and ev.nn is modules and ev.status is session.status
try:
    ev.drop_out
except AttributeError as error:
    print(error)
"""
    assert run_python(code) == "module 'everett_cuda' has no attribute 'drop_out'\n"


def test_every_public_name_is_the_one_that_type_checkers_see():
    tree = ast.parse((ROOT / "everett_cuda" / "__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If))
    seen = {(a.name, n.module) for n in block.body for a in n.names}
    assert seen == {(name, module) for name, module in ev._HOME.items()} | {(name, None) for name in ev._MODULES}
    modules = {path.stem for path in (ROOT / "everett_cuda").iterdir()}
    assert not modules & set(ev._HOME), "importing the module would replace the name"
    for name, module in ev._HOME.items():
        assert getattr(ev, name) is getattr(sys.modules[f"everett_cuda.{module}"], name)


@pytest.mark.parametrize("arguments", [["--help"], ["devices"], ["doctor", "--help"], ["nonsense"]])
def test_light_commands_import_no_heavy_module(arguments):
    code = f"""
import sys
from everett_cuda.cli import app
try:
    app({arguments})
except SystemExit:
    pass
print("imported:", sorted({{"torch", "numpy"}} & set(sys.modules)))
"""
    assert run_python(code).endswith("imported: []\n")


@pytest.mark.parametrize("command", [["monitor", "sim:seed=1", "--once"], ["doctor", "replay:/none"], ["version"]])
def test_no_command_imports_torch(command):
    code = f"""
import sys
from everett_cuda.cli import app
try:
    app({command})
except SystemExit:
    pass
print("imported:", sorted({{"torch"}} & set(sys.modules)))
"""
    assert run_python(code).endswith("imported: []\n")


# --- usage and errors ---


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["nonsense"], 2, "nonsense"),
        (["capture", "sim:seed=1"], 2, "FILE"),
        (["monitor", "sim:seed=1", "--seconds", "-1"], 2, "seconds"),
        (["monitor", "nope:x", "--once"], 2, "no driver for nope:"),
        (["monitor", "nonsense", "--once"], 2, "'nonsense' is not a source URI"),
        (["doctor", "nope:x"], 2, "no driver for nope:"),
        (["doctor", "sim:sed=1"], 2, "unknown parameter 'sed'"),
        (["capture", "nope:x", "{tmp}/f", "--bytes", "10"], 2, "no driver for nope:"),
        (["monitor", "auto", "--once"], 3, "no quantum device was found"),
        (["capture", "auto", "{tmp}/f", "--bytes", "10"], 3, "no quantum device was found"),
        (["doctor"], 3, "no quantum device was found"),
        (["monitor", "replay:{tmp}/none", "--once"], 1, "No such file"),
        (["monitor", "sim:fault=stuck@0", "--once"], 4, "in the start-up test"),
    ],
)
def test_exit_codes(arguments, code, said, tmp_path):
    result = everett(*(a.format(tmp=tmp_path) for a in arguments))
    assert result.exit_code == code, result.output
    assert said in result.output and "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_an_error_is_one_block_on_stderr():
    result = everett("monitor", "auto", "--once")
    assert result.stdout == ""
    first, *rest = result.stderr.splitlines()
    assert first.startswith("error: auto: no quantum device") and all(line.startswith("  ") for line in rest)


def test_help_names_every_command_and_the_exit_codes():
    text = everett("--help").stdout
    for word in ("devices", "doctor", "monitor", "capture", "journal", "replay", "version", "3 no device found"):
        assert word in text


def test_version_names_the_law_and_the_kernels():
    from everett_cuda import _C

    law = json.loads((ROOT / "tests" / "vectors" / "law_v1.json").read_text())["law"]
    found = json.loads(everett("version", "--json").stdout)
    assert (found["everett_cuda"], found["stream_law"]) == (ev.__version__, law)
    assert found["instruction_set"] == _C.instruction_set() and found["torch"]
    assert f"stream law {law}" in everett("version").stdout


# --- as a process ---


def test_the_console_script_and_the_module_are_the_same_command():
    script = Path(sys.executable).with_name("everett")
    assert script.exists(), "run `make build` again: the everett script is not installed"
    done = subprocess.run([script, "version"], capture_output=True, text=True, timeout=60)
    module = everett_process("version")
    assert module.communicate(timeout=60) == (done.stdout, "") and done.returncode == module.returncode == 0


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_monitor_gives_its_device_back(number, code, roof):
    roof.put({"serial": "7"})
    process = everett_process("monitor", "lamp:7", "--json", "--seconds", "0.1")
    assert json.loads(process.stdout.readline())["serial"] == "7"
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == code
    assert [line.split()[:2] for line in roof.log()] == [["opened", "7"], ["closed", "7"]]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_capture_leaves_no_file(number, code, tmp_path):
    process = everett_process("capture", "sim:rate=100kB/s", tmp_path / "r.bin", "--bytes", "100MB")
    part = tmp_path / "r.bin.part"
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    assert {p.name: p.stat().st_size for p in tmp_path.iterdir() if p != part} == {"r.bin": 0, "r.bin.json": 0}
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == code and "nothing was kept" in said
    assert not list(tmp_path.iterdir())


# --- documentation ---


def test_the_documentation_names_every_option_and_json_field():
    text = (ROOT / "docs" / "cli.md").read_text()
    for command in ("devices", "doctor", "monitor", "capture", "journal", "replay", "version"):
        assert f"\n## {command}\n" in text
        options = set(re.findall(r"--[a-z][a-z-]+", everett(command, "--help").stdout)) - {"--help"}
        assert options and not [o for o in options if o not in text]
    documents = [
        json.loads(everett(*words, "--json").stdout)
        for words in (
            ["devices"],
            ["doctor", "nope:x"],
            ["version"],
            ["monitor", "sim:seed=1", "--once", "--seconds", "0.1"],
        )
    ]
    documents += [documents[1]["min_entropy"], documents[3]["histogram"], json.loads(sidecar_of(b"").to_json())]
    fields = {name for document in documents for name in document}
    assert not [name for name in fields if f"`{name}`" not in text]
