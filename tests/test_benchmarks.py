"""Benchmarks without their machines: arguments, imports, and the judgement of targets from rows."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import harness, run, targets_gpu
from benchmarks.harness import Case

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_benchmarks_without_a_gpu_say_why_and_write_nothing(capsys):
    before = sorted(harness.RESULTS.iterdir())
    assert run.main(["--device", "cuda"]) == 2
    assert "benchmarks: " in (error := capsys.readouterr().err) and "torch" in error
    assert sorted(harness.RESULTS.iterdir()) == before


@pytest.mark.parametrize("arguments,says", [(["--only", "sampling"], "on cpu there are dropout"),
                                            (["--device", "cuda", "--only", "ring"], "on cuda there are dropout"),
                                            (["--device", "tpu"], "invalid choice")])  # fmt: skip
def test_bad_arguments_name_what_there_is(capsys, arguments, says):
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("module", [m for benches in run.BENCHES.values() for m in benches.values()])
def test_every_benchmark_imports_and_has_a_run(module):
    if module == "bench_pool_gpu":
        pytest.importorskip("everett_cuda._cuda", reason="built without nvcc, so there is no CUDA module")
    assert callable(importlib.import_module(f"benchmarks.{module}").run)


def test_targets_cover_every_row_of_the_table_and_are_judged_by_the_rows():
    empty = targets_gpu.judged([])
    assert len(empty) > 30 and {line[3] for line in empty} == {"not measured"}
    dropout = {"bench": "dropout", "measure": "forward", "dtype": "bfloat16", "cache": "cold"}
    rows = [
        {**dropout, "case": "F.dropout", "p50_us": 130.0},
        {**dropout, "case": "ev.dropout chacha8", "p50_us": 100.0, "percent_of_copy": 94.9},
        {**dropout, "case": "ev.dropout philox", "p50_us": 98.5, "percent_of_copy": 96.0},
    ]
    judged = {line[0]: line[1:] for line in targets_gpu.judged(rows)}
    assert judged["bf16 dropout forward, over F.dropout"] == ("1.2 times", "1.30", "yes")
    assert judged["bf16 dropout forward, ChaCha8, of clone"] == ("95 % of copy", "94.90", "NO")
    assert judged["bf16 dropout forward, philox, of clone"][2] == "yes"
    assert judged["bf16 dropout forward, ChaCha8 over Philox"] == ("0.98 times", "0.98", "yes")
    assert judged["bf16 dropout forward, over triton"][2] == "not measured"


def test_targets_name_cases_that_the_benchmarks_have():
    """A renamed case would never be measured again: every case that a target asks for stands in a benchmark's text."""
    text = "".join((ROOT / "benchmarks" / f"{m}.py").read_text() for m in run.BENCHES["cuda"].values())
    for case in ("F.dropout", "triton", "torch backward", "ev.dropout", "torch.compile", "everett_cuda", "torch.randn",
                 "pinned copy_", "slab", "ev.dropout, a new key each replay", "graph of {LAYERS} layers", "calls",
                 "50 calls in a graph", "dropout+add", "bias+GELU+dropout", "words", "uniform", "normal", "slab copy"):
        assert f'"{case}"' in text, case


def test_rows_use_the_timer_that_is_given():
    def timer(cases, repeats):
        return {case.name: [1e-3 * (i + 1)] * repeats for i, case in enumerate(cases)}

    cases = [Case("copy", lambda: None, 2_000_000), Case("ours", lambda: None, 1_000_000, "read x")]
    copy, ours = harness.rows("b", {"n": 1}, cases, 3, copy="copy", rival="copy", timer=timer)
    assert (copy["p50_us"], ours["p50_us"], copy["gb_per_s"]) == (1000.0, 2000.0, 2.0)
    assert (ours["copies"], ours["percent_of_copy"], ours["times_rival"]) == (2.0, 25.0, 0.5)


def test_quick_prints_and_writes_nothing():
    command = [sys.executable, "-m", "benchmarks.run", "--only", "overhead", "--quick"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert out.returncode == 0 and "ev.dropout" in out.stdout and "written" not in out.stdout
