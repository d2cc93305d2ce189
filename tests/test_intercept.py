"""`intercept()`: torch's functions draw from our streams, look like torch's, and are given back as they were."""

import importlib
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import everett_cuda as ev
from everett_cuda import keys, untouched
from everett_cuda.stand_ins import STAND_INS, own


@pytest.fixture(autouse=True)
def source():
    with ev.open("sim:seed=7") as opened:
        torch.manual_seed(1)
        untouched._counts.clear()
        yield opened
    ev.close()


def again(first, second):
    """Both results from one torch RNG state, within one step: ours then finds the same key."""
    state = torch.get_rng_state()
    a = first()
    torch.set_rng_state(state)
    return a, second()


def draws_of(call) -> int:
    before = keys.counters()["draws"]
    call()
    return keys.counters()["draws"] - before


X = torch.linspace(-2, 2, 60).view(3, 4, 5)
CHANNELS = torch.ones(8, 16, 2, 2)  # 128 channels: torch's own masks will not be equal to ours by chance
P = torch.linspace(0, 1, 12)
# (torch's call, ours that must give the same bits)
TWINS = {
    "dropout": (lambda: F.dropout(X, 0.3), lambda: ev.dropout(X, 0.3)),
    "dropout p as a tensor": (lambda: F.dropout(X, torch.tensor(0.25)), lambda: ev.dropout(X, 0.25)),
    "dropout1d": (lambda: F.dropout1d(CHANNELS[0], 0.3), lambda: ev.dropout1d(CHANNELS[0], 0.3)),
    "dropout2d": (lambda: F.dropout2d(CHANNELS, 0.3), lambda: ev.dropout2d(CHANNELS, 0.3)),
    "dropout3d": (lambda: F.dropout3d(CHANNELS[:, :, None], 0.3), lambda: ev.dropout3d(CHANNELS[:, :, None], 0.3)),
    "alpha_dropout": (lambda: F.alpha_dropout(X, 0.3, True), lambda: ev.alpha_dropout(X, 0.3)),
    "rand": (lambda: torch.rand(3, 4), lambda: ev.rand(3, 4)),
    "rand size=": (lambda: torch.rand(size=(3, 4), dtype=torch.float64), lambda: ev.rand(3, 4, dtype=torch.float64)),
    "rand scalar": (lambda: torch.rand([]), lambda: ev.rand(())),
    "randn": (lambda: torch.randn((5,)), lambda: ev.randn(5)),
    "rand_like": (lambda: torch.rand_like(X), lambda: ev.rand(3, 4, 5)),
    "randn_like": (lambda: torch.randn_like(X, dtype=torch.bfloat16), lambda: ev.randn(3, 4, 5, dtype=torch.bfloat16)),
    "randint": (lambda: torch.randint(10, (6,)), lambda: ev.randint(0, 10, (6,))),
    "randint low": (lambda: torch.randint(-3, high=3, size=(6,)), lambda: ev.randint(-3, 3, (6,))),
    "randint_like": (
        lambda: torch.randint_like(X, 2, 9), lambda: ev.randint(2, 9, (3, 4, 5), dtype=torch.float32)
    ),
    "randperm": (lambda: torch.randperm(17), lambda: ev.randperm(17)),
    "bernoulli": (lambda: torch.bernoulli(P), lambda: ev.bernoulli(P)),
    "bernoulli p": (
        lambda: torch.bernoulli(torch.zeros(9, dtype=torch.int64), 0.5), lambda: ev.bernoulli(0.5, 9).long()
    ),
    "normal": (lambda: torch.normal(2.0, 3.0, (7,)), lambda: ev.randn(7) * 3.0 + 2.0),
    "normal of tensors": (
        lambda: torch.normal(X[0, 0], X[0, :, :1].abs()), lambda: ev.randn(4, 5) * X[0, :, :1].abs() + X[0, 0]
    ),
    "normal std alone": (lambda: torch.normal(0.0, P), lambda: ev.randn(12) * P),
    "multinomial": (lambda: torch.multinomial(P, 5), lambda: ev.multinomial(P, 5)),
    "multinomial with replacement": (lambda: torch.multinomial(P, 20, True), lambda: ev.multinomial(P, 20, True)),
    "Normal.sample": (
        lambda: torch.distributions.Normal(torch.zeros(5), torch.ones(5)).sample(), lambda: ev.randn(5)
    ),
    "Categorical.sample": (
        lambda: torch.distributions.Categorical(P).sample((3,)),
        lambda: ev.multinomial((P / P.sum())[None], 3, True).T.reshape(3),
    ),
    "init.uniform_": (lambda: nn.init.uniform_(torch.empty(3, 4), -1, 3), lambda: ev.rand(3, 4) * 4 - 1),
    "init.normal_": (lambda: nn.init.normal_(torch.empty(3, 4), 1, 2), lambda: ev.randn(3, 4) * 2 + 1),
    "init.kaiming_normal_": (
        lambda: nn.init.kaiming_normal_(torch.empty(3, 8), nonlinearity="relu"), lambda: ev.randn(3, 8) * 0.5
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TWINS)
def test_numbers_are_those_of_our_functions(name):
    torchs, ours = TWINS[name]
    with ev.intercept():
        a, b = again(torchs, ours)
    assert torch.equal(a, b) and a.dtype == b.dtype
    with_torch, _ = again(torchs, ours)
    assert not torch.equal(with_torch, b), "outside it must be torch's own"


@pytest.mark.parametrize("name", TWINS)
def test_dtype_shape_and_strides_are_torchs(name):
    torchs, _ = TWINS[name]
    expected = torchs()
    with ev.intercept():
        got = torchs()
    assert (got.dtype, got.shape, got.stride(), got.requires_grad) == (
        expected.dtype, expected.shape, expected.stride(), expected.requires_grad
    )  # fmt: skip


def test_entering_without_a_source_is_an_error_and_swaps_nothing():
    ev.close()
    before = {name: own(name) for name in STAND_INS}
    with pytest.raises(ev.SourceNotOpen, match="ev.open"):
        with ev.intercept():
            pytest.fail("entered")
    assert all(own(name) is function for name, function in before.items())


def test_every_attribute_is_given_back_also_after_an_exception():
    before = {name: own(name) for name in STAND_INS}
    with pytest.raises(KeyError), ev.intercept():
        assert all(own(name) is stand_in for name, stand_in in STAND_INS.items())
        raise KeyError
    assert all(own(name) is function for name, function in before.items())
    assert all(name.rpartition(".")[2] in vars(own(name.rpartition(".")[0])) for name in before)


def test_nested_and_in_threads_the_last_one_out_restores():
    torchs = F.dropout
    inside, leave = threading.Event(), threading.Event()

    def other():
        with ev.intercept():
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with ev.intercept():
        with ev.intercept():
            assert F.dropout is not torchs
        assert F.dropout is not torchs
        thread.start()
        assert inside.wait(30)
    assert F.dropout is not torchs, "the other thread is still inside"
    leave.set()
    thread.join(30)
    assert F.dropout is torchs


def test_decorates_functions_but_not_those_that_run_later():
    torchs = F.dropout

    @ev.intercept()
    def step():
        return F.dropout

    assert step() is not torchs and F.dropout is torchs
    with pytest.raises(TypeError, match="inside it"):

        @ev.intercept()
        def generator():
            yield

    with pytest.raises(TypeError, match="coroutine"):

        @ev.intercept()
        async def coroutine():
            pass


def test_a_replacement_of_somebody_elses_is_left_alone(monkeypatch):
    torchs = torch.rand
    with pytest.warns(UserWarning, match="torch.rand was replaced"), ev.intercept():
        torch.rand = mine = lambda *args: torch.zeros(args)
    assert torch.rand is mine
    torch.rand = torchs


def test_modules_imported_inside_do_not_keep_our_functions(tmp_path, monkeypatch):
    (tmp_path / "late_model.py").write_text("from torch.nn.functional import dropout\nfrom torch import rand\n")
    monkeypatch.syspath_prepend(tmp_path)
    with ev.intercept():
        late = importlib.import_module("late_model")
        assert late.dropout is STAND_INS["torch.nn.functional.dropout"]
    assert late.dropout is F.dropout and late.rand is torch.rand


# --- what stays torch's -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda g: torch.rand(5, generator=g),
        lambda g: torch.randperm(9, generator=g),
        lambda g: torch.randint(9, (5,), generator=g),
        lambda g: torch.bernoulli(P, generator=g),
        lambda g: torch.normal(P, 1.0, generator=g),
        lambda g: torch.multinomial(P, 4, generator=g),
        lambda g: nn.init.normal_(torch.empty(4), generator=g),
        lambda g: nn.init.kaiming_uniform_(torch.empty(4, 4), generator=g),
    ],
)
def test_a_torch_generator_is_torchs(call):
    expected = call(torch.Generator().manual_seed(3))
    with ev.intercept():
        assert torch.equal(call(torch.Generator().manual_seed(3)), expected)
        assert draws_of(lambda: call(torch.Generator().manual_seed(3))) == 0
    assert [why for _, why in untouched.untouched()] == ["a torch.Generator was passed"]


