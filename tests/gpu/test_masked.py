"""Masked kernels on a real GPU, bit for bit against the CPU kernels: every kernel, odd lengths, starts and alignments,
strides, records in device memory, streams, graphs, and more than 2^31 elements."""

import itertools

import numpy as np
import pytest
import torch
from elements import STORAGE, same, values

from everett_cuda import _C
from everett_cuda.reference import layout, stream

_cuda = pytest.importorskip("everett_cuda._cuda", reason="built without nvcc")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

TYPES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3, "float8_e4m3fn": 5, "float8_e5m2": 6}
DROPOUT, DROPOUT_ADD, AFFINE = range(3)
ALPHA = (0.8791, 0.1518, -1.3936)
P_VALUES = [0.0, 1e-6, 1 / 256, 0.1, 31 / 32, 0.999, 1.0]
LENGTHS = [1, 33, 1023, 1024, 1025, 100_003, 3_000_017]
STARTS = [0, 5, 2**31 + 17, 2**37 - 512, 2**45 + 3]
POISON = 0xA5
RECORD = stream.derive(bytes(range(32)), bytes(range(16))).astype("<u4").tobytes()


def _stream():
    return torch.cuda.current_stream().cuda_stream


def _to_gpu(array, shift=0):
    """A byte tensor on the GPU that holds the array from byte `shift` on, between poison."""
    memory = torch.full((shift + array.nbytes + 64,), POISON, dtype=torch.uint8)
    memory[shift : shift + array.nbytes] = torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).reshape(-1).copy())
    return memory.cuda()


def _back(memory, shift, like):
    """The array behind `shift` bytes of a byte tensor on the GPU, and whether the rest still is poison."""
    host = memory.cpu().numpy()
    inside = host[shift : shift + like.nbytes].copy().view(like.dtype).reshape(like.shape)
    return inside, bool((host[:shift] == POISON).all() and (host[shift + like.nbytes :] == POISON).all())


def _on_cpu(op, generator, p, dtype, x, residual, e0):
    out = np.empty_like(x)
    one = (1,)
    _C.masked_strided(op, RECORD, generator, p, TYPES[dtype], ALPHA, x.ctypes.data, residual.ctypes.data, out.ctypes.data,
                      (len(x),), one, one, one, one, e0, 0, 2)  # fmt: skip
    return out


@pytest.mark.parametrize("generator", range(4))
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("op", [DROPOUT, DROPOUT_ADD, AFFINE], ids=["dropout", "dropout_add", "affine"])
def test_masked_matches_the_cpu(op, dtype, generator):
    turn = itertools.count(generator)
    size = np.dtype(STORAGE[dtype]).itemsize
    for p, n in itertools.product(P_VALUES, LENGTHS):
        i = next(turn)
        e0, shift = STARTS[i % len(STARTS)], (i % 2) * size  # every other time misaligned
        x, residual = values(dtype, n), values(dtype, n, seed=1)
        gx, gr = _to_gpu(x, shift), _to_gpu(residual, shift)
        out = torch.full((shift + x.nbytes + 64,), POISON, dtype=torch.uint8, device="cuda")
        _cuda.masked(op, RECORD, generator, p, TYPES[dtype], ALPHA, gx.data_ptr() + shift, gr.data_ptr() + shift,
                     out.data_ptr() + shift, n, e0, 0, 0, _stream())  # fmt: skip
        got, clean = _back(out, shift, x)
        assert same(got, _on_cpu(op, generator, p, dtype, x, residual, e0), dtype), (p, n, e0, shift)
        assert clean, "wrote beyond its output"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_every_narrow_pattern(dtype):
    # The hardware's conversions against the law's integer arithmetic, for every pair of bytes there is.
    size = np.dtype(STORAGE[dtype]).itemsize
    x = np.random.default_rng(1).permutation(np.arange(65536, dtype=np.uint16)).view(f"<u{size}").view(STORAGE[dtype])
    residual = x[::-1].copy()
    gx, gr = _to_gpu(x), _to_gpu(residual)
    for p, op, generator in itertools.product((1 / 256, 0.3, 0.999), (DROPOUT, DROPOUT_ADD, AFFINE), (0, 3)):
        out = torch.full((x.nbytes + 64,), POISON, dtype=torch.uint8, device="cuda")
        _cuda.masked(op, RECORD, generator, p, TYPES[dtype], ALPHA, gx.data_ptr(), gr.data_ptr(), out.data_ptr(), len(x), 0,
                     0, 0, _stream())  # fmt: skip
        assert same(_back(out, 0, x)[0], _on_cpu(op, generator, p, dtype, x, residual, 0), dtype), (p, op)


