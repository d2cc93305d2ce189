"""Unmodified models of others under `intercept()`: they train, and no random op is left to torch."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import everett_cuda as ev
from everett_cuda import keys, untouched


@pytest.fixture(autouse=True)
def source():
    with ev.open("sim:seed=7") as opened:
        torch.manual_seed(1)
        untouched._counts.clear()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the tensors are tiny
        yield opened
        torch.set_num_threads(threads)
    ev.close()


def train(model, batch, loss=None, steps=50):
    """Fifty steps on one batch: the report of a pass, the first losses' mean and the last ones'."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, before = [], keys.counters()["draws"]
    with ev.intercept():
        report = ev.coverage(model.train(), batch, loss=loss)
        for _ in range(steps):
            optimizer.zero_grad()
            output = model(**batch) if isinstance(batch, dict) else model(*batch)
            value = output.loss if loss is None else loss(output)
            value.backward()
            optimizer.step()
            losses.append(value.item())
    assert keys.counters()["draws"] - before == (steps + 1) * report.count("quantum stream"), "a pass drew otherwise"
    return report, sum(losses[:5]) / 5, sum(losses[-5:]) / 5


def assert_all_quantum(trained, draws):
    report, first, last = trained
    assert report.count("quantum stream") == draws and not report.untouched and report.unseen_draws == 0, str(report)
    assert not untouched.untouched()
    assert last < 0.8 * first


def test_transformer_encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3))
    x, target = torch.randn(8, 6, 16), torch.randint(3, (8,))
    trained = train(model, (x,), lambda y: F.cross_entropy(y.mean(1), target))
    assert_all_quantum(trained, draws=8)


class DropPath(nn.Module):
    """Stochastic depth as it is written in many models: a mask made by a method, hence only `install` reaches it."""

    def __init__(self, p, by_method):
        super().__init__()
        self.keep, self.by_method = 1 - p, by_method

    def forward(self, x):
        if not self.training:
            return x
        shape = (x.shape[0],) + (1,) * (x.dim() - 1)
        if self.by_method:
            return x * x.new_empty(shape).bernoulli_(self.keep).div_(self.keep)
        return x / self.keep * (self.keep + torch.rand(shape, dtype=x.dtype, device=x.device)).floor_()


class ResNet(nn.Module):
    """Two residual stages with batch norm, stochastic depth and channel dropout, as torchvision and timm build them."""

    def __init__(self, by_method):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)) for _ in range(2))
        self.paths = nn.ModuleList(DropPath(0.2, by_method) for _ in range(2))
        self.drop, self.head = nn.Dropout2d(0.1), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for conv, path in zip(self.convs, self.paths, strict=True):
            x = F.relu(x + path(conv(x)))
        return self.head(self.drop(x).mean((2, 3)))


def test_resnet_with_drop_path():
    x, target = torch.randn(8, 3, 6, 6), torch.randint(3, (8,))
    trained = train(ResNet(by_method=False), (x,), lambda y: F.cross_entropy(y, target))
    assert_all_quantum(trained, draws=3)


def test_drop_path_by_a_method_is_seen_by_coverage_and_reached_by_install():
    model, x = ResNet(by_method=True), torch.randn(8, 3, 6, 6)
    with ev.intercept():
        report = ev.coverage(model, x)
    assert report.count("untouched") == 2 and {op.module for op in report.untouched} == {"paths.0", "paths.1"}
    ev.install()
    try:
        report = ev.coverage(model, x)
    finally:
        ev.uninstall()
    assert report.count("quantum stream") == 3 and not report.untouched


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")  # models are made from configurations, nothing is fetched
    reason = "transformers is not installed (pip install everett_cuda[hf])"
    return pytest.importorskip("transformers", reason=reason)


SMALL = {"vocab_size": 50}
IDS = torch.arange(48).view(4, 12) * 7 % 50


def test_bert_for_masked_lm(transformers):
    config = transformers.BertConfig(
        **SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.BertForMaskedLM(config)
    assert_all_quantum(train(model, {"input_ids": IDS, "labels": IDS}), draws=7)


def test_gpt2(transformers):
    config = transformers.GPT2Config(
        **SMALL, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
    )
    model = transformers.GPT2LMHeadModel(config)
    assert_all_quantum(train(model, {"input_ids": IDS, "labels": IDS}), draws=7)

    def sample():
        return model.generate(IDS[:1, :3], do_sample=True, max_new_tokens=8, min_new_tokens=8, pad_token_id=1)

    model.eval()
    state = torch.get_rng_state()
    with ev.intercept():
        before = keys.counters()["draws"]
        tokens = sample()
        assert keys.counters()["draws"] - before == 8, "one draw a token"
        torch.set_rng_state(state)
        assert torch.equal(sample(), tokens), "one RNG state in one step gives one text"
        samples = set()
        for _ in range(8):
            ev.step()  # new keys under the same torch state
            torch.set_rng_state(state)
            samples.add(tuple(sample()[0].tolist()))
    assert len(samples) > 1


def test_t5(transformers):
    config = transformers.T5Config(
        **SMALL, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    assert_all_quantum(train(model, {"input_ids": IDS, "labels": IDS}), draws=24)
