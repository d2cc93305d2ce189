"""`install()` and `uninstall()`: the whole process, with Tensor's methods and names that others took."""

import functools
import multiprocessing
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

import everett_cuda as ev
from everett_cuda import keys, untouched
from everett_cuda.stand_ins import INSTALLED, STAND_INS, own


@pytest.fixture(autouse=True)
def source():
    with ev.open("sim:seed=7") as opened:
        torch.manual_seed(1)
        untouched._counts.clear()
        yield opened
    ev.close()


@pytest.fixture
def installed():
    ev.install()
    yield
    ev.uninstall()


def again(first, second):
    state = torch.get_rng_state()
    a = first()
    torch.set_rng_state(state)
    return a, second()


def draws_of(call) -> int:
    before = keys.counters()["draws"]
    call()
    return keys.counters()["draws"] - before


METHODS = {
    "uniform_": (lambda x: x.uniform_(-1, 3), lambda: ev.rand(3, 4) * 4 - 1),
    "normal_": (lambda x: x.normal_(mean=1, std=2), lambda: ev.randn(3, 4) * 2 + 1),
    "log_normal_": (lambda x: x.log_normal_(0.5, 0.1), lambda: (ev.randn(3, 4) * 0.1 + 0.5).exp()),
    "exponential_": (lambda x: x.exponential_(2.0), lambda: ev.exponential(3, 4, rate=2.0)),
    "bernoulli_": (lambda x: x.bernoulli_(0.3), lambda: ev.bernoulli(0.3, 3, 4)),
    "bernoulli_ tensor": (
        lambda x: x.bernoulli_(torch.tensor([0.0, 0.3, 0.7, 1.0])),
        lambda: ev.bernoulli(torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64).expand(3, 4)).float(),
    ),
    "random_(to)": (lambda x: x.random_(9), lambda: ev.randint(0, 9, (3, 4)).float()),
    "random_(from, to)": (lambda x: x.random_(-4, 9), lambda: ev.randint(-4, 9, (3, 4)).float()),
    "random_()": (lambda x: x.random_(), lambda: ev.randint(0, 2**24 + 1, (3, 4)).float()),
    "multinomial": (lambda x: x.fill_(1).multinomial(2), lambda: ev.multinomial(torch.ones(3, 4), 2)),
    "bernoulli": (lambda x: x.fill_(0.5).bernoulli(), lambda: ev.bernoulli(torch.full((3, 4), 0.5))),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_draw_from_our_streams(name, installed):
    method, ours = METHODS[name]
    a, b = again(lambda: method(torch.empty(3, 4)), ours)
    assert torch.equal(a, b)


def test_strided_tensors_hold_the_same_numbers_and_keep_what_lies_between(installed):
    whole = torch.zeros(6, 8)
    a, b = again(lambda: whole[::2, ::2].normal_(), lambda: ev.randn(3, 4))
    assert torch.equal(a, b) and a.data_ptr() == whole.data_ptr() and (whole[1::2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool, torch.bfloat16])
def test_random_fills_the_range_of_the_dtype(dtype, installed):
    x = torch.empty(4000, dtype=dtype).random_().double()
    top = 1 if dtype == torch.bool else 256 if dtype == torch.bfloat16 else torch.iinfo(dtype).max
    assert x.min() >= 0 and x.max() <= top and abs(x.mean() / top - 0.5) < 5 * 0.3 / 4000**0.5 + 0.02


def test_random_of_all_64_bits(installed):
    x = torch.empty(64, dtype=torch.int64).random_(-(2**63), None)
    assert (x < 0).any() and (x > 2**62).any()


def test_geometric_and_cauchy_keep_their_laws(installed):
    x = torch.empty(20000, dtype=torch.int64).geometric_(0.25)
    assert x.min() == 1 and abs((x == 1).double().mean() - 0.25) < 5 * 0.44 / 20000**0.5
    assert abs((x > 2).double().mean() - 0.5625) < 5 * 0.5 / 20000**0.5
    y = torch.empty(20000).cauchy_(1.0, 2.0)
    assert abs((y < 1).double().mean() - 0.5) < 5 * 0.5 / 20000**0.5
    assert abs((y < 3).double().mean() - 0.75) < 5 * 0.44 / 20000**0.5


def test_methods_keep_torchs_rules_for_gradients(installed):
    leaf = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf"):
        leaf.normal_()
    (leaf * 2).normal_().sum().backward()
    assert torch.equal(leaf.grad, torch.zeros(3))


@pytest.mark.parametrize("call", [lambda x: x.normal_(0, -1), lambda x: x.uniform_(2, 1), lambda x: x.random_(3, 3)])
def test_wrong_parameters_are_runtime_errors_as_torchs(call, installed):
    with pytest.raises(RuntimeError, match="expects"):
        call(torch.empty(3))


def test_a_generator_of_torchs_leaves_a_method_to_torch(installed):
    a = torch.empty(5).normal_(generator=torch.Generator().manual_seed(3))
    ev.uninstall()
    b = torch.empty(5).normal_(generator=torch.Generator().manual_seed(3))
    ev.install()
    assert torch.equal(a, b) and untouched.untouched() == {("Tensor.normal_", "a torch.Generator was passed"): 1}