def test_our_generator_is_ours():
    a = ev.Generator().manual_seed(5)
    b = a.clone()
    with ev.intercept():
        assert torch.equal(torch.rand(5, generator=a), ev.rand(5, generator=b))
        assert torch.equal(torch.randperm(5, generator=a), ev.randperm(5, generator=b))
        assert torch.equal(nn.init.normal_(torch.empty(5), generator=a), ev.randn(5, generator=b))


def test_every_sample_is_seen_once_across_ranks():
    # each rank has a key of its own, so a permutation of ours under rank keys would repeat some and lose others
    from torch.utils.data import DistributedSampler

    seen = []
    with ev.intercept():
        for rank in range(4):
            seen += list(DistributedSampler(range(100), num_replicas=4, rank=rank, seed=3))
            ev.step()
    assert sorted(seen) == list(range(100))


LEFT = {
    ("torch.randn", "dtype complex64"): lambda: torch.randn(3, dtype=torch.complex64),
    ("F.dropout", "a nested tensor"): lambda: F.dropout(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), 0.5),
}


@pytest.mark.parametrize("key", LEFT)
def test_what_ours_cannot_serve_is_torchs_and_counted(key):
    with ev.intercept():
        assert draws_of(LEFT[key]) == 0
    assert untouched.untouched() == {key: 1}


