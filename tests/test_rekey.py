"""`rekey_torch()` and `seed_everything()`: torch's own generators from quantum bits, at boundaries and never elsewhere."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import everett_cuda as ev
from everett_cuda import keys, rekey
from everett_cuda.reference.stream import INTEGER, draws


@pytest.fixture(autouse=True)
def source():
    with ev.open("sim:seed=7") as opened:
        torch.manual_seed(1)
        yield opened
    ev.rekey_torch(False)
    ev.close()


def test_the_state_is_the_chacha20_stream_of_a_record_of_the_world_family():
    state = torch.get_rng_state()
    record = np.frombuffer(keys.draw_record(world=True), np.uint32)
    torch.set_rng_state(state)
    rekey.rekey_cpu()
    words = draws(record, 32, np.arange(rekey.CPU_WORDS), INTEGER, generator="chacha20").astype(np.uint32)
    # an independent mt19937 in that state gives torch's next numbers
    mt = np.random.RandomState()
    mt.set_state(("MT19937", words[:624], 624))
    expected = mt.randint(0, 2**32, 10, dtype=np.uint32)[1::2] % 2**31
    got = torch.empty(5, dtype=torch.int64).random_(2**31)  # of 64 bits, whose low half is the second word
    assert got.tolist() == expected.tolist()
    assert torch.initial_seed() == int(words[624]) | int(words[625]) << 32


def test_a_state_has_as_many_bits_as_it_says():
    rekey.rekey_cpu()
    a = torch.get_rng_state().numpy()
    rekey.rekey_cpu()
    words = torch.get_rng_state().numpy()[24 : 24 + 8 * 624].view("<u8")
    assert not (words == a[24 : 24 + 8 * 624].view("<u8")).any() and words.max() < 2**32
    assert abs(np.unpackbits(words.astype("<u4").view(np.uint8)).mean() - 0.5) < 5 * 0.5 / 19968**0.5


def test_boundaries_rekey_and_nothing_else_does():
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def number():
        torch.manual_seed(5)
        return torch.rand(4)

    seeded = number()
    with ev.rekey_torch():
        assert torch.equal(number(), seeded), "manual_seed holds until the next boundary"
        torch.manual_seed(5)
        weight.grad = torch.ones(3)
        optimizer.step()
        a = torch.rand(4)
        torch.manual_seed(5)
        ev.step()
        b = torch.rand(4)
        assert not torch.equal(a, seeded) and not torch.equal(b, seeded) and not torch.equal(a, b)
    torch.manual_seed(5)
    ev.step()
    assert torch.equal(torch.rand(4), seeded), "off again"


def test_it_rekeys_at_once_counts_and_is_shown():
    before = torch.get_rng_state()
    ev.rekey_torch()
    assert not torch.equal(torch.get_rng_state(), before)
    ev.step()
    assert "rekeyed at each step boundary, 2 times" in str(ev.status())
    ev.rekey_torch(False)
    assert "rekeyed" not in str(ev.status())


def test_contexts_nest():
    with ev.rekey_torch():
        with ev.rekey_torch():
            pass
        assert rekey.is_rekeyed(torch.device("cpu"))
    assert not rekey.is_rekeyed(torch.device("cpu"))


def test_equal_states_stay_equal_and_different_ones_different():
    # one world key is what ranks share; equal nonces under it are equal draws
    torch.manual_seed(3)
    state = torch.get_rng_state()
    rekey.rekey_cpu()
    first = torch.get_rng_state()
    torch.set_rng_state(state)
    rekey.rekey_cpu()
    assert torch.equal(torch.get_rng_state(), first)
    torch.manual_seed(4)
    rekey.rekey_cpu()
    assert not torch.equal(torch.get_rng_state(), first)


@pytest.mark.parametrize("drop", [F.dropout, ev.dropout])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_that_is_recomputed_after_a_boundary_has_its_own_mask(drop, reentrant):
    kept = []

    def block(x):
        y = drop(x, 0.5)
        kept.append(y.detach() != 0)
        return y * x

    x = torch.randn(200, requires_grad=True)
    with ev.rekey_torch():
        y = checkpoint(block, x, use_reentrant=reentrant)
        ev.step()
        after = torch.get_rng_state()
        y.sum().backward()
        assert torch.equal(torch.get_rng_state(), after), "the recomputation must leave the new state as it was"
    forward = kept[0]
    assert all(torch.equal(mask, forward) for mask in kept) and len(kept) == 2
    assert torch.allclose(x.grad, torch.where(forward, 4 * x.detach(), 0.0))


def test_an_optimizer_inside_the_backward_rekeys_nothing():
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    states = []

    def step(_):
        before = torch.get_rng_state()
        optimizer.step()
        states.append(torch.equal(torch.get_rng_state(), before))

    weight.register_post_accumulate_grad_hook(step)
    with ev.rekey_torch():
        (weight * 2).sum().backward()
    assert states == [True]


def test_what_no_swap_reaches_is_drawn_from_the_new_states():
    torch.manual_seed(0)
    lstm = nn.LSTM(4, 4, 2, dropout=0.5)
    x = torch.randn(5, 2, 4)

    def run():
        torch.manual_seed(5)
        ev.step()
        return lstm(x)[0]

    assert torch.equal(run(), run())
    with ev.rekey_torch():
        assert not torch.equal(run(), run())


def test_inductors_clones_of_gpu_generators_are_switched_off_while_it_is_on():
    from torch._functorch import config

    if not hasattr(config, "graphsafe_rng_functionalization"):
        pytest.skip("this torch has no graph-safe RNG states")
    before = config.graphsafe_rng_functionalization
    with ev.rekey_torch():
        assert config.graphsafe_rng_functionalization is False
    assert config.graphsafe_rng_functionalization is before


class GpuGenerator:
    """What torch's generator of a GPU shows of itself; there is none on this machine."""

    def __init__(self, seed, offset):
        self.seed, self.offset = seed, offset

    def initial_seed(self):
        return self.seed

    def get_offset(self):
        return self.offset

    def set_offset(self, offset):
        self.offset = offset

    def manual_seed(self, seed):
        self.seed, self.offset = seed, 0


