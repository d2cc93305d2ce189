"""torch.compile: whole graphs, right gradients, fresh bits at every call, draws that are never merged, clear errors."""

import itertools
import shutil
import warnings

import numpy as np
import pytest
import torch
import torch._functorch.config
from compiled import check_gradients, every_op, few_ops, inputs

import everett_cuda as ev
from everett_cuda import keys
from everett_cuda.nonce import nonce_tensor

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor's CPU code needs g++")
BACKENDS = ["aot_eager", pytest.param("inductor", marks=needs_compiler)]
_compiled = {}  # by backend: compilation is what these tests take their time for


@pytest.fixture(autouse=True)
def source():
    ev.set_freshness("op")
    opened = ev.open("sim:seed=7")
    torch.manual_seed(1234)
    with torch._functorch.config.patch(donated_buffer=False):  # each op's gradient is asked for by itself, in one graph
        yield opened
    ev.close()


@pytest.fixture(params=BACKENDS)
def compiled(request):
    """Every op, or the few that inductor's time allows, compiled as one graph by a backend."""
    if request.param not in _compiled:
        torch._dynamo.reset()
        function = few_ops if request.param == "inductor" else every_op
        _compiled[request.param] = torch.compile(function, backend=request.param, fullgraph=True, dynamic=False)
    return _compiled[request.param]


def test_values_and_gradients_are_those_of_one_mask(compiled):
    x = inputs()
    with warnings.catch_warnings():
        for about in ("Dynamo", ".*lru_cache"):  # no op of ours makes dynamo warn
            warnings.filterwarnings("error", message=about)
        check_gradients(compiled(x), x)


def test_every_call_is_fresh_and_no_two_draws_are_one(compiled):
    x = inputs()
    calls = [compiled(x) for _ in range(3)]
    for a, b in itertools.combinations(calls, 2):
        assert all(not torch.equal(a[name], b[name]) for name in a)
    for call in calls:
        masks = [call[name] for name in ("dropout", "dropout again", "in place", "philox") if name in call]
        assert all(not torch.equal(a, b) for a, b in itertools.combinations(masks, 2))


def test_a_call_takes_a_key_a_draw(compiled):
    x = inputs()
    before = keys.counters()
    read = len(compiled(x))
    after = keys.counters()
    # Whether the draw that nobody reads happens is the compiler's to choose.
    assert after["draws"] - before["draws"] in (read, read + 1)
    assert after["fresh"] + after["stretched"] - before["fresh"] - before["stretched"] == after["draws"] - before["draws"]


def test_the_torch_rng_state_decides_which_bits_within_a_step(compiled):
    x = inputs()
    runs = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            torch.manual_seed(5)
            runs.append(compiled(x))
        assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
        ev.step()
        torch.manual_seed(5)
        assert all(not torch.equal(y, runs[0][name]) for name, y in compiled(x).items())


def test_key_rotation_between_forward_and_backward(compiled):
    x = inputs()
    results = compiled(x)
    ev.step()
    compiled(x)
    check_gradients(results, x)


def test_inference_mode_is_always_fresh(compiled):
    x = inputs().detach()
    runs = []
    with torch.inference_mode():
        for _ in range(3):
            torch.manual_seed(0)
            runs.append(compiled(x))
    for a, b in itertools.combinations(runs, 2):
        assert all(not torch.equal(a[name], b[name]) for name in a)


def test_one_graph_for_all_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(every_op, backend="aot_eager", fullgraph=True, dynamic=True)
    compiled(inputs(batch=6))
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (9, 4):
            x = inputs(batch=batch)
            check_gradients(compiled(x), x)


