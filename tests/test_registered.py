"""The registered ops themselves: torch's own checks of each, values against the reference, shards against the whole."""

import itertools

import numpy as np
import pytest
import torch
from torch.library import opcheck

import everett_cuda as ev
from everett_cuda import registered, registered_fused
from everett_cuda.nonce import nonce_tensor
from everett_cuda.reference import keepdrop, layout

CHECKS = {"test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"}


@pytest.fixture(autouse=True)
def source():
    """A simulated source; freshness "step", where one nonce gives one record: opcheck compares values of two runs."""
    opened = ev.open("sim:seed=7")
    ev.set_freshness("step")
    torch.manual_seed(1234)
    yield opened
    ev.close()
    ev.set_freshness("op")


def new_record():
    return registered.mix(nonce_tensor("cpu"), True, False)


def checked(op, *args):
    assert opcheck(op, args) == dict.fromkeys(CHECKS, "SUCCESS")


@pytest.mark.filterwarnings("ignore:the torch RNG state repeated")
def test_opcheck_mix():
    checked(registered.mix, nonce_tensor("cpu"), True, False)


@pytest.mark.parametrize("affine,batch,mask_dims,with_residual", [
    (None, 0, None, False), (None, 0, None, True), ([1.1, 0.2, -0.3], 0, None, False), (None, 1, None, True),
    (None, 0, 1, False),
])  # fmt: skip
def test_opcheck_masked(affine, batch, mask_dims, with_residual):
    x = torch.randn(5, 6, requires_grad=True)
    residual = torch.randn(5, 6, requires_grad=True) if with_residual else None
    checked(registered.masked, x, residual, new_record(), 0.4, 0, affine, batch, mask_dims)


def _index(starts, shape):
    return [torch.arange(a, a + n) for a, n in zip(starts, shape, strict=True)]


@pytest.mark.parametrize("with_residual", [False, True])
def test_opcheck_masked_shard(with_residual):
    x = torch.randn(3, 6, requires_grad=True)
    residual = torch.randn(3, 6, requires_grad=True) if with_residual else None
    index = _index((2, 4), (3, 6))
    checked(registered.masked_shard, x, residual, new_record(), index, 0.4, 0, None, None, (7, 10))


def test_opcheck_noise():
    record = new_record()
    checked(registered.fill, record, "normal", [5, 3], torch.float32, 0, None)
    checked(registered.fill, record, "bernoulli", [4], torch.bfloat16, 0, torch.rand(4, dtype=torch.float64))
    checked(registered.fill, record, "integers", [4], torch.int64, 0, torch.tensor([6]))


@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck_fused(with_bias):
    x, residual, record = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True), new_record()
    bias = torch.randn(6, requires_grad=True) if with_bias else None
    checked(registered_fused.bias_dropout_add, x, bias, residual, record, 0.4, 0)
    checked(registered_fused.bias_gelu_dropout, x, bias, record, 0.4, 0, "tanh")
    bias = None if bias is None else bias.detach()
    checked(registered_fused.bias_gelu_dropout_backward, x.detach(), bias, residual.detach(), record, 0.4, 0, "none")


def test_opcheck_added_noise_and_rounding():
    x, record = torch.randn(4, 6, requires_grad=True), new_record()
    checked(registered_fused.add_noise, x, record, 0.5, 0)
    checked(registered_fused.stochastic_round, x, record, torch.bfloat16, 0)


def test_parameters_of_another_kind_are_refused_before_memory_is_read():
    record, x = new_record(), torch.ones(3, 4)
    for kind, p in (("normal", torch.ones(4)), ("bernoulli", None), ("bernoulli", torch.ones(4)),
                    ("integers", torch.ones(3, dtype=torch.int64))):  # fmt: skip
        with pytest.raises(ev.EverettError, match=f"fill: {kind} takes"):
            registered.fill(record, kind, [4], torch.float32, 0, p)
    with pytest.raises(ev.EverettError, match="bias: must be"):
        registered_fused.bias_gelu_dropout(x, torch.ones(3), record, 0.5, 0, "none")
    with pytest.raises(ev.EverettError, match="residual or grad: must be"):
        registered_fused.bias_dropout_add(x, None, torch.ones(4), record, 0.5, 0)


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine,mask_dims", [(None, None), ([1.1, 0.2, -0.3], None), (None, 2), (None, 1)])
def test_a_shard_is_the_slice_of_the_whole(affine, mask_dims):
    whole = (7, 10, 6)
    x, record = torch.randn(whole), new_record()
    reference = registered.masked(x, None, record, 0.4, 0, affine, 0, mask_dims)
    for starts, shape in (((0, 0, 0), whole), ((4, 0, 0), (3, 10, 6)), ((0, 7, 0), (7, 3, 6)), ((2, 3, 5), (4, 5, 1))):
        part = tuple(slice(a, a + n) for a, n in zip(starts, shape, strict=True))
        shard = x[part].contiguous().requires_grad_()
        y = registered.masked_shard(shard, None, record, _index(starts, shape), 0.4, 0, affine, mask_dims, whole)
        assert torch.equal(y, reference[part])
        (slope,) = torch.autograd.grad(y.sum(), shard)
        linear = None if affine is None else [affine[0], 0.0, 0.0]
        assert torch.equal(slope, registered.masked(torch.ones(whole), None, record, 0.4, 0, linear, 0, mask_dims)[part])


