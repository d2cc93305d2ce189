"""The demo as a user runs it, with few steps; its choice of characters against exact counts; its words on bad input."""

import json
import os
import signal
import subprocess
import sys
from fractions import Fraction
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np
import pytest
import torch

from everett_cuda import SourceExhausted, session
from everett_cuda.demo import budget, sample, text
from everett_cuda.demo.__main__ import main
from everett_cuda.source import Source

STEPS = 6
DROPOUTS = 9  # after the embedding, and two in each of four blocks


def command(*arguments):
    return [sys.executable, "-m", "everett_cuda.demo", *map(str, arguments)]


class Outcome(NamedTuple):
    """A finished process, and what it wrote: report.json, table.txt and loss.png."""

    done: subprocess.CompletedProcess
    report: dict
    table: str
    png: bytes


def run(folder, *arguments):
    """The finished process of a demo run in `folder`."""
    return subprocess.run(command(*arguments), cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def finished(folder, *arguments):
    """The outcome of a run that must succeed and that writes into its default folder."""
    done = run(folder, *arguments)
    assert done.returncode == 0, done.stderr
    out = folder / "demo"
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return Outcome(done, report, (out / "table.txt").read_text(encoding="utf-8"), (out / "loss.png").read_bytes())


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("sim"), "--source", "sim:seed=7", "--steps", STEPS)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A new folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_outcome(done, report, table, png, label):
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and png.endswith(b"IEND\xaeB`\x82")
    assert label in table and label in done.stdout
    assert report["label"] == label and report["health"] == "ok"
    assert (report["fresh"], report["stretched"], report["reused"]) == (DROPOUTS * STEPS, 0, 0)
    assert len(report["lines"]) == 3
    for line in report["lines"]:
        assert 0 < len(line["text"]) <= 80 and "\n" not in line["text"] and line["text"][0].isalpha()
        ended = len(line["text"]) < 80  # by a newline, which took a word too
        assert line["bits"] == 64 * (len(line["text"]) + ended)
        assert line["text"] in table
    assert report["direct_bytes"] * 8 == sum(line["bits"] for line in report["lines"])
    used = 32 * report["fresh"] + report["direct_bytes"]
    assert used <= report["conditioned_bytes_out"] <= report["raw_bytes_in"] * 32 // 80
    assert len(report["torch_losses"]) == len(report["everett_losses"]) == STEPS
    assert report["torch_held_out"][-1][1] < report["torch_held_out"][0][1]
    assert report["everett_held_out"][-1][1] < report["everett_held_out"][0][1]


# --- the choice of a character ----------------------------------------------------------------------------------------