class Wrapped(torch.Tensor):
    """A subclass with a dispatch of its own and no rule for our ops: it is unwrapped around each op."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        unwrap = torch.utils._pytree.tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        return torch.utils._pytree.tree_map_only(torch.Tensor, cls, func(*unwrap[0], **unwrap[1]))


class Named(torch.Tensor):
    """A subclass by torch's default rules."""


def test_subclasses_without_a_rule_are_torchs_and_others_keep_their_class():
    with ev.intercept():
        y = F.dropout(Wrapped(torch.ones(8)), 0.5)
        assert type(y) is Wrapped and untouched.untouched() == {("F.dropout", "no rule for Wrapped"): 1}
        x = torch.ones(8).as_subclass(Named)
        ours, plain = again(lambda: F.dropout(x, 0.5), lambda: ev.dropout(torch.ones(8), 0.5))
    assert type(ours) is Named and torch.equal(ours.as_subclass(torch.Tensor), plain)


def test_nothing_random_draws_nothing():
    x = torch.ones(3, 4)
    integers = torch.ones(3, dtype=torch.int64)
    with ev.intercept():
        assert draws_of(lambda: F.dropout(x, 0.5, training=False)) == 0
        assert F.dropout(x, 0.0) is x or torch.equal(F.dropout(x, 0.0), x)
        assert torch.equal(F.dropout(integers, 0.5, False), integers)
        assert draws_of(lambda: F.scaled_dot_product_attention(x, x, x)) == 0
        assert draws_of(lambda: torch.rand(3, device="meta")) == 0
        with torch.device("meta"):
            assert torch.rand(3).is_meta and nn.Linear(2, 2).weight.is_meta
    assert not untouched.untouched()


def test_arguments_out_of_range_are_torchs_errors():
    with ev.intercept():
        with pytest.raises(ValueError, match="0 to 1|between 0 and 1"):
            F.dropout(X, 1.5)
        with pytest.raises(RuntimeError, match="std >= 0"):
            torch.normal(0.0, -1.0, (3,))
        with pytest.raises(RuntimeError, match="from"):
            nn.init.uniform_(torch.empty(3), 1, 0)
        with pytest.raises(RuntimeError):  # torch's own: integers are no uniforms
            torch.rand(3, dtype=torch.int64)
        with pytest.raises(RuntimeError, match="2D or 3D"):
            F.dropout1d(torch.ones(3))
        with pytest.warns(UserWarning, match="dropout2d"):
            F.dropout2d(torch.ones(2, 3), 0.5)