@pytest.mark.parametrize("dtype", TYPES)
def test_masked_strided_matches_the_cpu(dtype):
    views = {
        "transposed": lambda a: a.reshape(240, 1200).T,
        "every other column": lambda a: a.reshape(240, 1200)[:, ::2],
        "channels last": lambda a: a.reshape(30, 10, 12, 80).transpose(0, 3, 1, 2),
    }
    strides_of_e = {"row major": lambda s: layout.row_major(s), "rows of a wider tensor": lambda s: (
        *(5 * k for k in layout.row_major(s)[:-1]), 1), "one a row": lambda s: (*layout.row_major(s[:-1]), 0)}  # fmt: skip
    for (i, view), e_name, op in itertools.product(enumerate(views), strides_of_e, (DROPOUT, DROPOUT_ADD, AFFINE)):
        whole, more = values(dtype, 288_000), values(dtype, 288_000, seed=1)
        x, residual = views[view](whole), views[view](more)
        strides = tuple(s // x.itemsize for s in x.strides)
        e_strides, out_strides = strides_of_e[e_name](x.shape), layout.row_major(x.shape)
        expected = np.empty(x.shape, x.dtype)
        p, generator = (0.1, 1e-3, 0.5)[i], (0, 2, 3)[i]
        common = (op, RECORD, generator, p, TYPES[dtype], ALPHA)
        shape = (x.shape, strides, strides, out_strides, e_strides, 2**33 + 7, 0)
        _C.masked_strided(*common, x.ctypes.data, residual.ctypes.data, expected.ctypes.data, *shape, 2)
        gx, gr = _to_gpu(whole), _to_gpu(more)
        out = torch.full((expected.nbytes + 64,), POISON, dtype=torch.uint8, device="cuda")
        _cuda.masked_strided(*common, gx.data_ptr(), gr.data_ptr(), out.data_ptr(), *shape, 0, _stream())
        got, clean = _back(out, 0, expected)
        assert same(got.reshape(-1), expected.reshape(-1), dtype), (view, e_name, op)
        assert clean


def test_more_elements_than_31_bits():
    n = 2**31 + 70_001
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * 2 * n:
        pytest.skip(f"needs {6 * n >> 30} GiB of free GPU memory, there are {free >> 30}")
    x = torch.randn(n, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    _cuda.masked(DROPOUT, RECORD, 0, 0.1, 2, ALPHA, x.data_ptr(), 0, y.data_ptr(), n, 0, 0, 0, _stream())
    # Against the CPU where indices pass 2^31 and at both ends.
    for begin in (0, 2**31 - 5000, n - 9001):
        window = x[begin : begin + 9001].cpu().view(torch.int16).numpy().view(np.uint16)
        expected = _on_cpu(DROPOUT, 0, 0.1, "bfloat16", window, window, begin)
        assert np.array_equal(y[begin : begin + 9001].cpu().view(torch.int16).numpy().view(np.uint16), expected), begin
    # And everywhere against the same kernel on pieces that 32 bits can count.
    piece = torch.empty(2**27, device="cuda", dtype=torch.bfloat16)
    for begin in range(0, n, 2**27):
        m = min(2**27, n - begin)
        at = (x.data_ptr() + 2 * begin, 0, piece.data_ptr())
        _cuda.masked(DROPOUT, RECORD, 0, 0.1, 2, ALPHA, *at, m, begin, 0, 0, _stream())
        assert torch.equal(piece[:m].view(torch.int16), y[begin : begin + m].view(torch.int16)), begin


def test_records_in_device_memory():
    key, nonces = np.arange(32, dtype=np.uint8), np.random.default_rng(1).integers(0, 256, (100, 16), dtype=np.uint8)
    records = torch.empty(100, 12, dtype=torch.int32, device="cuda")
    gkey, gnonces = _to_gpu(key), _to_gpu(nonces)
    _cuda.subkeys(gkey.data_ptr(), gnonces.data_ptr(), records.data_ptr(), 100, 0, _stream())
    expected = b"".join(_C.derive_record(key.tobytes(), nonce.tobytes()) for nonce in nonces)
    assert records.cpu().numpy().tobytes() == expected
    x = torch.randn(70_001, device="cuda")
    a, b = torch.empty_like(x), torch.empty_like(x)
    common = (0, 0.1, 0, ALPHA, x.data_ptr(), 0)
    _cuda.masked(DROPOUT, records[7].data_ptr(), *common, a.data_ptr(), x.numel(), 0, 0, 0, _stream())
    _cuda.masked(DROPOUT, expected[7 * 48 : 8 * 48], *common, b.data_ptr(), x.numel(), 0, 0, 0, _stream())
    assert torch.equal(a, b) and 0.08 < (a == 0).float().mean().item() < 0.12


def test_streams_are_kept_apart():
    # Two streams at once, each behind work of its own that the kernel must wait for.
    n = 5_000_003
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    for i, s in enumerate(streams):
        with torch.cuda.stream(s):
            x = torch.zeros(n, device="cuda")
            for _ in range(50):
                x += 1 + i
            y = torch.empty_like(x)
            _cuda.masked(DROPOUT, RECORD, 0, 0.1, 0, ALPHA, x.data_ptr(), 0, y.data_ptr(), n, 1000 * i, 0, 0, s.cuda_stream)
            results.append((x, y, y.clone()))
    torch.cuda.synchronize()
    for i, (x, y, copy) in enumerate(results):
        expected = _on_cpu(DROPOUT, 0, 0.1, "float32", np.full(n, 50.0 * (1 + i), np.float32), x.cpu().numpy(), 1000 * i)
        assert np.array_equal(y.cpu().numpy(), expected) and torch.equal(y, copy)


def test_a_graph_replays_with_the_record_it_finds():
    key = torch.arange(32, dtype=torch.uint8, device="cuda")
    nonce = torch.arange(16, dtype=torch.uint8, device="cuda")
    record = torch.empty(12, dtype=torch.int32, device="cuda")
    x = torch.randn(100_003, device="cuda")
    y = torch.empty_like(x)

    def step():
        _cuda.subkeys(key.data_ptr(), nonce.data_ptr(), record.data_ptr(), 1, 0, _stream())
        at = (x.data_ptr(), 0, y.data_ptr())
        _cuda.masked(DROPOUT, record.data_ptr(), 0, 0.1, 0, ALPHA, *at, x.numel(), 0, 0, 0, _stream())

    step()  # kernels are loaded before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    seen = []
    for turn in range(3):
        key.fill_(turn + 1)
        graph.replay()
        torch.cuda.synchronize()
        expected = np.empty(x.numel(), np.float32)
        host = x.cpu().numpy()
        derived = _C.derive_record(key.cpu().numpy().tobytes(), nonce.cpu().numpy().tobytes())
        _C.dropout(derived, 0, 0.1, 0, host.ctypes.data, expected.ctypes.data, x.numel(), 0, 2)
        assert np.array_equal(y.cpu().numpy(), expected)
        seen.append(expected)
    assert not np.array_equal(seen[0], seen[1]) and not np.array_equal(seen[1], seen[2])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_gpu_gets_its_own_launch():
    for device in range(torch.cuda.device_count()):
        x = torch.ones(50_001, device=f"cuda:{device}")
        y = torch.empty_like(x)
        handle = torch.cuda.current_stream(device).cuda_stream
        before = torch.cuda.current_device()
        _cuda.masked(DROPOUT, RECORD, 0, 0.1, 0, ALPHA, x.data_ptr(), 0, y.data_ptr(), x.numel(), 0, 0, device, handle)
        assert torch.cuda.current_device() == before
        expected = _on_cpu(DROPOUT, 0, 0.1, "float32", np.ones(50_001, np.float32), np.ones(50_001, np.float32), 0)
        assert np.array_equal(y.cpu().numpy(), expected), device


def test_cuda_says_no_in_words():
    with pytest.raises(RuntimeError, match="choosing the device: invalid device ordinal"):
        _cuda.masked(DROPOUT, RECORD, 0, 0.1, 0, ALPHA, 0, 0, 0, 1, 0, 0, 99, 0)
    assert torch.ones(3, device="cuda").sum().item() == 3  # nothing is left broken
