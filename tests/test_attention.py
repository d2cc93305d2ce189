"""Attention with dropout: against the reference's mask, gradients, checkpoints, functorch, torch's semantics, misuse."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck
from torch.utils.checkpoint import checkpoint

import everett_cuda as ev
from everett_cuda import keys
from everett_cuda.reference import attention

STREAMS = ("philox", "chacha8", "chacha12", "chacha20")


@pytest.fixture(autouse=True)
def source():
    ev.set_freshness("op")
    opened = ev.open("sim:seed=13")
    torch.manual_seed(4321)
    yield opened
    ev.close()


def _qkv(*batch, queries=20, keys=37, features=8, dtype=torch.float64):
    g = torch.Generator().manual_seed(5)
    shapes = ((*batch, queries, features), (*batch, keys, features), (*batch, keys, 6))
    return [torch.randn(s, dtype=dtype, generator=g).requires_grad_() for s in shapes]


def _mask_of_next_draw(shape, p, stream="philox", seed=99):
    """The multiplier (0 or 1/(1-p)) of each weight in the next call, and torch's generator as that call will find it."""
    torch.manual_seed(seed)
    record = np.frombuffer(keys.draw_record(), "<u4")
    torch.manual_seed(seed)
    kept = attention.keep_mask(record, p, (math.prod(shape[:-2]), *shape[-2:]), stream).reshape(shape)
    return torch.from_numpy(kept).double() / (1 - p)