@pytest.mark.parametrize("op", [ev.dropout, ev.alpha_dropout])
def test_p_may_vary(op):
    torch._dynamo.reset()
    compiled = torch.compile(op, backend="eager", fullgraph=True)
    x = torch.ones(20_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for p in (0.1, 0.2, 0.5, 0.75, 0.0, 1.0):
            torch.manual_seed(3)
            y = compiled(x, p)
            values = op(x, p).unique()
            assert torch.equal(y.unique(), values), p
            if 0 < p < 1:
                assert abs((y == values[0]).float().mean() - p) < 0.02


def test_modules_compile_and_follow_training_mode():
    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Linear(40, 40), ev.nn.Dropout(0.5), ev.nn.DropPath(0.5), ev.nn.AlphaDropout(0.2))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = inputs().detach()[0]
    assert not torch.equal(compiled(x), compiled(x))
    model.eval()
    assert torch.equal(compiled(x), model[0](x))


def test_channels_last_and_transposed_input():
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def f(x):
        return ev.dropout2d(x, 0.5), ev.dropout(x.transpose(1, 3), 0.5)

    x = torch.rand(3, 8, 4, 5).add(0.5).contiguous(memory_format=torch.channels_last).requires_grad_()
    channels, elements = f(x)
    for y, source in ((channels, x), (elements, x.transpose(1, 3))):
        assert torch.equal(y, torch.where(y != 0, 2 * source, 0.0)) and 0 < (y == 0).float().mean() < 1
        (slope,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        assert torch.equal(slope if source is x else slope.transpose(1, 3), 2.0 * (y != 0))
    kept = (channels != 0).flatten(2)
    assert torch.equal(kept.all(-1), kept.any(-1)), "one decision a channel"


@pytest.mark.parametrize("call,error,message", [
    (lambda x: ev.dropout(x, 1.5), ValueError, "from 0 to 1, got 1.5"),
    (lambda x: ev.dropout(x.int()), TypeError, "dropout needs float32"),
    (lambda x: ev.dropout(x, stream="aes"), ValueError, "stream: one of chacha8"),
    (lambda x: ev.dropout_add(x, x[0]), ValueError, "residual: must match x"),
    (lambda x: ev.bias_gelu_dropout(x, x[0, 0, :3]), ValueError, "bias: one value a column"),
    (lambda x: ev.randn(-3) + x, ValueError, "must not be negative"),
])  # fmt: skip
def test_errors_stay_clear(call, error, message):
    torch._dynamo.reset()
    x = inputs().detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(error, match=message):
            torch.compile(call, backend="eager")(x)
        torch._dynamo.reset()  # else dynamo leaves alone what it could not compile
        with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
            torch.compile(call, backend="eager", fullgraph=True)(x)


def test_without_a_source_a_compiled_draw_fails():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ev.dropout(x), backend="aot_eager", fullgraph=True)
    compiled(torch.ones(5))
    ev.close()
    with pytest.raises(ev.SourceNotOpen):
        compiled(torch.ones(5))


@needs_compiler
def test_a_million_compiled_nonces_are_distinct():
    # inductor's CPU randint has a 32-bit seed: of a million two-word nonces from single calls some 116 repeat.
    torch._dynamo.reset()
    a_call, calls = 20, 50_000

    @torch.compile(fullgraph=True)
    def draw():
        single = [torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64) for _ in range(a_call)]
        return torch.stack([nonce_tensor("cpu") for _ in range(a_call)]), torch.stack(single)

    ours, single = (np.empty((calls, a_call, 2), np.int64) for _ in range(2))
    with torch.inference_mode():
        for i in range(calls):
            a, b = draw()
            ours[i], single[i] = a.numpy(), b.numpy()

    def distinct(nonces):
        return len(np.unique(nonces.reshape(-1, 2).view("V16")))

    assert distinct(ours) == a_call * calls
    assert distinct(single) < a_call * calls, "negative control: one call a nonce does repeat"


def test_autocast():
    """The dtype follows the input, inside the graph as outside."""

    def two(x, w):
        return ev.dropout(x @ w, 0.5), ev.dropout(x, 0.5)

    x, w = torch.randn(20, 30, requires_grad=True), torch.randn(30, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = torch.compile(two, backend="aot_eager", fullgraph=True)(x, w)
    assert (y.dtype, z.dtype) == (torch.bfloat16, torch.float32)
    y.float().sum().backward()
    kept = (y != 0).float()
    assert torch.allclose(x.grad, 2 * kept @ w.t(), rtol=0.02, atol=0.1)
