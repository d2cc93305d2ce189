"""Export, make_fx, fake tensors, torch.jit, subclasses, dispatch modes and copies: the draw is recorded, not its mask."""

import copy
import io
import pickle

import pytest
import torch
from compiled import check_gradients, every_op, inputs
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import everett_cuda as ev
from everett_cuda import keys


@pytest.fixture(autouse=True)
def source():
    ev.set_freshness("op")
    opened = ev.open("sim:seed=7")
    torch.manual_seed(1234)
    yield opened
    ev.close()


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(40, 40)
        self.dropout = ev.nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.linear(x))


def check_fresh(f, model, x):
    a, b = f(x), f(x)
    y = model.linear(x)
    for out in (a, b):
        assert torch.allclose(out, torch.where(out != 0, 2 * y, 0.0)) and 0.3 < (out == 0).float().mean() < 0.7
    assert not torch.equal(a, b)


def targets(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    model, x = Model(), inputs().detach()
    exported = torch.export.export(model, (x,), strict=strict)
    ops = targets(exported.graph)
    for op, count in (("aten.randint.low", 4), ("everett_cuda.mix.default", 1), ("everett_cuda.masked.default", 1)):
        assert ops.count(op) == count, op
    assert not [name for name, _ in exported.named_buffers()] and not exported.constants, "no key and no mask in it"
    check_fresh(exported.module(), model, x)


def test_export_saved_and_loaded_with_dynamic_sizes():
    model, x = Model(), inputs().detach()
    sizes = {"x": {0: torch.export.Dim("batch")}}
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=sizes), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    check_fresh(loaded, model, inputs(batch=9).detach())


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode):
    model, x = Model(), inputs().detach()
    graph = make_fx(model.dropout, tracing_mode=mode)(x)
    ops = targets(graph.graph)
    assert ops.count("aten.randint.low") == 4 and ops.count("everett_cuda.masked.default") == 1
    check_fresh(lambda x: graph(model.linear(x)), model, x)


def test_make_fx_of_transforms_and_of_gradients():
    x = inputs().detach()[0]
    slopes = torch.vmap(torch.func.grad(lambda v: ev.dropout(v, 0.5).sum()), randomness="different")
    graph = make_fx(slopes, tracing_mode="fake")(x)
    for out in (graph(x), graph(x)):
        assert set(out.unique().tolist()) == {0.0, 2.0} and len({tuple(row.tolist()) for row in out}) == len(x)

    def value_and_slope(v):
        y = ev.dropout(v, 0.5)
        return y, torch.autograd.grad(y.sum(), v)[0]

    leaf = x.clone().requires_grad_()
    y, slope = make_fx(value_and_slope)(leaf)(leaf)
    assert torch.equal(slope, 2.0 * (y != 0))


def test_fake_tensors_draw_nothing():
    draws, state = keys.counters()["draws"], torch.get_rng_state()
    with FakeTensorMode() as mode:
        x = mode.from_tensor(inputs())
        results = every_op(x)
        sum(y.float().sum() for y in results.values()).backward()
        assert x.grad.shape == x.shape
        on_gpu = ev.dropout(torch.empty(3, 4, device="cuda", dtype=torch.bfloat16))
        assert on_gpu.device.type == "cuda" and on_gpu.dtype == torch.bfloat16
    for name, y in results.items():
        assert y.shape == x.shape and y.dtype == (torch.bfloat16 if name == "stochastic_round" else x.dtype), name
    assert keys.counters()["draws"] == draws and torch.equal(torch.get_rng_state(), state)


class _Logged(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_the_ops_and_gradients_hold():
    x = inputs()
    with _Logged() as log:
        results = every_op(x)
        check_gradients(results, x)
    for op in ("randint.low", "mix", "masked", "fill", "stochastic_round"):
        assert any(op in name for name in log.ops), op


class _Wrapper(torch.Tensor):
    """A subclass without memory of its own, as DTensor is one."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def unwrap(t):
            return t.inner if isinstance(t, cls) else t

        out = func(*torch.utils._pytree.tree_map(unwrap, args), **torch.utils._pytree.tree_map(unwrap, kwargs or {}))
        return torch.utils._pytree.tree_map(lambda t: cls(t) if isinstance(t, torch.Tensor) else t, out)


def test_a_subclass_without_memory():
    inner = inputs().detach()
    x = _Wrapper(inner).requires_grad_()
    y = ev.dropout(x, 0.5)
    assert type(y) is _Wrapper and torch.equal(y.inner, torch.where(y.inner != 0, 2 * inner, 0.0))
    y.backward(_Wrapper(torch.ones_like(inner)))
    assert torch.equal(x.grad.inner, 2.0 * (y.inner != 0))


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_records_the_draw():
    model, x = Model(), inputs().detach()
    traced = torch.jit.trace(model, (x,), check_trace=False)
    assert "everett_cuda::mix" in str(traced.inlined_graph)
    check_fresh(traced, model, x)


@pytest.mark.filterwarnings("ignore")
def test_jit_script_is_refused_by_name():
    with pytest.raises(ev.EverettError, match=r"nn\.Dropout.*torch\.jit\.trace"):
        torch.jit.script(Model())
    with pytest.raises(ev.EverettError, match=r"nn\.DropPath"):
        torch.jit.script(ev.nn.DropPath(0.1))


def test_copies_and_pickles_of_models():
    model, x = Model(), inputs().detach()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(compiled)):
        check_fresh(twin, model, x)
    state = pickle.loads(pickle.dumps(compiled.state_dict()))
    assert [name.removeprefix("_orig_mod.") for name in state] == list(model.state_dict())