def test_a_function_mode_sees_our_function_in_torchs_place():
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with ev.intercept(), Mode():
        F.dropout(X, 0.5)
        expected = F.dropout
    assert seen[0] is expected


# --- what torch promises about results --------------------------------------------------------------------------------


def test_out_pin_and_requires_grad():
    with ev.intercept():
        out = torch.empty(7, dtype=torch.float64)
        a, b = again(lambda: torch.rand(7, out=out), lambda: ev.rand(7, dtype=torch.float64))
        assert a is out and torch.equal(out, b)
        assert torch.randn(9, out=out).shape == (9,) and out.shape == (9,)
        assert torch.rand(3, requires_grad=True).requires_grad
        integers = torch.empty(4, dtype=torch.int64)
        assert torch.randperm(4, out=integers) is integers and sorted(integers.tolist()) == [0, 1, 2, 3]
        assert torch.multinomial(P, 3, out=integers) is integers and integers.shape == (3,)


def test_like_forms_keep_strides_and_the_logical_order():
    x = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    with ev.intercept():
        a, b = again(lambda: torch.rand_like(x), lambda: ev.rand(2, 3, 4, 5))
        assert a.stride() == x.stride() and torch.equal(a, b)
        assert torch.rand_like(x, memory_format=torch.contiguous_format).is_contiguous()
        assert torch.rand_like(x[:, ::2].requires_grad_()).requires_grad is False


def test_draws_by_tensors_have_torchs_zero_gradient():
    p = torch.full((5,), 0.5, requires_grad=True)
    with ev.intercept():
        for y in (torch.bernoulli(p), torch.normal(p, 1.0)):
            p.grad = None
            y.sum().backward()
            assert torch.equal(p.grad, torch.zeros(5))


# --- gradients, attention, modules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout"])
def test_gradients_are_those_of_the_mask_used(name):
    x = torch.randn(2, 6, 5, 4, 3)[(slice(None),) * 5 if name == "dropout3d" else (0,)]
    x = (x[0] if name == "dropout1d" else x).clone().requires_grad_()
    with ev.intercept():
        y = getattr(F, name)(x, 0.4, True)
    y.sum().backward()
    if name == "feature_alpha_dropout":
        a = x.grad.unique()
        assert len(a) == 2 and 0 in a
        dropped = x.grad == 0
        assert len(y[dropped].unique()) == 1 and dropped.flatten(2).float().std(-1).max() == 0
        return
    kept = y != 0
    assert torch.equal(x.grad, torch.where(kept, 1 / 0.6, 0.0)) and 0 < kept.float().mean() < 1
    if name != "dropout":
        decided = 1 if (name, x.dim()) in {("dropout1d", 2)} else 2
        assert (kept.flatten(decided).float().std(-1) == 0).all()


def test_inplace_forms_write_where_torch_does():
    with ev.intercept():
        for f in (F.dropout, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout, F.rrelu):
            x = torch.randn(4, 5, 6)
            kwargs = {} if f is F.rrelu else {"p": 0.5}
            assert f(x, training=True, inplace=True, **kwargs) is x


def test_rrelu_draws_a_slope_for_each_negative_number():
    x = torch.linspace(-3, 3, 1001, dtype=torch.float64, requires_grad=True)
    with ev.intercept():
        assert draws_of(lambda: F.rrelu(x, 0.1, 0.4, training=True)) == 1
        y = nn.RReLU(0.1, 0.4)(x)
    y.sum().backward()
    slopes = (y / x)[x < 0]
    assert ((slopes >= 0.1) & (slopes < 0.4)).all() and slopes.std() > 0.05
    assert torch.equal(y[x > 0], x[x > 0]) and torch.allclose(x.grad[x < 0], slopes) and (x.grad[x > 0] == 1).all()


