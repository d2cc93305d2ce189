"""The emulation that the CUDA tests stand on: it runs barriers and shuffles, and notices where they are missing."""

import ctypes

import emulation
import numpy as np
import pytest

THREADS = 64
REVERSE, WITHOUT_FIRST, WITHOUT_LAST, REVERSE_BLOCK, WITHOUT_BLOCK_BARRIER, DIFFERENT_BARRIERS, SHUFFLES = range(7)


@pytest.fixture(scope="module")
def run():
    """run(kernel, turns) -> (return code, input, output), arrays of (turns, 64)."""
    if emulation.compiler() is None:
        pytest.skip("no C++ compiler (g++, or CXX)")
    library = ctypes.CDLL(str(emulation.build("self_check.so", [emulation.HERE / "self_check.cu"])))

    def run(kernel, turns=4):
        values = np.random.default_rng(1).integers(0, 1000, (turns, THREADS)).astype(np.int32)
        out = np.full((max(turns, 3), THREADS), -1, np.int32)
        at = ctypes.c_void_p
        code = library.self_check(kernel, at(values.ctypes.data), at(out.ctypes.data), turns)
        return code, values, out

    return run


def _reversed_in_warps(values):
    return values.reshape(-1, 2, 32)[:, :, ::-1].reshape(values.shape)


def test_lanes_exchange_through_shared_memory(run):
    code, values, out = run(REVERSE)
    assert code == 0 and np.array_equal(out, _reversed_in_warps(values))


def test_a_missing_warp_barrier_shows(run):
    for kernel in (WITHOUT_FIRST, WITHOUT_LAST):
        code, values, out = run(kernel)
        assert code == 0 and not np.array_equal(out, _reversed_in_warps(values))


def test_block_barrier(run):
    code, values, out = run(REVERSE_BLOCK, 1)
    assert code == 0 and np.array_equal(out[0], values[0, ::-1])
    code, values, out = run(WITHOUT_BLOCK_BARRIER, 1)
    assert code == 0 and not np.array_equal(out[0], values[0, ::-1])


def test_waiting_at_different_barriers_is_an_error_and_no_end(run):
    assert run(DIFFERENT_BARRIERS)[0] == 1
    code, values, out = run(REVERSE)  # and leaves nothing behind
    assert code == 0 and np.array_equal(out, _reversed_in_warps(values))


def test_shuffles(run):
    code, values, out = run(SHUFFLES, 1)
    warps = values.reshape(2, 32)
    assert code == 0
    assert np.array_equal(out[0].reshape(2, 32), np.repeat(warps[:, 5:6], 32, 1))
    assert np.array_equal(out[1].reshape(2, 32), np.roll(warps, 16, 1))
    ballots = ((warps & 1) << np.arange(32)).sum(1).astype(np.uint32)
    assert np.array_equal(out[2].view(np.uint32).reshape(2, 32), np.repeat(ballots[:, None], 32, 1))