def _attention(q, k, v, multiplier, bias=0.0, scale=None):
    """The definition, in fp64."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return (torch.softmax(q @ k.transpose(-2, -1) * scale + bias, -1) * multiplier) @ v


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("p", [1 / 256, 0.1, 0.5, 31 / 32])
def test_values_and_gradients_are_the_references(stream, p):
    q, k, v = _qkv(2, 3)
    m = _mask_of_next_draw((2, 3, 20, 37), p, stream)
    y = ev.scaled_dot_product_attention(q, k, v, dropout_p=p, stream=stream)
    expected = _attention(q, k, v, m)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(y)
    got, wanted = (torch.autograd.grad(t, (q, k, v), upstream) for t in (y, expected))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    # Negative control: another draw's mask is another result.
    assert not torch.allclose(ev.scaled_dot_product_attention(q, k, v, dropout_p=p, stream=stream), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_compute_in_fp32(dtype):
    q, k, v = (t.detach().to(dtype) for t in _qkv(4))
    m = _mask_of_next_draw((4, 20, 37), 0.3)
    y = ev.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
    expected = _attention(q.double(), k.double(), v.double(), m).to(dtype)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected)


def test_masks_causality_scale_and_grouped_heads():
    q, k, v = _qkv(2, 4, queries=9, keys=9)
    seen = torch.rand(9, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    seen |= torch.eye(9, dtype=torch.bool)
    bias = torch.randn(2, 1, 9, 9, dtype=torch.float64)
    cases = [
        (dict(is_causal=True), torch.where(torch.ones(9, 9).tril() > 0, 0.0, -math.inf), None),
        (dict(attn_mask=seen), torch.where(seen, 0.0, -math.inf), None),
        (dict(attn_mask=bias), bias, None),
        (dict(scale=0.3), 0.0, 0.3),
    ]
    for options, added, scale in cases:
        m = _mask_of_next_draw((2, 4, 9, 9), 0.25)
        y = ev.scaled_dot_product_attention(q, k, v, dropout_p=0.25, **options)
        torch.testing.assert_close(y, _attention(q, k, v, m, added, scale), rtol=1e-11, atol=1e-11)
    few_k, few_v = k[:, :2], v[:, :2]
    m = _mask_of_next_draw((2, 4, 9, 9), 0.25)
    y = ev.scaled_dot_product_attention(q, few_k, few_v, dropout_p=0.25, enable_gqa=True)
    expected = _attention(q, few_k.repeat_interleave(2, 1), few_v.repeat_interleave(2, 1), m)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)


def test_mean_over_masks_is_torchs_attention():
    q, k, v = (t.detach() for t in _qkv(1, 2, queries=33, keys=33))
    nothing_seen = torch.ones(33, 33, dtype=torch.bool)
    nothing_seen[4] = False
    for options in ({}, {"is_causal": True}, {"attn_mask": nothing_seen}):
        plain = F.scaled_dot_product_attention(q, k, v, **options)
        total = sum(ev.scaled_dot_product_attention(q, k, v, dropout_p=0.2, **options) for _ in range(400)) / 400
        # Variance of a weight's multiplier: p / (1 - p), and the weights of a query add up to 1.
        assert (total - plain).abs().max() < 6 * math.sqrt(0.25 / 400) * v.abs().max()
        assert total.isfinite().all()


def test_no_dropout_is_torchs_own():
    q, k, v = _qkv(2, 3)
    assert torch.equal(ev.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert keys.counters()["draws"] == 0
    for t in torch.autograd.grad(ev.scaled_dot_product_attention(q, k, v, dropout_p=1.0).sum(), (q, k, v)):
        assert not t.any()
    assert not ev.scaled_dot_product_attention(q, k, v, dropout_p=1.0).any() and keys.counters()["draws"] == 0


# --- checkpoints, functorch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_recompute_the_mask(reentrant):
    q, k, v = _qkv(2, 3)

    def block(q, k, v):
        return ev.scaled_dot_product_attention(torch.sin(q), k, torch.tanh(v), dropout_p=0.4).exp()

    torch.manual_seed(7)
    plain = torch.autograd.grad(block(q, k, v).sum(), (q, k, v))
    torch.manual_seed(7)
    x = [t.detach().requires_grad_() for t in (q, k, v)]
    checkpoint(block, *x, use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(a.grad, b) for a, b in zip(x, plain, strict=True))


def test_gradcheck_and_forward_mode():
    q, k, v = _qkv(1, 2, queries=4, keys=5, features=3)

    def f(q, k, v):
        torch.manual_seed(3)
        return ev.scaled_dot_product_attention(q, k, v, dropout_p=0.4)

    assert gradcheck(f, (q, k, v))
    tangent = torch.randn_like(v)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(f(q.detach(), k.detach(), forward_ad.make_dual(v.detach(), tangent))).tangent
    # Of functorch's way there: its nonce is the plain call's.
    assert torch.allclose(dual, f(q, k, tangent))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap(randomness):
    q, k, v = (t.detach() for t in _qkv(2, queries=16, keys=16))
    f = torch.vmap(lambda q: ev.scaled_dot_product_attention(q, k, v, dropout_p=0.5), randomness=randomness)
    rows = f(q.expand(5, *q.shape))
    assert (len({tuple(r.flatten().tolist()) for r in rows}) == 1) == (randomness == "same")
    assert len({tuple(r.flatten().tolist()) for r in rows}) in (1, 5)
    grads = torch.vmap(
        torch.func.grad(lambda q: ev.scaled_dot_product_attention(q, k, v, dropout_p=0.5).sum()), randomness=randomness
    )(q.expand(5, *q.shape))
    assert len({tuple(r.flatten().tolist()) for r in grads}) == (1 if randomness == "same" else 5)


def test_a_mask_is_of_the_rank_family():
    q, k, v = _qkv(1)
    torch.manual_seed(1)
    ev.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(1)
    keys.draw_record()  # of this family, with this nonce, the key is there
    assert keys.counters()["reused"] == 1


# --- edges and misuse -------------------------------------------------------------------------------------------------


def test_edges():
    for queries, keys_ in itertools.product((1, 16, 17), (1, 64, 65)):
        q, k, v = _qkv(1, queries=queries, keys=keys_)
        assert ev.scaled_dot_product_attention(q, k, v, dropout_p=0.5).shape == (1, queries, 6)
    q, k, v = (t[0] for t in _qkv(1))
    assert ev.scaled_dot_product_attention(q, k, v, dropout_p=0.5).shape == (20, 6)
    assert ev.scaled_dot_product_attention(q[:0], k, v, dropout_p=0.5).shape == (0, 6)
    meta = [t.to("meta") for t in (q, k, v)]
    assert ev.scaled_dot_product_attention(*meta, dropout_p=0.5).shape == (20, 6)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(dropout_p=1 / 300), ValueError, "1/256 to 31/32"),
        (dict(dropout_p=0.99), ValueError, "1/256 to 31/32"),
        (dict(dropout_p=1.5), ValueError, "from 0 to 1"),
        (dict(dropout_p=float("nan")), ValueError, "from 0 to 1"),
        (dict(dropout_p="0.1"), TypeError, "number from 0 to 1"),
        (dict(stream="mt19937"), ValueError, "stream"),
        (dict(is_causal=True, attn_mask=torch.ones(20, 37, dtype=torch.bool)), ValueError, "leave attn_mask out"),
        (dict(key=torch.ones(2, 37, 5, dtype=torch.float64)), ValueError, "features"),
        (dict(value=torch.ones(2, 36, 5, dtype=torch.float64)), ValueError, "length"),
        (dict(value=torch.ones(2, 37, 5)), ValueError, "must be as query"),
        (dict(query=torch.ones(2, 20, 8, dtype=torch.int64)), TypeError, "float32"),
        (dict(enable_gqa=True, key=torch.ones(3, 37, 8, dtype=torch.float64)), ValueError, "multiple"),
    ],
)
def test_misuse(change, error, words):
    q, k, v = _qkv(2)
    with pytest.raises(error, match=words):
        ev.scaled_dot_product_attention(**{**dict(query=q, key=k, value=v, dropout_p=0.5), **change})
    assert keys.counters()["draws"] == 0
