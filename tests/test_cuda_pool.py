"""Direct words on a GPU, on an emulated runtime whose streams run late and in any order that real ones allow."""

import math

import numpy as np
import pytest
import torch
from emulated_gpu import OTHER, STREAM, Emulation, same_bits
from processes import in_forked_child

import everett_cuda as ev
from everett_cuda import _C, kernels, keys
from everett_cuda.errors import EverettError, ForkedError, HealthAlarm, SourceError, SourceExhausted, Starved
from everett_cuda.kernels import INT32, KINDS, NOISE_TYPES, Fill
from everett_cuda.pool import LANE_WORDS, SLAB_WORDS, SLABS, DirectPool

PLENTY = 120_000  # words: the ring is then more than half full, so slabs are copied ahead
OUT_OF_MEMORY = 2


class Gpu(Emulation):
    def __init__(self, module, index=0):
        super().__init__(module)
        self.pool = DirectPool(index, module, lambda _: self.stream, torch.device("cpu"))

    def draw(self, kind="words", n=10, dtype=None, p=None):
        dtype = dtype or (torch.int32 if kind == "words" else torch.float32)
        out = torch.full((n,), 77).to(dtype)
        self.pool.convert(KINDS[kind][0], INT32 if dtype == torch.int32 else NOISE_TYPES[dtype], p, out)
        return out


@pytest.fixture
def gpu(emulated, ring):
    gpu = Gpu(emulated)
    yield gpu
    emulated.control.emulation_defer(0)
    gpu.pool.forget()


@pytest.fixture
def ring(monkeypatch):
    """The ring behind an open source; tests put the words in, end it and destroy what is unread, as the pipeline does."""
    source = ev.open("sim:seed=7")
    ring = _C.Ring(1 << 20)
    monkeypatch.setattr(source, "ring", ring)
    ev.configure(timeout_s=0.2)
    yield ring
    ev.configure(timeout_s=60.0)
    monkeypatch.undo()
    ev.close()


def counted(n, first=1):
    """n different 64-bit words, none of whose halves is zero."""
    low = np.arange(first, first + n, dtype=np.uint64)
    return low << np.uint64(32) | (low + np.uint64(1 << 31))


def as_words(out):
    """The 64-bit words that a tensor of int32 words was made of."""
    return out.numpy().view(np.uint64)


def put(ring, words):
    assert ring.put(words.view(np.uint8))


def random_words(n):
    return np.random.default_rng(5).integers(0, 2**64, n, dtype=np.uint64)


# --- the same values as the CPU's from the same words -----------------------------------------------------------------

SIZES = (1, 2, 3, 255, 1000, 2 * SLAB_WORDS + 1, 4 * SLAB_WORDS * SLABS + 6)


