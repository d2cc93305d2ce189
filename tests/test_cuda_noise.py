"""Integers, categories, distributions, generators and attention on an emulated GPU: the CPU's bits."""

import pytest
import torch
from emulated_gpu import key, same_bits

import everett_cuda as ev
from everett_cuda import _C, kernels, keys
from everett_cuda.errors import EverettError

WEIGHTS = torch.rand(7, 60, generator=torch.Generator().manual_seed(1))
CALLS = {
    "randint": lambda **k: ev.randint(-5, 10**12, (7, 133), **k),
    "randperm": lambda **k: ev.randperm(5000, **k),
    "multinomial": lambda **k: ev.multinomial(WEIGHTS, 30, True, **k),
    "multinomial without": lambda **k: ev.multinomial(WEIGHTS, 30, **k),
    "normal": lambda **k: ev.normal(1.0, 2.0, 999, **k),
    "uniform": lambda **k: ev.uniform(1.0, 2.0, 999, dtype=torch.bfloat16, **k),
    "log_normal": lambda **k: ev.log_normal(1.0, 2.0, 999, **k),
    "cauchy": lambda **k: ev.cauchy(1.0, 2.0, 999, **k),
    "geometric": lambda **k: ev.geometric(0.01, 999, **k),
    "gamma": lambda **k: ev.gamma(0.7, 2.0, 999, **k),
    "beta": lambda **k: ev.beta(0.7, 2.0, 999, **k),
    "dirichlet": lambda **k: ev.dirichlet(WEIGHTS + 0.01, **k),
    "attention": lambda **k: ev.scaled_dot_product_attention(*WEIGHTS[:6].view(3, 2, 12, 5), dropout_p=0.3, **k),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("stream", ["chacha8", "philox"])
def test_noise_is_the_cpus(gpu, monkeypatch, name, stream):
    y = CALLS[name](stream=stream)
    record = _C.derive_record(key(0), gpu.nonce())
    with monkeypatch.context() as patch:
        patch.setattr(kernels.CPU, "draw", lambda world=False: record, raising=False)
        patch.setitem(kernels._by_index, -1, kernels.CPU)
        assert same_bits(y, CALLS[name](stream=stream))
    assert gpu.generator.offset == 4


def test_generators(gpu):
    g = ev.Generator()
    state = g.get_state()
    a = ev.rand(40, generator=g)
    g.set_state(state)
    assert torch.equal(ev.rand(40, generator=g), a) and keys.counters()["reused"] == 1
    assert gpu.generator.offset == 0, "torch's generator stays where it is"


def test_a_generator_of_another_device_is_refused(gpu, monkeypatch):
    g = ev.Generator()
    monkeypatch.setitem(kernels._by_index, -1, kernels.CPU)
    with pytest.raises(EverettError, match="on another device"):
        ev.rand(4, generator=g)


def test_a_captured_graph_takes_no_generator(gpu):
    gpu.warm()
    g = ev.Generator()
    with pytest.raises(EverettError, match="repeat one draw at every replay"):
        gpu.captured(lambda: ev.rand(4, generator=g))