def test_choose_has_exact_proportions():
    """The words of each choice are counted at the borders of all Z places, the only words where it changes."""
    for weights in ([1], [1, 1], [1, 2, 1], [0, 3, 0, 5, 0], [2, 0, 0, 7, 4], [1, 15, 16]):
        total = sum(weights)
        borders = [-(-place * 2**64 // total) for place in range(total + 1)]
        counts = [0] * len(weights)
        for first, after in zip(borders, borders[1:], strict=False):
            chosen = sample.choose(weights, first)
            assert chosen == sample.choose(weights, after - 1)
            counts[chosen] += after - first
        assert sum(counts) == 2**64
        for count, weight in zip(counts, weights, strict=True):
            assert (count == 0) == (weight == 0)
            assert abs(count - Fraction(weight * 2**64, total)) < 1
            if total & (total - 1) == 0:
                assert count * total == weight * 2**64


def test_choose_takes_the_first_and_the_last_at_the_borders():
    weights = [0, 1, 2**53, 0, 1, 0]
    assert sample.choose(weights, 0) == 1
    assert sample.choose(weights, 2**64 - 1) == 4
    assert sample.choose([0, 0, 7], 0) == sample.choose([7, 0, 0], 2**64 - 1) + 2 == 2
    assert sample.choose([2**64 - 1, 1], 2**64 - 2) == 0  # one word a place
    assert sample.choose([2**64 - 1, 1], 2**64 - 1) == 1


def test_choose_matches_a_cumulative_sum():
    random = np.random.default_rng(5)
    for _ in range(200):
        weights = [int(w) for w in random.integers(0, 2**40, 20) * (random.random(20) < 0.6)] + [1]
        word = int(random.integers(0, 2**64, dtype=np.uint64))
        place = word * sum(weights) // 2**64
        assert sample.choose(weights, word) == int(np.searchsorted(np.cumsum(weights), place, side="right"))


@pytest.mark.parametrize(
    "weights, word", [([], 0), ([0, 0], 0), ([3, -1], 0), ([2**64, 1], 0), ([1], -1), ([1], 2**64)]
)
def test_choose_rejects_what_is_no_draw(weights, word):
    with pytest.raises(ValueError):
        sample.choose(weights, word)


def test_weights_are_the_softmax_in_units_of_2_to_minus_53():
    weights = sample.weights_of(np.log([1.0, 2.0, 5.0]))
    assert [w / 2**53 for w in weights] == pytest.approx([0.125, 0.25, 0.625], abs=1e-15)
    assert sample.weights_of(np.array([0.0, -np.inf, 0.0])) == [2**52, 0, 2**52]
    assert sample.weights_of(np.array([0.0, -40.0]))[1] == 0  # e^-40 is below 2^-53


@pytest.mark.parametrize("logits", [[0.0, np.nan], [np.nan, 0.0], [0.0, np.inf], [-np.inf, -np.inf]])
def test_weights_reject_what_is_no_distribution(logits):
    with pytest.raises(ValueError, match="no distribution"):
        sample.weights_of(np.array(logits))


# --- text and budget --------------------------------------------------------------------------------------------------


def test_batches_are_windows_and_what_follows_and_leave_the_default_generator_alone():
    numbers = torch.arange(1000)
    before = torch.get_rng_state()
    inputs, targets = text.batch(numbers, 50, 7, torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(targets, inputs + 1) and torch.equal(inputs - inputs[:, :1], torch.arange(7).expand(50, 7))
    assert len(inputs[:, 0].unique()) > 40


def test_held_out_text_follows_the_training_text():
    corpus = text.load()
    assert 0.09 < len(corpus.held_out) / (len(corpus.train) + len(corpus.held_out)) < 0.11
    end, begin = ("".join(corpus.characters[i] for i in part) for part in (corpus.train[-40:], corpus.held_out[:40]))
    everything = "\n".join(topic.strip("\n") for _, topic in sorted(topics.items()))
    assert everything.count(end + begin) == 1
    assert len(everything) == len(corpus.train) + len(corpus.held_out)


@pytest.mark.parametrize("blocks", [100, 127, 128, 819])
def test_recording_of_the_computed_length_gives_the_blocks_and_one_byte_less_does_not(tmp_path, blocks):
    needed = budget.raw_bytes_needed(blocks, 80)
    for length, enough in ((needed, True), (needed - 1, False)):
        file = tmp_path / f"{length}.bin"
        file.write_bytes(os.urandom(length))
        with Source.open(f"replay:{file}") as source:
            if enough:
                budget.check_recording(source, blocks - 1, 4)
                source.take(32 * blocks, 20.0)
            else:
                with pytest.raises(SourceExhausted, match="too short for this run"):
                    budget.check_recording(source, blocks - 1, 4)
    with Source.open(f"replay:{file}?loop=1") as source:
        budget.check_recording(source, 10**6, 0)


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_demo_on_a_simulated_source(simulated):
    check_outcome(*simulated, "NOT QUANTUM (simulated)")
    assert "\x1b" not in simulated.done.stdout  # no terminal, so no colours and no bar
    assert len(simulated.done.stdout.splitlines()) < 60


def test_demo_on_recorded_quantum_bits(tmp_path, shared_data):
    recording = shared_data / "quantum/humboldt-photon-1MiB.bin"
    if not recording.is_file():
        pytest.skip(f"no recording at {recording}")
    outcome = finished(tmp_path, "--source", f"replay:{recording}", "--steps", STEPS)
    check_outcome(*outcome, "NOT QUANTUM NOW (recorded)")
    assert outcome.report["raw_bytes_in"] == recording.stat().st_size


def test_source_decides_our_masks_and_nothing_of_torchs(simulated, tmp_path):
    other = finished(tmp_path, "--source", "sim:seed=8", "--steps", STEPS).report
    assert other["torch_losses"] == simulated.report["torch_losses"]
    assert other["everett_losses"] != simulated.report["everett_losses"]
    assert [line["text"] for line in other["lines"]] != [line["text"] for line in simulated.report["lines"]]


def test_fresh_and_stretched_keys_of_a_slow_source_add_up(tmp_path):
    # 100 keys a second; how many more a step asks for depends on the machine, and the rest is stretched.
    report = finished(tmp_path, "--source", "sim:seed=7,rate=64kbit/s", "--steps", 15).report
    assert report["fresh"] > 0 and report["fresh"] + report["stretched"] == DROPOUTS * 15


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--source", "nosuch:thing"), "nosuch"),
        (("--source", "replay:missing.bin"), "missing.bin"),
        (("--source", "sim:seed=7,fault=stuck@0"), "repetition count"),
        (("--source", "sim:seed=7", "--out", "taken"), "taken"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(here, capsys, arguments, said):
    (here / "taken").write_text("a file, not a folder")
    assert main([*arguments, "--steps", "2"]) == 2
    message = capsys.readouterr().err
    assert said in message and len(message.splitlines()) == 1
    assert not (here / "demo/loss.png").exists()
    assert session.status().source is None


def test_bad_source_ends_the_process_without_a_traceback(tmp_path):
    done = run(tmp_path, "--source", "nosuch:thing")
    assert done.returncode == 2 and done.stdout == ""
    assert "nosuch" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("steps", ["0", "-1", "x", "1.5"])
def test_rejects_steps_that_are_no_count(here, capsys, steps):
    with pytest.raises(SystemExit) as ended:
        main(["--source", "sim:seed=7", "--steps", steps])
    assert ended.value.code == 2
    assert "invalid whole number from 1 on value" in capsys.readouterr().err


def test_too_short_recording_is_refused_before_training(here, capsys):
    (here / "short.bin").write_bytes(os.urandom(48000))
    assert main(["--source", "replay:short.bin", "--steps", "400"]) == 2
    said, message = capsys.readouterr()
    assert "48,000 bytes there" in message and "--steps" in message and "longer recording" in message
    assert f"{DROPOUTS * 400:,} keys" in message and len(message.splitlines()) == 1
    assert "held-out" not in said


def test_names_the_extra_when_matplotlib_is_missing(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["--source", "sim:seed=7", "--steps", "2"]) == 2
    assert "pip install everett_cuda[demo]" in capsys.readouterr().err


def test_interrupt_closes_and_says_so(tmp_path):
    process = subprocess.Popen(
        command("--source", "sim:seed=7", "--steps", 100_000),
        cwd=tmp_path,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while "held-out" not in process.stdout.readline():  # at "" too: an ended process fails below
            if process.poll() is not None:
                break
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert said == "stopped; the source is closed, nothing was written\n"
    assert not (tmp_path / "demo/loss.png").exists()