@pytest.mark.parametrize("kind", ["words", "uniform", "normal", "exponential", "gumbel", "bernoulli"])
def test_values_are_the_cpus(gpu, ring, kind):
    for dtype in (torch.int32,) if kind == "words" else NOISE_TYPES:
        for n in SIZES[:4] if dtype != torch.float32 else SIZES:
            words = random_words(n + 2)
            p = torch.rand(n, dtype=torch.float64) if kind == "bernoulli" else None
            if p is not None:
                p[: n // 3] = torch.tensor([0.0, 1.0, 0.5]).repeat(n // 3 + 1)[: n // 3]
            put(ring, words)
            got = gpu.draw(kind, n, dtype, p)
            ring.destroy_unread()
            put(ring, words)
            expected = kernels.CPU.direct(Fill(kind, (n,), dtype, 0), p)
            ring.destroy_unread()
            assert same_bits(got, expected), (dtype, n)


def test_each_word_is_given_once_and_in_order(gpu, ring):
    words = counted(5 * SLAB_WORDS)
    put(ring, words)
    taken = [as_words(gpu.draw(n=2 * n)) for n in (1, 7, SLAB_WORDS - 8, 1, 2 * SLAB_WORDS, 100, 1500)]
    assert np.array_equal(np.concatenate(taken), words[: sum(map(len, taken))])


def test_words_of_a_slab_that_make_no_granule_are_destroyed_and_counted(gpu, ring):
    words = counted(PLENTY)
    put(ring, words)
    gpu.draw("exponential", 1)  # a slab of its own; behind it whole slabs are copied ahead
    gpu.draw("exponential", 1)
    assert gpu.pool._pool.skipped == 0
    n = SLAB_WORDS + 2
    got = gpu.draw("normal", n, torch.float64)  # two words a granule: the last word of the first slab is left over
    used = np.concatenate([words[2:SLAB_WORDS], words[SLAB_WORDS + 1 : SLAB_WORDS + 1 + n - (SLAB_WORDS - 2)]])
    expected = np.empty(n)
    _C.law_convert("normal", "float64", used.view(np.uint32), expected)
    assert got.numpy().tobytes() == expected.tobytes() and gpu.pool._pool.skipped == 1


# --- order --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_the_streams_gives_the_right_words(gpu, ring, seed):
    """Ops on two streams, slabs used up, zeroed and filled again, while the streams advance by chance."""
    random = np.random.default_rng(seed)
    words = counted(PLENTY)
    put(ring, words)
    results = []
    with gpu.deferred():
        for _ in range(60):
            gpu.stream = (STREAM, OTHER)[random.integers(2)]
            results.append(gpu.draw(n=2 * int(random.integers(1, 700))))
            gpu.control.emulation_run(int(random.integers(1 << 30)), int(random.integers(6)))
    got = np.concatenate([as_words(r) for r in results])
    assert np.array_equal(got, words[: len(got)])
    assert got.size > 2 * SLABS * SLAB_WORDS


def test_the_copy_and_the_zeroing_wait_for_their_turn(gpu, ring):
    """The op's stream alone, run to its end, brings the copy with it; the slab is zeroed behind the op, not before."""
    words = counted(3 * SLAB_WORDS)
    put(ring, words)
    with gpu.deferred():
        out = gpu.draw(n=2 * SLAB_WORDS)  # all of the slab, so it is due to be zeroed
        assert gpu.control.emulation_pending() > 0 and int(out[0]) == 77
        gpu.control.emulation_finish(STREAM)
        assert np.array_equal(as_words(out), words[:SLAB_WORDS])


def test_staging_is_wiped_after_the_copy_and_not_before(gpu, ring):
    pool = gpu.module.Pool(0, 64, 2)
    with gpu.deferred():
        memory = pool.open()
        memory[:] = counted(64).tobytes()
        pool.submit(64)
        pool.reap()
        assert bytes(memory) == counted(64).tobytes()
        gpu.control.emulation_run(0, 100)
        pool.reap()
        assert bytes(memory) == bytes(512)
        out = torch.zeros(128, dtype=torch.int32)
        assert pool.direct(0, 0, INT32, 0, out.data_ptr(), 128, 0, STREAM) == 64
    assert np.array_equal(as_words(out), counted(64))
    assert pool.all_zero()


def test_a_slab_is_filled_again_while_its_last_copy_still_runs(gpu, ring):
    """`open` waits for the copy before: the new words must not be what the old copy brings."""
    pool = gpu.module.Pool(0, 64, 1)
    results = [torch.zeros(128, dtype=torch.int32) for _ in range(5)]
    with gpu.deferred():
        for i, out in enumerate(results):
            memory = pool.open()
            memory[:] = counted(64, 1 + 64 * i).tobytes()
            pool.submit(64)
            assert pool.direct(0, 0, INT32, 0, out.data_ptr(), 128, 0, STREAM) == 64
    for i, out in enumerate(results):
        assert np.array_equal(as_words(out), counted(64, 1 + 64 * i))


def test_the_status_tells_what_is_ahead(gpu, ring):
    assert gpu.pool.status() == ""
    put(ring, counted(PLENTY))
    gpu.draw(n=2)
    assert gpu.pool.status().endswith(f"cuda:0 has {SLABS * SLAB_WORDS:,} ahead, 0 destroyed as odd ends")


def test_used_slabs_and_closed_pools_are_zero(gpu, ring):
    put(ring, counted(PLENTY))
    gpu.draw(n=2 * SLAB_WORDS)
    assert not gpu.pool._pool.all_zero()  # words ahead
    gpu.pool.forget()
    assert gpu.pool._pool.all_zero()


def test_two_gpus_have_pools_of_their_own_with_different_words(emulated, gpu, ring):
    second = Gpu(emulated, index=1)
    put(ring, counted(PLENTY))
    seen = []
    for _ in range(6):
        for one in (gpu, second):
            seen.append(as_words(one.draw(n=2 * SLAB_WORDS - 10)))
    assert emulated.control.emulation_last_launch_device() == 1 and emulated.control.emulation_current_device() == 0
    graphs = [(one, *one.captured(lambda one=one: one.draw(n=20))) for one in (gpu, second)]
    put(ring, counted(2 * LANE_WORDS, 1 << 20))
    for one, out, graph in graphs:
        one.pool.end_step(False)
        one.replay(graph)
        seen.append(as_words(out))
    seen = np.concatenate(seen)
    assert len(np.unique(seen)) == len(seen)
    second.pool.forget()


# --- faults -------------------------------------------------------------------------------------------------------------


def test_a_starved_source_raises_and_gives_nothing(gpu, ring):
    put(ring, counted(10))
    with pytest.raises(Starved):
        gpu.draw(n=40)
    put(ring, counted(20, 100))
    assert as_words(gpu.draw(n=4)).tolist() == counted(2).tolist()  # what was there before came first


def test_an_exhausted_source_gives_its_last_words_and_then_raises(gpu, ring):
    put(ring, counted(4))
    ring.end(_C.Take.ended)
    assert as_words(gpu.draw(n=8)).tolist() == counted(4).tolist()
    with pytest.raises(SourceExhausted):
        gpu.draw(n=2)


def test_an_alarm_between_copy_and_use_destroys_the_words_ahead(gpu, ring):
    put(ring, counted(PLENTY))
    first = as_words(gpu.draw(n=2))
    assert gpu.pool._pool.ready >= SLAB_WORDS
    ring.destroy_unread()  # a transient alarm: the flow goes on with other bits
    put(ring, counted(4, 1 << 20))
    assert as_words(gpu.draw(n=8)).tolist() == counted(4, 1 << 20).tolist()
    assert first.tolist() == counted(1).tolist()


def test_a_permanent_alarm_stops_words_that_are_on_the_gpu_already(gpu, ring):
    put(ring, counted(PLENTY))
    gpu.draw(n=2)
    ring.destroy_unread()
    ring.end(_C.Take.alarm)
    for _ in range(2):
        with pytest.raises(HealthAlarm):
            gpu.draw(n=2)
    assert gpu.pool._pool.ready == 0 and gpu.pool._pool.all_zero()


def test_an_alarm_while_a_draw_waits_makes_what_it_took_void(gpu, ring):
    """The words come from before the alarm although the draw ends after it."""
    source = ev.current_source()
    put(ring, counted(4))
    gpu.draw(n=2)
    ring.discard(ring.unread, 0)
    put(ring, counted(4, 50))
    gpu.pool._fill(source, 4)
    ring.destroy_unread()
    put(ring, counted(4, 90))
    assert as_words(gpu.draw(n=8)).tolist() == counted(4, 90).tolist()


def test_another_source_makes_words_void(gpu, ring):
    put(ring, counted(PLENTY))
    gpu.draw(n=2)
    with ev.Source.open("sim:seed=8") as fresh:
        gpu.pool._drop_void_words(fresh, STREAM, 0)
        assert gpu.pool._pool.ready == 0 and gpu.pool._pool.all_zero()


def test_without_a_source_it_says_what_to_do(emulated, monkeypatch):
    monkeypatch.delenv("EVERETT_SOURCE", raising=False)
    ev.close()
    with pytest.raises(ev.SourceNotOpen, match="ev.open"):
        Gpu(emulated).draw()


@pytest.mark.parametrize("call,says", [("cudaHostRegister", r"pinning \d+ bytes of host memory.*out of memory.*pin_memory"),
                                       ("cudaMalloc", "memory for bits on cuda:0: out of memory")])  # fmt: skip
def test_out_of_memory_names_which(gpu, ring, call, says):
    put(ring, counted(100))
    pinned = gpu.control.emulation_pinned()
    gpu.control.emulation_fail_next(call.encode(), OUT_OF_MEMORY)
    with pytest.raises(RuntimeError, match=says):
        gpu.draw()
    assert gpu.control.emulation_pinned() == pinned and ring.unread == 800
    assert as_words(gpu.draw(n=4)).tolist() == counted(2).tolist()


@pytest.mark.parametrize("call,says", [("cudaMemcpyAsync", "copying bits to the GPU"), ("cudaEventRecord", "recording")])
def test_words_whose_copy_fails_are_destroyed(gpu, ring, call, says):
    put(ring, counted(4))
    gpu.draw(n=8)
    put(ring, counted(8, 10))
    gpu.control.emulation_fail_next(call.encode(), OUT_OF_MEMORY)
    with pytest.raises(RuntimeError, match=says):
        gpu.draw(n=8)
    assert gpu.pool._pool.all_zero()
    assert as_words(gpu.draw(n=8)).tolist() == counted(4, 14).tolist()


def test_words_whose_op_fails_are_not_given_again(gpu, ring):
    put(ring, counted(100))
    gpu.draw(n=2)
    gpu.control.emulation_fail_next_launch(719)
    put(ring, counted(100, 200))
    with pytest.raises(RuntimeError, match="kernel direct_kernel: unspecified launch failure"):
        gpu.draw(n=8)
    assert as_words(gpu.draw(n=2)).tolist() == counted(1, 6).tolist()


def test_a_forked_child_gets_nothing_and_breaks_nothing(gpu, ring):
    put(ring, counted(PLENTY))
    gpu.draw(n=2)

    def child():
        gpu.pool.forget()
        gpu.pool.end_step(True)
        try:
            gpu.draw(n=2)
        except ForkedError:
            return "refused"

    assert in_forked_child(child) == "refused"
    assert as_words(gpu.draw(n=2)).tolist() == counted(1, 2).tolist()


# --- captured graphs ----------------------------------------------------------------------------------------------------


def test_each_replay_takes_the_next_words(gpu, ring):
    put(ring, counted(PLENTY))
    gpu.draw(n=2)
    used = gpu.pool._pool.ready
    out, graph = gpu.captured(lambda: [gpu.draw(n=20), gpu.draw("words", 6)])
    assert int(out[0][0]) == 77  # nothing ran yet
    gpu.pool.end_step(False)
    first = 2 + used  # the pool's words come before the lane's
    for i in range(5):
        gpu.replay(graph)
        got = np.concatenate([as_words(o) for o in out])
        assert got.tolist() == counted(13, first + 13 * i).tolist()


@pytest.mark.parametrize("kind", ["uniform", "normal", "bernoulli"])
def test_a_captured_ops_values_are_the_cpus(gpu, ring, kind):
    n, words = 1001, random_words(SLABS * SLAB_WORDS + LANE_WORDS + 1)
    p = torch.rand(n, dtype=torch.float64) if kind == "bernoulli" else None
    put(ring, words[:1])
    gpu.draw(n=2)
    out, graph = gpu.captured(lambda: gpu.draw(kind, n, None, p))
    put(ring, words[: LANE_WORDS])
    gpu.pool.end_step(False)
    gpu.replay(graph)
    put(ring, words[: LANE_WORDS])
    assert same_bits(out, kernels.CPU.direct(Fill(kind, (n,), torch.float32, 0), p))


def test_topping_up_wraps_and_never_repeats(gpu, ring):
    put(ring, counted(4))
    gpu.draw(n=8)
    n = LANE_WORDS * 3 // 8
    out, graph = gpu.captured(lambda: gpu.draw(n=2 * n))
    seen, at = [], 10
    for _ in range(9):
        put(ring, counted(LANE_WORDS, at))
        gpu.pool.end_step(True)
        at += LANE_WORDS
        for _ in range(2):
            gpu.replay(graph)
            seen.append(as_words(out).copy())
    seen = np.concatenate(seen)
    assert len(np.unique(seen)) == len(seen) == 18 * n
    assert gpu.pool._lane.read(STREAM)[3] == 0
    lane_bytes = ring.bytes_out - 32
    assert lane_bytes == 8 * (LANE_WORDS + 8 * 2 * n)  # refilled by what was used, no more


@pytest.mark.parametrize("kind,dtype", [("words", torch.int32), ("uniform", torch.float32), ("normal", torch.float64),
                                        ("gumbel", torch.bfloat16), ("bernoulli", torch.float16)])  # fmt: skip
def test_a_replay_without_words_is_poisoned_and_the_next_step_raises(gpu, ring, kind, dtype):
    put(ring, counted(1))
    gpu.draw(n=2)
    n = 1500
    p = torch.ones(n, dtype=torch.float64)
    out, graph = gpu.captured(lambda: gpu.draw(kind, n, dtype, p))
    gpu.replay(graph)  # no ev.step() came before
    assert (out == -1).all() if kind == "words" else out.isnan().all()
    put(ring, counted(LANE_WORDS))
    with pytest.raises(EverettError, match=r"1 captured ops on cuda:0 found no direct words.*ev\.step\(\)"):
        gpu.pool.end_step(False)
    for _ in range(20):
        gpu.replay(graph)  # until the lane is empty again
    assert (out == -1).all() if kind == "words" else out.isnan().all()
    failed = gpu.pool._lane.read(STREAM)[3]
    assert 0 < failed < 20
    put(ring, counted(LANE_WORDS))
    with pytest.raises(EverettError, match=f"{failed} captured ops"):
        gpu.pool.end_step(False)
    gpu.replay(graph)
    assert not ((out == -1).any() if kind == "words" else out.isnan().any())
    put(ring, counted(LANE_WORDS))
    gpu.pool.end_step(False)  # told once, and then forgiven


@pytest.mark.parametrize("seed", range(6))
def test_replays_on_two_streams_share_no_word_and_read_no_zero(gpu, ring, seed):
    """Whatever the order: each op has words of its own, and none is zeroed or overwritten before it was read."""
    random = np.random.default_rng(seed)
    put(ring, counted(1))
    gpu.draw(n=2)
    n = 300
    graphs = [gpu.captured(lambda: gpu.draw(n=2 * n)) for _ in range(2)]
    put(ring, counted(LANE_WORDS, 10))
    gpu.pool.end_step(False)
    at, seen = 10 + LANE_WORDS, []
    with gpu.deferred():
        for _ in range(12):
            for stream, (_, graph) in zip((STREAM, OTHER), graphs, strict=True):
                gpu.control.emulation_replay(graph, stream)
            gpu.control.emulation_run(int(random.integers(1 << 30)), int(random.integers(8)))
            put(ring, counted(LANE_WORDS, at))
            gpu.pool.end_step(False)  # on STREAM only; the other may be anywhere
            at += LANE_WORDS
            gpu.control.emulation_finish(OTHER)
            seen += [as_words(out).copy() for out, _ in graphs]
            ring.discard(ring.unread, 0)
    seen = np.concatenate(seen)
    assert (seen != 0).all()
    given = seen[seen != np.uint64(2**64 - 1)]
    assert len(np.unique(given)) == len(given) and given.size >= n * 12


def test_an_alarm_makes_the_lanes_words_void_at_the_next_step(gpu, ring):
    put(ring, counted(1))
    gpu.draw(n=2)
    out, graph = gpu.captured(lambda: gpu.draw(n=20))
    put(ring, counted(LANE_WORDS, 10))
    gpu.pool.end_step(False)
    gpu.replay(graph)
    ring.destroy_unread()
    put(ring, counted(LANE_WORDS, 1 << 20))
    gpu.pool.end_step(False)
    gpu.replay(graph)
    assert as_words(out).tolist() == counted(10, 1 << 20).tolist()
    ring.destroy_unread()
    ring.end(_C.Take.alarm)
    with pytest.raises(HealthAlarm):
        gpu.pool.end_step(False)
    gpu.replay(graph)
    assert (out == -1).all()


def test_a_closed_source_leaves_replays_nothing(gpu, ring):
    put(ring, counted(1))
    gpu.draw(n=2)
    out, graph = gpu.captured(lambda: gpu.draw("uniform", 20))
    put(ring, counted(LANE_WORDS, 10))
    gpu.pool.end_step(False)
    gpu.pool.forget()
    gpu.replay(graph)
    assert out.isnan().all()


def test_capturing_before_the_first_use_or_too_much_says_what_to_do(gpu, ring):
    with pytest.raises(EverettError, match="captured on cuda:0 with freshness=\"direct\" before.*Run the op once"):
        gpu.captured(lambda: gpu.draw())
    put(ring, counted(1))
    gpu.draw(n=2)
    with pytest.raises(ValueError, match=f"needs {LANE_WORDS + 1} direct words, and the lane holds {LANE_WORDS}"):
        gpu.captured(lambda: gpu.draw(n=2 * LANE_WORDS + 2))


def test_a_step_that_cannot_top_up_raises_the_sources_error(gpu, ring):
    put(ring, counted(1))
    gpu.draw(n=2)
    gpu.captured(lambda: gpu.draw())
    with pytest.raises(Starved):
        gpu.pool.end_step(False)
    ring.end(_C.Take.closed)
    with pytest.raises(SourceError):
        gpu.pool.end_step(True)


def test_steps_take_nothing_where_no_graph_draws(gpu, ring):
    gpu.pool.end_step(False)
    put(ring, counted(3))
    gpu.draw(n=4)
    before = ring.bytes_out
    gpu.pool.end_step(False)
    assert ring.bytes_out == before and math.isclose(keys.settings()["timeout_s"], 0.2)
