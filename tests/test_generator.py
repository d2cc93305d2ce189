"""ev.Generator: states, what equal states give, threads, checkpoints, other devices, and what it refuses."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import everett_cuda as ev
from everett_cuda import keys

TAKES_ONE = {
    "rand": lambda g: ev.rand(20, generator=g),
    "randn": lambda g: ev.randn(20, generator=g),
    "rand_like": lambda g: ev.rand_like(torch.zeros(20), generator=g),
    "randn_like": lambda g: ev.randn_like(torch.zeros(20), generator=g),
    "random_words": lambda g: ev.random_words(20, generator=g),
    "exponential": lambda g: ev.exponential(20, generator=g),
    "gumbel": lambda g: ev.gumbel(20, generator=g),
    "bernoulli": lambda g: ev.bernoulli(0.5, 60, generator=g),
    "randint": lambda g: ev.randint(10**9, (20,), generator=g),
    "randint_like": lambda g: ev.randint_like(torch.zeros(20, dtype=torch.int64), 10**9, generator=g),
    "randperm": lambda g: ev.randperm(40, generator=g),
    "multinomial": lambda g: ev.multinomial(torch.ones(50), 20, generator=g),
    "normal": lambda g: ev.normal(0.0, 1.0, 20, generator=g),
    "uniform": lambda g: ev.uniform(0.0, 1.0, 20, generator=g),
    "log_normal": lambda g: ev.log_normal(0.0, 1.0, 20, generator=g),
    "cauchy": lambda g: ev.cauchy(0.0, 1.0, 20, generator=g),
    "geometric": lambda g: ev.geometric(1e-6, 20, generator=g),
    "gamma": lambda g: ev.gamma(2.0, 1.0, 20, generator=g),
    "beta": lambda g: ev.beta(2.0, 1.0, 20, generator=g),
    "dirichlet": lambda g: ev.dirichlet(torch.ones(20), generator=g),
    "fill_": lambda g: ev.fill_(torch.zeros(20), "normal", generator=g),
}


@pytest.fixture(autouse=True)
def source():
    ev.set_freshness("op")
    opened = ev.open("sim:seed=16")
    torch.manual_seed(4321)
    yield opened
    ev.close()
    ev.set_freshness("op")


@pytest.mark.parametrize("name", TAKES_ONE)
def test_equal_states_give_equal_bits_within_a_step(name):
    draw, g = TAKES_ONE[name], ev.Generator()
    torchs = torch.get_rng_state()
    state = g.get_state()
    a, b = draw(g), draw(g)
    assert not torch.equal(a, b)
    g.set_state(state)
    reused = keys.counters()["reused"]
    assert torch.equal(draw(g), a) and torch.equal(draw(g), b) and keys.counters()["reused"] == reused + 2
    ev.step()
    g.set_state(state)
    assert not torch.equal(draw(g), a), "another step, another key"
    assert torch.equal(torch.get_rng_state(), torchs), "torch's generator stays where it is"
    with pytest.raises(TypeError, match="torch.Generator makes pseudo-random"):
        draw(torch.Generator())
    with pytest.raises(TypeError, match="ev.Generator or None"):
        draw(7)


def test_seeds():
    g = ev.Generator()
    assert g.initial_seed() == 0 and g.device == torch.device("cpu")
    assert g.manual_seed(5) is g and g.initial_seed() == 5
    a = ev.rand(9, generator=g)
    assert torch.equal(ev.rand(9, generator=g.manual_seed(5)), a)
    assert not torch.equal(ev.rand(9, generator=g.manual_seed(6)), a)
    # Negative seeds as torch's, and all 64 bits count.
    assert g.manual_seed(-1).initial_seed() == torch.Generator().manual_seed(-1).initial_seed() % 2**64
    assert not torch.equal(ev.rand(9, generator=g.manual_seed(5 + 2**32)), a)
    seed = g.seed()
    assert 0 <= seed < 2**64 and g.initial_seed() == seed and g.seed() != seed
    for wrong, error in ((2**64, ValueError), (-(2**63) - 1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="seed"):
            g.manual_seed(wrong)


@pytest.mark.parametrize("freshness", ["op", "step"])
def test_two_generators_never_share_bits(freshness):
    ev.set_freshness(freshness)
    first, second = ev.Generator().manual_seed(1), ev.Generator().manual_seed(1)
    draws = [ev.rand(50, generator=g) for g in (first, second, None, first, second)]
    assert len({tuple(d.tolist()) for d in draws}) == 5
    torch.manual_seed(1)
    # A draw of torch's generator with the same torch state is another draw.
    assert keys.counters()["reused"] == 0


def test_clones_copies_and_pickles_go_on_from_the_state():
    g = ev.Generator().manual_seed(3)
    ev.rand(5, generator=g)
    copies = [g.clone(), g.clone_state(), copy.deepcopy(g), pickle.loads(pickle.dumps(g))]
    other = ev.Generator()
    other.set_state(g.get_state())
    a, b = ev.rand(5, generator=g), ev.rand(5, generator=g)
    for c in [*copies, other]:
        assert torch.equal(ev.rand(5, generator=c), a) and torch.equal(ev.rand(5, generator=c), b)
        assert torch.equal(c.get_state(), g.get_state())
    # Seeded anew, it is its own generator again.
    assert not torch.equal(ev.rand(5, generator=other.manual_seed(3)), ev.rand(5, generator=g.manual_seed(3)))


def test_states_that_are_none():
    g = ev.Generator()
    with pytest.raises(ValueError, match="not one of an ev.Generator"):
        g.set_state(torch.Generator().get_state())
    with pytest.raises(ValueError, match="not one of an ev.Generator"):
        g.set_state(torch.zeros(32, dtype=torch.uint8))
    for wrong in (torch.zeros(32), b"", None):
        with pytest.raises(TypeError, match="uint8"):
            g.set_state(wrong)
    assert g.get_state().dtype == torch.uint8 and g.get_state().shape == (32,)


def test_threads_never_draw_the_same_number():
    g, drawn, lock = ev.Generator(), [], threading.Lock()

    def work():
        own = [ev.randint(2**62, (1,), generator=g).item() for _ in range(200)]
        with lock:
            drawn.extend(own)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(set(drawn)) == 800 and keys.counters()["reused"] == 0


def test_under_inference_mode_every_draw_is_fresh():
    g = ev.Generator()
    state = g.get_state()
    with torch.inference_mode():
        a = ev.rand(9, generator=g)
        g.set_state(state)
        assert not torch.equal(ev.rand(9, generator=g), a)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_raises_instead_of_drawing_other_bits(reentrant):
    """A checkpoint restores torch's generators, not this one: with torch.Generator the gradient is silently wrong."""
    g = ev.Generator()
    x = torch.ones(9, requires_grad=True)
    y = checkpoint(lambda v: (v * ev.rand(9, generator=g)).sin(), x, use_reentrant=reentrant)
    with pytest.raises(ev.ReplayMiss):
        y.sum().backward()


def test_refuses_functorch_and_compilation():
    g = ev.Generator()
    with pytest.raises(ev.EverettError, match="plain eager code only"):
        torch.vmap(lambda x: x + ev.rand(3, generator=g), randomness="same")(torch.zeros(2))
    with pytest.raises(ValueError, match="direct bits have no nonce"):
        ev.rand(3, generator=g, freshness="direct")


def test_torchs_functions_refuse_it():
    with pytest.raises(TypeError):
        torch.rand(3, generator=ev.Generator())
    with pytest.raises(TypeError):
        torch.zeros(3).normal_(generator=ev.Generator())


def test_needs_a_device_with_kernels():
    for device in ("meta", "xpu"):
        with pytest.raises(ev.EverettError, match="kernels run on a CPU or an NVIDIA GPU"):
            ev.Generator(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            with pytest.raises(ev.EverettError):
                ev.Generator("cuda")


def test_without_a_source_it_can_be_made_but_not_drawn_from():
    ev.close()
    g = ev.Generator()
    for call in (lambda: ev.rand(3, generator=g), g.seed):
        with pytest.raises(ev.SourceNotOpen):
            call()
