"""The CUDA module where it was built: it imports and answers on a machine with no GPU and no driver."""

import pytest
import torch

_cuda = pytest.importorskip("everett_cuda._cuda", reason="built without nvcc, so there is no CUDA module")
RECORD = bytes(48)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here; tests/gpu covers it")
def test_without_a_gpu_it_says_so():
    try:
        assert _cuda.device_count() == 0
    except RuntimeError as error:
        assert "counting devices" in str(error)
    with pytest.raises(RuntimeError, match="law_check: allocation"):
        _cuda.law(0, RECORD, 1, 0, 0.5, 0, 0, 4)


@pytest.mark.parametrize("bad", [{"record": bytes(47)}, {"generator": 4}, {"what": 6}, {"p": float("nan")}])
def test_rejects_bad_arguments(bad):
    good = dict(generator=0, record=RECORD, tag=1, s=0, p=0.5, what=1, first_block=0, blocks=1)
    with pytest.raises(ValueError):
        _cuda.law(**{**good, **bad})
