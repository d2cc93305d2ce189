"""`coverage`: every random op of a pass, who called it and what serves it; nothing that draws nothing."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import everett_cuda as ev
from everett_cuda import reach


@pytest.fixture(autouse=True)
def source():
    with ev.open("sim:seed=7") as opened:
        torch.manual_seed(1)
        yield opened
    ev.rekey_torch(False)
    ev.close()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.3)
        self.bound = functools.partial(F.dropout, p=0.3)
        self.lstm = nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        x = self.drop(x)
        x = self.bound(x)
        x = self.lstm(x)[0]
        x = x * x.new_empty(2, 1, 1).bernoulli_(0.5)
        return x + torch.rand(8, generator=torch.Generator())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x):
        return checkpoint(lambda y: F.dropout(y * y, 0.2).exp(), self.norm(self.block(x)), use_reentrant=False)


X = torch.randn(2, 5, 8)
NOT_RANDOM = {
    "attention without dropout": lambda x: F.scaled_dot_product_attention(x, x, x),
    "dropout in eval": lambda x: F.dropout(x, 0.5, False) + torch.native_dropout(x, 0.5, False)[0],
    "native_dropout of p = 0": lambda x: torch.native_dropout(x, 0.0, True)[0],
    "rrelu in eval": lambda x: F.rrelu(x),
    "nothing to fill": lambda x: x + torch.rand(0).sum(),
    "meta": lambda x: x + torch.rand(3, device="meta").numel(),
    "matmul": lambda x: x @ x.mT,
}
RANDOM = {
    "aten.bernoulli_": lambda x: F.dropout(x, 0.5),
    "aten.native_dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "aten.rand": lambda x: x + torch.rand(2, 1, 1),
    "aten.randint": lambda x: x + torch.randint(5, (8,)),
    "aten.randperm": lambda x: x[:, torch.randperm(5)],
    "aten.normal_": lambda x: x + torch.empty(8).normal_(),
    "aten.multinomial": lambda x: x + torch.ones(8).multinomial(8),
    "aten.exponential_": lambda x: F.gumbel_softmax(x),
    "aten.rrelu_with_noise": lambda x: F.rrelu(x, training=True),
    "aten._standard_gamma": lambda x: x + torch._standard_gamma(torch.ones(8)),
}


@pytest.mark.parametrize("name", NOT_RANDOM)
def test_what_draws_nothing_is_not_listed(name):
    assert ev.coverage(NOT_RANDOM[name], X, backward=False).ops == ()


@pytest.mark.parametrize("name", RANDOM)
def test_what_draws_is_listed(name):
    (op,) = ev.coverage(RANDOM[name], X, backward=False).ops
    assert op.op.startswith(name) and op.count == 1 and op.tier == "untouched" and "ev.intercept()" in op.why


def tiers(report):
    return {(op.op, op.module, op.backward): op.tier for op in report.ops}


def test_without_interception_all_is_untouched_also_recomputations():
    report = ev.coverage(Net(), X)
    assert report.count("untouched") == 7 and not report.of("quantum stream")
    assert tiers(report)["aten.bernoulli_", "", True] == "untouched", "a checkpoint's recomputation, in the backward"
    assert {op.module for op in report.ops} == {"block.drop", "block", "block.lstm", "Net", ""}


def test_intercept_serves_what_it_can_and_says_why_of_the_rest():
    net = Net()  # before: a partial made inside holds our function
    with ev.intercept():
        report = ev.coverage(net, X)
    why = {op.why for op in report.untouched}
    assert report.count("quantum stream") == 3 and report.unseen_draws == 0
    assert any("F.dropout was bound before" in w for w in why)
    assert any("a Tensor method" in w for w in why)
    assert "a torch.Generator was passed" in why
    assert {op.module for op in report.of("quantum stream")} >= {"block.drop"}


def test_install_and_rekey_leave_only_what_passes_a_generator():
    ev.install()
    try:
        with ev.rekey_torch():
            report = ev.coverage(Net(), X)
    finally:
        ev.uninstall()
    assert [op.why for op in report.untouched] == ["a torch.Generator was passed"]
    assert [(op.op, op.module) for op in report.of("rekeyed torch")] == [("aten.bernoulli_", "block.lstm")]
    assert report.count("quantum stream") == 5 and report.unseen_draws == 0


def test_our_functions_by_name_are_ours_without_interception():
    report = ev.coverage(lambda x: ev.dropout(x, 0.5) + ev.randn(8) + ev.dropout_add(x, x, 0.5), X, backward=False)
    assert sorted(op.op for op in report.ops) == ["dropout", "dropout_add", "randn"]
    assert report.count("quantum stream") == 3 and report.unseen_draws == 0


def test_a_generator_that_is_torchs_default_counts_as_default():
    with ev.rekey_torch():
        report = ev.coverage(lambda: torch.rand(3, generator=torch.default_generator), (), backward=False)
    assert report.count("rekeyed torch") == 1


def test_calls_that_interception_leaves_to_torch_carry_the_reason():
    with ev.intercept():
        (op,) = ev.coverage(lambda: torch.randn(3, dtype=torch.complex64), (), backward=False).ops
    assert op.why == "torch.randn: dtype complex64" and op.tier == "untouched"


def test_the_model_is_as_before_but_for_the_draws():
    net = Net()
    for p in net.parameters():
        p.grad = torch.full_like(p, 3.0)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    ev.coverage(net, X)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert all((p.grad == 3).all() for p in net.parameters())


def test_inputs_and_losses():
    def model(x, y=None):
        return {"a": F.dropout(x, 0.5) * (1 if y is None else y), "b": 3}

    x = torch.ones(4, requires_grad=True)
    for inputs in (x, (x,), [x, 2.0], {"x": x, "y": 2.0}):
        assert ev.coverage(model, inputs).count("untouched") == 1
    assert ev.coverage(model, x, loss=lambda output: output["a"].mean()).count("untouched") == 1
    with pytest.raises(ValueError, match="backward=False"):
        ev.coverage(model, torch.ones(4))


def test_a_compiled_model_is_reported_as_its_code():
    net = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), backend="eager")
    with ev.intercept():
        report = ev.coverage(net, X)
    assert [(op.module, op.tier) for op in report.ops] == [("_orig_mod.1", "quantum stream")]


def test_torchscript_is_seen_and_served_by_rekeying():
    scripted = torch.jit.script(nn.Sequential(nn.Dropout(0.5)))
    with ev.intercept():
        assert ev.coverage(scripted, X, backward=False).count("untouched") == 1
        with ev.rekey_torch():
            assert ev.coverage(scripted, X, backward=False).count("rekeyed torch") == 1


def test_it_prints_a_table_with_totals():
    net = Net()
    with ev.intercept():
        text = str(ev.coverage(net, X))
    assert text.startswith("random ops: 3 quantum stream, 0 rekeyed torch, 3 untouched")
    assert "block.lstm" in text and "test_coverage.py" in text


def test_every_tagged_op_is_known_to_the_rule():
    # torch's tag and our reading of arguments: an op with a dropout probability of 0 must not count, one above must
    q = torch.ones(1, 1, 4, 8)
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert not reach.draws(op, (q, q, q, 0.0), {}) and reach.draws(op, (q, q, q, 0.5), {})
    assert not reach.draws(torch.ops.aten._fused_sdp_choice.default, (q, q, q), {})
    assert reach.draws(torch.ops.aten.native_dropout.default, (q, 0.5, None), {})
