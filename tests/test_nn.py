"""Modules and `ev.convert`: torch's dropout modules replaced by ours, and nothing else changed."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import everett_cuda as ev

PAIRS = [
    (nn.Dropout, ev.nn.Dropout, (4, 6)),
    (nn.Dropout1d, ev.nn.Dropout1d, (4, 6, 5)),
    (nn.Dropout2d, ev.nn.Dropout2d, (4, 6, 5, 3)),
    (nn.Dropout3d, ev.nn.Dropout3d, (4, 6, 5, 3, 2)),
    (nn.AlphaDropout, ev.nn.AlphaDropout, (4, 6)),
]


@pytest.fixture(autouse=True)
def source():
    with ev.open("sim:seed=7") as opened:
        torch.manual_seed(1)
        yield opened
    ev.close()


@pytest.mark.parametrize("theirs,ours,shape", PAIRS)
def test_modules_drop_in_training_only(theirs, ours, shape):
    module, x = ours(0.5), torch.randn(shape)
    y = module(x)
    assert not torch.equal(y, x) and y.shape == x.shape
    assert module.eval()(x) is x


@pytest.mark.parametrize("theirs,ours,shape", PAIRS[1:4])
def test_channel_modules_decide_by_channel(theirs, ours, shape):
    y = ours(0.5)(torch.ones(shape)).flatten(2)
    assert torch.equal(y, y[:, :, :1].expand_as(y))
    assert set(y.unique().tolist()) == {0.0, 2.0}


def test_drop_path_decides_by_sample():
    y = ev.nn.DropPath(0.5)(torch.ones(64, 3, 2)).flatten(1)
    assert torch.equal(y, y[:, :1].expand_as(y)) and set(y.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("theirs,ours,shape", PAIRS)
def test_convert_replaces_the_module_itself(theirs, ours, shape):
    converted = ev.convert(theirs(0.3, inplace=False).eval())
    assert type(converted) is ours and converted.p == 0.3 and not converted.training


def test_convert_reaches_nested_modules_and_keeps_sharing():
    shared = nn.Dropout(0.2, inplace=True)
    model = nn.Sequential(nn.Linear(3, 3), shared, nn.Sequential(nn.Dropout2d(0.1), shared))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert ev.convert(model, stream="philox") is model
    assert type(model[1]) is ev.nn.Dropout and model[1] is model[2][1]
    assert model[1].inplace and model[1].p == 0.2 and model[1].stream == "philox"
    assert type(model[2][0]) is ev.nn.Dropout2d
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_convert_leaves_subclasses_alone():
    class Own(nn.Dropout):
        pass

    model = nn.Sequential(Own(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ev.convert(model)
    assert type(model[0]) is Own


def test_convert_warns_of_dropout_that_stays_torchs():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    with pytest.warns(UserWarning, match=r"self_attn \(MultiheadAttention\).*not quantum"):
        ev.convert(layer)
    with pytest.warns(UserWarning, match="LSTM"):
        ev.convert(nn.LSTM(3, 3, 2, dropout=0.2))


def test_convert_takes_modules_only():
    with pytest.raises(TypeError, match="model: a torch.nn.Module"):
        ev.convert([nn.Dropout()])


def test_converted_transformer_trains():
    model = ev.convert(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True).requires_grad_())
    x = torch.randn(2, 5, 8)
    a, b = model(x), model(x)
    assert not torch.equal(a, b)
    a.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_modules_copy_pickle_and_print():
    module = ev.nn.Dropout(0.25, stream="chacha12")
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert (twin.p, twin.inplace, twin.stream) == (0.25, False, "chacha12")
    assert repr(module) == "Dropout(p=0.25, inplace=False, stream=chacha12)"
    assert module.state_dict() == {}


@pytest.mark.parametrize("module", [ev.nn.Dropout, ev.nn.AlphaDropout, ev.nn.DropPath])
def test_modules_refuse_bad_arguments(module):
    with pytest.raises(ValueError, match="p: the probability"):
        module(1.5)
    with pytest.raises(ValueError, match="stream: one of"):
        module(0.5, stream="mt19937")