# --- other names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", [torch, torch._VF])
def test_functions_of_torch_itself_are_reached(owner, installed):
    x = torch.ones(2, 3, 4)
    a, b = again(lambda: owner.dropout(x, 0.5, True), lambda: ev.dropout(x, 0.5))
    assert torch.equal(a, b)
    a, b = again(lambda: owner.dropout_(x.clone(), p=0.5, train=True), lambda: ev.dropout(x, 0.5))
    assert torch.equal(a, b)
    a, b = again(lambda: owner.feature_dropout(x, 0.5, True), lambda: ev.dropout1d(x, 0.5))
    assert torch.equal(a, b)
    a, b = again(lambda: owner.alpha_dropout(x, 0.5, True), lambda: ev.alpha_dropout(x, 0.5))
    assert torch.equal(a, b)


def test_native_dropout_gives_its_mask(installed):
    x = torch.randn(50, requires_grad=True)
    y, kept = torch.native_dropout(x, 0.5, True)
    y.sum().backward()
    assert kept.dtype == torch.bool and torch.equal(y, torch.where(kept, x * 2, 0.0))
    assert torch.equal(x.grad, kept * 2.0) and 5 < kept.sum() < 45


def test_names_that_others_imported_are_found_by_identity_and_given_back():
    taken = types.ModuleType("taken_names")
    taken.drop, taken.rand, taken.attention = F.dropout, torch.rand, F.scaled_dot_product_attention
    taken.partial = functools.partial(F.dropout, p=0.5)
    sys.modules["taken_names"] = taken
    torchs = taken.drop, taken.rand, taken.attention
    try:
        ev.install()
        assert taken.drop is STAND_INS["torch.nn.functional.dropout"] and taken.rand is STAND_INS["torch.rand"]
        assert taken.partial.func is torchs[0], "what is inside another object is out of reach"
        assert draws_of(lambda: taken.drop(torch.ones(9))) == 1
        late = types.ModuleType("late_names")
        late.drop = F.dropout
        sys.modules["late_names"] = late
        ev.uninstall()
        assert (taken.drop, taken.rand, taken.attention) == torchs and late.drop is F.dropout
    finally:
        del sys.modules["taken_names"]
        sys.modules.pop("late_names", None)


def test_all_is_given_back_and_inherited_methods_are_inherited_again():
    before = {name: own(name) for name in (*STAND_INS, *INSTALLED)}
    ev.install()
    assert all(own(name) is not function for name, function in before.items())
    ev.uninstall()
    assert all(own(name) is function for name, function in before.items())
    assert not any(name.rpartition(".")[2] in vars(torch.Tensor) for name in INSTALLED if "Tensor" in name)


def test_an_intercept_outlives_an_installation():
    torchs = F.dropout
    with ev.intercept():
        ev.install()
        ev.uninstall()
        assert F.dropout is not torchs and torch.Tensor.normal_ is torch._C.TensorBase.normal_
    assert F.dropout is torchs


def test_installing_twice_and_uninstalling_nothing_are_errors(installed):
    with pytest.raises(ev.EverettError, match="in force already"):
        ev.install()
    ev.uninstall()
    with pytest.raises(ev.EverettError, match="nothing is installed"):
        ev.uninstall()
    ev.install()


def test_installing_without_a_source_is_an_error_and_swaps_nothing():
    ev.close()
    with pytest.raises(ev.SourceNotOpen):
        ev.install()
    assert torch.Tensor.normal_ is torch._C.TensorBase.normal_ and F.dropout is not STAND_INS["torch.nn.functional.dropout"]


# --- other threads and processes --------------------------------------------------------------------------------------


def test_a_nonce_is_torchs_own_in_every_thread(installed):
    # a thread's nonce buffer is filled by Tensor.random_, which is ours now: a draw would need itself
    import threading

    drawn = []
    thread = threading.Thread(target=lambda: drawn.append(ev.rand(3)))
    thread.start()
    thread.join(30)
    assert len(drawn) == 1


class Augmented(Dataset):
    """What a worker sees: a number of torch's, what happens to a call of ours by name, and what was counted."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        number = torch.rand(1).item() + torch.empty(1).normal_().item()
        try:
            ev.rand(1)
            ours = "drawn"
        except ev.ForkedError:
            ours = "ForkedError"
        return number, ours, untouched.untouched()[("torch.rand", "worker")]


def test_a_data_loaders_worker_stays_torchs_and_says_so(installed):
    loader = DataLoader(Augmented(), num_workers=1, batch_size=None, multiprocessing_context="fork")
    rows = [tuple(row) for row in loader]
    assert [row[1:] for row in rows] == [("ForkedError", 1), ("ForkedError", 2)] and rows[0][0] != rows[1][0]


def _draw_in_child(queue):
    try:
        torch.rand(1)
        queue.put("drawn")
    except ev.ForkedError as error:
        queue.put(str(error))


def test_any_other_child_is_refused(installed):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_draw_in_child, args=(queue,))
    child.start()
    said = queue.get()
    child.join(30)
    assert "source of its own" in said.replace("\n", " ")
