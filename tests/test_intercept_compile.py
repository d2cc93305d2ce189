"""`intercept()` and torch.compile: code compiled outside is compiled anew inside, and back; and torch's own tables of its
functions never hold ours."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import everett_cuda as ev
from everett_cuda import keys


@pytest.fixture(autouse=True)
def source():
    torch._dynamo.reset()
    with ev.open("sim:seed=7") as opened:
        torch.manual_seed(1)
        yield opened
    ev.close()


def draws_of(call) -> int:
    before = keys.counters()["draws"]
    call()
    return keys.counters()["draws"] - before


X = torch.linspace(-1, 1, 64).view(2, 4, 8)
ATTENTION = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
CALLS = {
    "nn.Dropout": (nn.Dropout(0.5), 1),
    "nn.MultiheadAttention": (lambda x: ATTENTION(x, x, x, need_weights=False)[0], 1),
    "nn.MultiheadAttention with weights": (lambda x: ATTENTION(x, x, x)[0], 1),
    "nn.TransformerEncoderLayer": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 4),
    "rand, randn_like": (lambda x: x + torch.rand(2, 4, 8) + torch.randn_like(x), 2),
    "randint, randperm": (lambda x: x + torch.randint(5, (8,)) + torch.randperm(8), 2),
    "bernoulli, normal": (lambda x: torch.bernoulli(x.sigmoid()) + torch.normal(x, 1.0), 2),
    "channels, alpha": (lambda x: F.dropout1d(x) + F.alpha_dropout(x, 0.5, True), 2),
    "gumbel_softmax, rrelu": (lambda x: F.gumbel_softmax(x) + F.rrelu(x, training=True), 2),
}


@pytest.mark.parametrize("name", CALLS)
def test_compiled_before_entered_later_and_back(name):
    call, draws = CALLS[name]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert draws_of(lambda: compiled(X)) == 0
    with ev.intercept():
        assert draws_of(lambda: compiled(X)) == draws
        assert not torch.equal(compiled(X), compiled(X))
    assert draws_of(lambda: compiled(X)) == 0


def test_install_reaches_compiled_methods_and_uninstall_takes_them_back():
    compiled = torch.compile(
        lambda x: torch.empty_like(x).uniform_() + torch.dropout(x, 0.5, True), backend="aot_eager", fullgraph=True
    )
    assert draws_of(lambda: compiled(X)) == 0
    ev.install()
    try:
        assert draws_of(lambda: compiled(X)) == 2
    finally:
        ev.uninstall()
    assert draws_of(lambda: compiled(X)) == 0


def test_gradient_of_a_compiled_layer_is_that_of_the_mask_used():
    x = torch.randn(400, requires_grad=True)
    compiled = torch.compile(nn.Dropout(0.5), backend="aot_eager", fullgraph=True)
    with ev.intercept():
        y = compiled(x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(y != 0, 2.0, 0.0)) and 100 < (y != 0).sum() < 300


FRESH_PROCESS = """
import torch, everett_cuda as ev
ev.open("sim:seed=7")
with ev.intercept():
    with torch.device("meta"):
        assert torch.rand(3).is_meta and torch.randn(2, 2).is_meta and torch.randperm(3).is_meta
with torch.device("meta"):
    assert torch.rand(3).is_meta, "torch took our rand for its own when it listed the functions that take a device"
@torch.jit.script
def f(x):
    return torch.rand(3) + x
assert f(torch.zeros(3)).shape == (3,)
compiled = torch.compile(lambda x: torch.rand(3) + torch.nn.functional.dropout(x), backend="eager", fullgraph=True)
assert compiled(torch.zeros(3)).shape == (3,)
"""


def test_tables_that_torch_builds_later_hold_torchs_functions():
    # in a process of its own, where none of them has been built
    subprocess.run([sys.executable, "-c", FRESH_PROCESS], check=True, timeout=300)
