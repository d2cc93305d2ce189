"""Replays of direct words and keys on an emulated GPU: its stores are filled ahead of need, as time allowed when it was
recorded, and yet each op gets the words it had."""

import time

import pytest
import torch
from emulated_gpu import EmulatedGpu

import everett_cuda as ev
from everett_cuda import followers, journal_file, kernels, keys
from everett_cuda.errors import ReplayMismatch
from everett_cuda.pool import SLAB_WORDS


@pytest.fixture
def run(emulated, monkeypatch):
    """Runs program(gpu) on a GPU of its own, as a new process would."""
    before = list(followers._all)

    def on_a_new_gpu(program, *arguments):
        gpu = EmulatedGpu(emulated)
        monkeypatch.setitem(kernels._by_index, -1, gpu.kernels)
        monkeypatch.setattr(followers, "_all", [*before, gpu.kernels.graph_key, gpu.kernels.pool])
        ev.open("sim:seed=7")
        try:
            return program(gpu, *arguments)
        finally:
            gpu.kernels.pool.forget()

    yield on_a_new_gpu
    ev.close()


def direct(n, dtype=torch.float32):
    return ev.rand(n, dtype=dtype, freshness="direct")


def eager(gpu, path, alarm=False, sizes=(5, 1000, 3 * SLAB_WORDS, 7, 2)):
    with ev.journal(path):
        made = []
        for i, n in enumerate(sizes):
            made += [direct(n), ev.randn(n), ev.dropout(torch.ones(n), 0.5), direct(n, torch.float64)]
            if i == 2 and alarm:
                ev.current_source().ring.destroy_unread()  # what an alarm does
            if i == 0 and not isinstance(ev.current_source().witness, type(None)):
                while ev.current_source().ring.unread < 900_000:  # so that slabs are copied ahead from here on
                    time.sleep(0.01)
            if i % 2:
                ev.step()
        return made


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("alarm", [False, True])
def test_words_of_the_pool_are_replayed(run, tmp_path, alarm):
    path = tmp_path / "run.evj"
    first = run(eager, path, alarm)
    records = list(ev.read_journal(path))
    pool = [r for r in records if r.type == journal_file.WORDS]
    assert {(r.device, r.store) for r in pool} == {(0, 1)} and len({len(r.data) for r in pool}) > 1
    assert sum(r.type == journal_file.DROP for r in records) == (2 if alarm else 1)
    with ev.replay(path):
        assert same(run(eager, path), first)


def test_another_op_on_the_pool_is_named(run, tmp_path):
    path = tmp_path / "run.evj"
    run(eager, path, False, (5, 6))
    with (
        pytest.raises(ReplayMismatch, match=r"record \d+ of .*an op on cuda:0 uses 6 gran.*asked for 7 gran"),
        ev.replay(path),
    ):
        run(eager, path, False, (5, 7))


def captured(gpu, path):
    with ev.journal(path):
        direct(1)
        out, graph = gpu.captured(lambda: direct(5))
        made = []
        for _ in range(3):
            ev.step()
            gpu.replay(graph)
            made.append(out.clone())
        return made


def test_words_and_keys_of_captured_graphs_are_replayed(run, tmp_path):
    path = tmp_path / "run.evj"
    first = run(captured, path)
    assert len({tuple(t.tolist()) for t in first}) == 3
    stores = {r.store for r in ev.read_journal(path) if r.type == journal_file.WORDS}
    assert stores == {1, 2}
    with ev.replay(path):
        assert same(run(captured, path), first)
    assert keys.watched_by() == ""
