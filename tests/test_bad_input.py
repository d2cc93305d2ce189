"""Every mistake gets an error of its own type that names the thing, the rule and the next step; nothing is half-written."""

import os
import subprocess
import sys

import pytest
import torch

import everett_cuda as ev
from everett_cuda.errors import EverettError


@pytest.fixture
def source():
    opened = ev.open("sim:seed=7")
    yield opened
    ev.close()


@pytest.mark.parametrize("p", [float("nan"), -0.1, 1.0001, float("inf")])
def test_rejects_p_outside_the_unit_interval(source, p):
    x = torch.ones(3)
    for call in (ev.dropout, ev.alpha_dropout, lambda x, p: ev.dropout_add(x, x, p), ev.drop_path):
        with pytest.raises(ValueError, match="p: the probability of dropping must be from 0 to 1, got"):
            call(x, p)
    with pytest.raises(ValueError, match="p: probabilities must be from 0 to 1"):
        ev.bernoulli(torch.tensor([0.5, p]))
    assert torch.equal(x, torch.ones(3))


@pytest.mark.parametrize("p", ["0.1", None, [0.1]])
def test_rejects_p_that_is_no_number(source, p):
    with pytest.raises(TypeError):
        ev.dropout(torch.ones(3), p)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.complex64, torch.uint8])
def test_rejects_tensors_that_are_not_floating(source, dtype):
    with pytest.raises(TypeError, match=r"x: dropout needs float32.*got torch\.\w+.*Convert"):
        ev.dropout(torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("x", [[1.0, 2.0], 3.0, None])
def test_rejects_what_is_no_tensor(source, x):
    with pytest.raises((TypeError, AttributeError)):
        ev.dropout(x)


def test_rejects_sparse_tensors(source):
    with pytest.raises(TypeError, match="dense strided"):
        ev.dropout(torch.eye(3).to_sparse())


def test_rejects_a_residual_that_does_not_match(source):
    x = torch.ones(3, 4)
    for residual in (torch.ones(4), torch.ones(3, 4, dtype=torch.float64)):
        with pytest.raises(ValueError, match="residual: must match x"):
            ev.dropout_add(x, residual)


def test_rejects_wrong_dimensions_of_channel_dropout(source):
    with pytest.raises(ValueError, match=r"dropout2d takes \(N, C, ...\) with 4 dimensions"):
        ev.dropout2d(torch.ones(2, 3))


def test_rejects_unknown_streams_and_freshness(source):
    with pytest.raises(ValueError, match="stream: one of chacha8, chacha12, chacha20, philox; got 'rc4'"):
        ev.dropout(torch.ones(3), stream="rc4")
    with pytest.raises(ValueError, match="freshness"):
        ev.rand(3, freshness="raw")
    with pytest.raises(ValueError, match="direct"):
        ev.set_freshness("direct")


@pytest.mark.parametrize("size,kind", [((-1,), ValueError), ((2.5,), TypeError), (("3",), TypeError)])
def test_rejects_bad_sizes(source, size, kind):
    with pytest.raises(kind, match="size:"):
        ev.rand(*size)


def test_rejects_other_devices_and_dtypes(source):
    with pytest.raises(EverettError, match="xpu.*Draw there and move it"):
        ev.rand(3, device="xpu")
    with pytest.raises(TypeError, match="dtype:"):
        ev.randn(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="rate: must be positive"):
        ev.exponential(3, rate=0)


def test_an_op_before_any_source_is_open_says_what_to_do():
    ev.close()
    x = torch.ones(3)
    for call in (lambda: ev.dropout(x), lambda: ev.rand(3), lambda: ev.rand(3, freshness="direct")):
        with pytest.raises(ev.SourceNotOpen, match=r'ev\.open\("auto"\)'):
            call()
    assert torch.equal(x, torch.ones(3))


def test_the_environment_names_a_source_for_the_first_draw():
    code = "import everett_cuda as ev, torch; ev.dropout(torch.ones(3)); print(ev.status().source.label)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "EVERETT_SOURCE": "sim:seed=3"}
    )
    assert done.stdout.strip() == "NOT QUANTUM (simulated)", done.stderr


@pytest.mark.parametrize(
    "uri,kind,says",
    [
        ("replay:/no/such/file", ev.SourceError, "/no/such/file"),
        ("geiger:0", ev.UnknownScheme, "no driver for geiger:"),
        ("sim:seed=x", ev.BadParameter, "seed"),
        ("sim:speed=3", ev.BadParameter, "speed"),
        ("auto", ev.SourceError, "no quantum device was found"),
        ("sim:seed=7,fault=stuck@0", ev.StartupTestFailed, "start-up test"),
    ],
)
def test_a_source_that_cannot_be_opened_leaves_none_open(uri, kind, says):
    ev.open("sim:seed=7")
    with pytest.raises(kind, match=says):
        ev.open(uri)
    with pytest.raises(ev.SourceNotOpen):
        ev.dropout(torch.ones(3))


@pytest.mark.parametrize("size", [0, 100, 4095])
def test_a_recording_too_short_for_the_start_up_test(tmp_path, size):
    path = tmp_path / "short.bin"
    path.write_bytes(os.urandom(size))
    with pytest.raises(ev.SourceExhausted):
        ev.open(f"replay:{path}")


def test_an_exhausted_recording_says_how_much_was_used(tmp_path):
    path = tmp_path / "small.bin"
    path.write_bytes(os.urandom(8192))
    ev.open(f"replay:{path}")
    x, n = torch.ones(3), 0
    with pytest.raises(ev.SourceExhausted, match=r"exhausted: 8192 bytes used.*loop=1"):
        while True:
            ev.dropout(x)
            n += 1
    draws = ev.status().draws
    assert draws["fresh"] == (8192 - 512) // 80  # the last unit is never proven
    assert n == draws["fresh"] + draws["stretched"]  # stretched: drawn before the end of the file was seen
    ev.close()


def test_a_forked_child_must_open_its_own_source(source):
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            ev.dropout(torch.ones(3))
            answer = b"drew"
        except ev.ForkedError as error:
            answer = str(error).encode()
        except BaseException as error:
            answer = repr(error).encode()
        os.write(write, answer)
        os._exit(0)
    os.waitpid(child, 0)
    answer = os.read(read, 4096).decode()
    assert "open" in answer and "child" in answer and "drew" not in answer, answer
    assert ev.dropout(torch.ones(3)).shape == (3,)  # the parent goes on