def test_a_gpu_takes_a_seed_and_offset_zero_by_its_own_nonce():
    one, same, other = GpuGenerator(5, 8), GpuGenerator(5, 8), GpuGenerator(5, 12)
    for generator in (one, same, other):
        rekey.rekey_gpu(0, generator)
    assert one.offset == 0 and one.seed != 5 and 0 <= one.seed < 2**64
    assert one.seed == same.seed != other.seed


def test_without_a_source_it_is_refused_and_closing_ends_it():
    ev.rekey_torch()
    ev.close()
    assert not rekey.is_rekeyed(torch.device("cpu"))
    with pytest.raises(ev.SourceNotOpen):
        ev.rekey_torch()
    assert not rekey.is_rekeyed(torch.device("cpu"))


def test_a_source_that_ends_is_an_error_at_the_boundary(ring):
    ring.put(bytes(range(32)))
    keys.configure(on_starved="error")
    with ev.rekey_torch():
        with pytest.raises(ev.Starved):
            ev.step()
            ev.step()


# --- seed_everything --------------------------------------------------------------------------------------------------


def numbers():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]


def test_seeds_torch_numpy_and_random_once():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert ev.seed_everything().seeded[:3] == ("torch", "numpy", "random")
    first = numbers()
    torch.set_rng_state(state)
    ev.seed_everything()
    assert numbers() == first, "one torch state in one step is one draw"
    torch.set_rng_state(state)
    ev.step()
    ev.seed_everything()
    assert all(a != b for a, b in zip(numbers(), first, strict=True))
    assert keys.counters()["draws"] == 3


def test_returns_nothing_of_the_seeds():
    seeded = ev.seed_everything()
    assert vars(seeded) == {"seeded": seeded.seeded, "jax_key": None} or "jax" in seeded.seeded
    assert "jax_key" not in repr(seeded)
