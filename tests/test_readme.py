"""The README's first example works as it stands, and stands where a reader sees it."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_first_example_runs_as_it_stands():
    text = README.read_text()
    example = re.search(r"```python\n(.*?)```", text, re.S)
    assert text[: example.end()].count("\n") <= 15 and "ev.open" in example[1]
    done = subprocess.run([sys.executable, "-c", example[1]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "NOT QUANTUM (simulated)"


def test_every_result_file_it_names_is_committed():
    names = set(re.findall(r"`(\w+\.cpu\.jsonl)`", README.read_text()))
    assert names and all((README.parent / "benchmarks" / "results" / n).stat().st_size for n in names)