def test_gumbel_softmax_uses_our_gumbels():
    logits = torch.randn(6, 5, requires_grad=True)
    with ev.intercept():
        soft, gumbels = again(lambda: F.gumbel_softmax(logits, tau=0.7), lambda: ev.gumbel(6, 5))
        hard = F.gumbel_softmax(logits, hard=True)
    assert torch.equal(soft, ((logits + gumbels) / 0.7).softmax(-1))
    assert set(hard.detach().round(decimals=4).unique().tolist()) == {0.0, 1.0}
    hard[:, 0].sum().backward()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_is_reached(need_weights):
    attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    x = torch.randn(3, 6, 8)
    with ev.intercept():
        assert draws_of(lambda: attention(x, x, x, need_weights=need_weights)) == 1
        assert draws_of(lambda: attention.eval()(x, x, x, need_weights=need_weights)) == 0
        report = ev.coverage(attention.train(), (x, x, x))
    assert report.count("quantum stream") == 1 and not report.untouched


def test_attention_is_the_weights_it_dropped():
    q, k, v = torch.randn(3, 2, 4, 6, 8, dtype=torch.float64).unbind(0)
    with ev.intercept():
        y, weights = again(
            lambda: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, is_causal=True),
            # v = identity: what comes out are the dropped weights themselves
            lambda: F.scaled_dot_product_attention(
                q, k, torch.eye(6, dtype=q.dtype).expand(2, 4, 6, 6), dropout_p=0.5, is_causal=True
            ),
        )
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    scores = (q @ k.mT / 8**0.5).masked_fill(~causal, float("-inf")).softmax(-1)
    kept = weights != 0
    assert torch.allclose(weights, torch.where(kept, scores * 2, 0.0)) and torch.allclose(y, weights @ v)
    assert 0.2 < kept[..., causal].double().mean() < 0.8


def test_transformer_encoder_layer_is_reached_in_training_and_quiet_in_eval():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
    x = torch.randn(2, 5, 8)
    with ev.intercept():
        report = ev.coverage(layer, x)
        assert draws_of(lambda: layer.eval()(x)) == 0
        with torch.no_grad():  # the C++ fast path
            assert draws_of(lambda: layer(x)) == 0
    assert report.count("quantum stream") == 4 and not report.untouched


# --- weights ----------------------------------------------------------------------------------------------------------


def test_initialisations_keep_their_laws():
    with ev.intercept():
        w = torch.empty(40, 60)
        nn.init.orthogonal_(w, gain=2.0)
        assert torch.allclose(w @ w.T, 4 * torch.eye(40), atol=1e-4)
        nn.init.orthogonal_(w.T)
        assert torch.allclose(w @ w.T, torch.eye(40), atol=1e-5)
        nn.init.sparse_(w, 0.3, std=2.0)
        assert ((w == 0).sum(0) == 12).all() and len({tuple(c.tolist()) for c in (w == 0).T}) > 50
        nn.init.trunc_normal_(w, 1.0, 2.0, -1.0, 2.0)
        assert w.min() >= -1 and w.max() <= 2
        # mean of the truncated normal: mean + std * (phi(-1) - phi(.5)) / (Phi(.5) - Phi(-1)); 5 sigma of 2,400 values
        assert abs(w.mean() - 0.5861) < 5 * 0.84 / 2400**0.5
        nn.init.kaiming_uniform_(w, nonlinearity="relu")
        assert w.abs().max() <= (6 / 60) ** 0.5 and w.std() == pytest.approx((2 / 60) ** 0.5, rel=0.08)
        nn.init.xavier_normal_(w)
        assert w.std() == pytest.approx((2 / 100) ** 0.5, rel=0.08)
        with pytest.raises(ValueError, match="2 dim|2 or more"):
            nn.init.orthogonal_(torch.empty(3))
    assert not untouched.untouched()


def test_a_model_built_inside_has_quantum_weights_throughout():
    state = torch.get_rng_state()
    models = []
    with ev.intercept():
        for _ in range(2):
            torch.set_rng_state(state)
            models.append(dict(nn.Transformer(8, 2, 1, 1, 16).named_parameters()))
            ev.step()  # the same torch state finds new keys: what is equal all the same was not drawn from us
    first, second = models
    constant = {name for name, p in first.items() if p.unique().numel() == 1}
    assert {name for name in first if torch.equal(first[name], second[name])} == constant