def test_a_shard_is_the_references():
    record, whole, starts, shape = new_record(), (9, 70), (3, 32), (4, 38)
    x, residual = torch.randn(shape), torch.randn(shape)
    y = registered.masked_shard(x, residual, record, _index(starts, shape), 0.3, 0, None, None, whole)
    e = layout.shard_indices(whole, starts, shape)
    expected = keepdrop.dropout_add(x.numpy(), residual.numpy(), record.numpy().view("<u4"), 0.3, e)
    assert y.numpy().tobytes() == np.ascontiguousarray(expected).tobytes()


def test_empty_shards_and_wrong_index_tensors():
    record, x = new_record(), torch.ones(3, 4)
    empty = registered.masked_shard(x[:0], None, record, _index((7, 0), (0, 4)), 0.5, 0, None, None, (7, 4))
    assert empty.shape == (0, 4)
    for index, message in (
        ([torch.arange(3)], "one index tensor a dimension"),
        ([torch.arange(3), torch.arange(3)], r"index 1 must be int64, \(4,\)"),
        ([torch.arange(3), torch.arange(4.0)], r"index 1 must be int64"),
        ([torch.tensor([0, 2, 4]), torch.arange(4)], "must follow one another"),
    ):
        with pytest.raises(ev.EverettError, match=message):
            registered.masked_shard(x, None, record, index, 0.5, 0, None, None, (7, 4))


def test_a_residual_of_another_kind_is_refused_before_memory_is_read():
    x, record, index = torch.ones(3, 4), new_record(), _index((0, 0), (3, 4))
    for residual in (torch.ones(4), torch.ones(3, 4, dtype=torch.float64)):
        with pytest.raises(ev.EverettError, match="residual: must match x"):
            registered.masked(x, residual, record, 0.5, 0, None, 0, None)
        with pytest.raises(ev.EverettError, match="residual: must match x"):
            registered.masked_shard(x, residual, record, index, 0.5, 0, None, None, (3, 4))


# --- vmap rules -------------------------------------------------------------------------------------------------------


BATCHED = [dims for dims in itertools.product((None, 0, 1), (None, 1), (None, 0)) if dims != (None, None, None)]


@pytest.mark.parametrize("x_dim,residual_dim,record_dim", BATCHED)
def test_vmap_is_the_stack_of_single_calls(x_dim, residual_dim, record_dim):
    x, residual = (torch.randn(6) if dim is None else torch.randn(6, 6) for dim in (x_dim, residual_dim))
    records = torch.stack([new_record() for _ in range(6)])
    record = records[0] if record_dim is None else records

    def op(x, residual, record):
        return registered.masked(x, residual, record, 0.5, 0, None, 0, None)

    def row(t, dim, i):
        return t if dim is None else t.select(dim, i)

    batched = torch.vmap(op, in_dims=(x_dim, residual_dim, record_dim))(x, residual, record)
    singles = [op(row(x, x_dim, i), row(residual, residual_dim, i), row(record, record_dim, i)) for i in range(6)]
    assert torch.equal(batched, torch.stack(singles))


@pytest.mark.filterwarnings("ignore:the torch RNG state repeated")
def test_vmapped_mix_gives_each_nonce_its_record():
    nonces = torch.stack([nonce_tensor("cpu") for _ in range(4)])
    records = torch.vmap(lambda n: registered.mix(n, True, False))(nonces)
    assert torch.equal(records, torch.stack([registered.mix(n, True, False) for n in nonces]))
    assert len({tuple(r.tolist()) for r in records}) == 4
