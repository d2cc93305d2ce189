"""The demo under torchrun, as the README starts it: two processes, one source, one report."""

import json
import os
import subprocess
import sys


def test_torchrun_trains_together_and_reports_once(tmp_path):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
        *("-m", "everett_cuda.demo", "--source", "sim:seed=7", "--steps", "3"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert len(report["ranks"]) == 2 and report["ranks"][0].startswith("rank 0 has its own source, simulated source")
    assert "rank 1 gets root keys of rank 0, over the network" in report["ranks"][1]
    assert report["label"] == "NOT QUANTUM (simulated)"
    assert done.stdout.count("Sampled text") == 1 and done.stdout.count("rank 1 gets root keys") == 1
    # 9 dropouts in each of 3 steps, and shared keys: the world's at setup and after each of the 6 optimizer steps.
    assert report["fresh"] >= 27 + 7
