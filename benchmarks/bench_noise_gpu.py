"""Noise fills on a GPU against a memset and torch's own random fills."""

import torch

import everett_cuda as ev
from benchmarks.gpu_timing import cold
from benchmarks.harness import Case, check, rows

N = 1 << 26


def run(quick: bool = False) -> list[dict]:
    """All rows: words, uniforms and normals by ChaCha8 and Philox."""
    repeats = 7 if quick else 60
    check(abs(ev.randn(1 << 20, device="cuda").std().item() - 1) < 0.01, "standard deviation of normals")
    out, words = torch.empty(N, device="cuda"), torch.empty(N, dtype=torch.int32, device="cuda")
    fills = {
        "words": (ev.random_words, "tensor.random_", words.random_),
        "uniform": (ev.rand, "torch.rand", lambda: torch.rand(N, device="cuda")),
        "normal": (ev.randn, "torch.randn", lambda: torch.randn(N, device="cuda")),
        "exponential": (ev.exponential, "tensor.exponential_", out.exponential_),
    }
    result = []
    for kind, (ours, name, torchs) in fills.items():
        cases = [Case("memset", out.zero_, 4 * N, "write y"), Case(name, torchs, 4 * N, "write y")]
        for stream in ("chacha8", "chacha12", "philox"):
            run_ours = lambda f=ours, s=stream: f(N, device="cuda", stream=s)  # noqa: E731
            cases.append(Case(f"everett_cuda {stream}", run_ours, 4 * N, "write y"))
        group = {"measure": kind, "n": N, "dtype": "uint32" if kind == "words" else "float32", "cache": "cold"}
        result += rows("noise", group, cases, repeats, "memset", name, cold)
    return result
