"""What nvcc made of the kernels for sm_90: instructions an element, registers, widths of loads and stores, no stack.

The counts of every kernel are committed in vectors/sass_sm90.json. A change that moves them must write them anew,
knowingly: python tests/test_cuda_sass.py --write (with the module built by the nvcc that is named there).
"""

import json
import re
import sys
from pathlib import Path

import pytest
import sass

TABLE = Path(__file__).parent / "vectors" / "sass_sm90.json"
ELEMENTS = 32  # of a lane in a tile of a masked or fused kernel, which is what a turn of the loop does
# ChaCha rounds that are counted at run time: the first double round stands before the inner loop, 12 rounds leave 5.
INNER_TURNS = 5
# What the hot path may take: instructions an element (static stand-ins for speed until a GPU has spoken).
LIMITS = {
    "masked_kernel<ElementBf16, (MaskedOp)0, (Engine)0, false>": 18.0,
    "masked_kernel<ElementF32, (MaskedOp)0, (Engine)0, false>": 18.0,
    "masked_kernel<ElementE4m3, (MaskedOp)0, (Engine)0, false>": 19.0,
    "masked_kernel<ElementBf16, (MaskedOp)0, (Engine)1, false>": 24.0,  # ChaCha12
    "fill_kernel<(Fill)0, ElementF32, (Engine)0>": 27.0,
    "fill_kernel<(Fill)1, ElementF32, (Engine)0>": 30.0,
    # 29.5 are the law's polynomials for ln, cos and sin, which give the same bits everywhere; the hardware's own would
    # take 10.5.
    "fill_kernel<(Fill)2, ElementF32, (Engine)0>": 56.0,
    "fill_kernel<(Fill)2, ElementF32, (Engine)2>": 48.0,
    "perturb_kernel<AddNoise<ElementBf16>, (Engine)0>": 61.0,
    "fused_kernel<ElementBf16, Fixed<(FusedOp)0>, (Engine)0>": 24.0,
    "fused_kernel<ElementBf16, Fixed<(FusedOp)1>, (Engine)0>": 59.0,  # 36 of them GELU
    "fused_kernel<ElementBf16, Fixed<(FusedOp)2>, (Engine)0>": 53.0,
    "fused_kernel<ElementBf16, Fixed<(FusedOp)3>, (Engine)0>": 65.0,
    "fused_kernel<ElementBf16, Fixed<(FusedOp)4>, (Engine)0>": 59.0,
}
BYTES = {"ElementF64": 8, "ElementF32": 4, "ElementBf16": 2, "ElementF16": 2, "ElementE4m3": 1, "ElementE5m2": 1}
REGISTERS = {8: 128, 4: 80, 2: 64, 1: 64}  # by bytes of an element; 64 leave 32 warps a multiprocessor, 80 leave 24


def _element(name):
    found = re.search(r"Element\w+", name)
    return found and BYTES[found[0]]


def elements_of_a_turn(name):
    """Elements of a lane in a turn of the kernel's loop; None where the hot path can't be told by its 16-byte moves.

    Those are the wide form of the masked kernels (a loop around the rounds), fused ops that are looked up at run time (a
    loop over vectors) and stochastic rounding (8-byte stores).
    """
    if name.startswith("fill_kernel<"):
        return 8 if "ElementF64" in name or re.search(r"\(Fill\)[34]", name) else 16
    if name.startswith("perturb_kernel<"):
        return 16 if "AddNoise" in name else None
    if name.startswith("fused_kernel<"):
        return ELEMENTS if "Fixed" in name else None
    return ELEMENTS if name.startswith("masked_kernel<") and name.endswith("false>") else None


def measured(kernel):
    """A row of the table."""
    row = {"registers": kernel.registers, "stack": kernel.stack}
    elements = elements_of_a_turn(kernel.name)
    if elements is not None:
        hot = sass.hot_path(kernel, INNER_TURNS)
        row["instructions_per_element"] = round(hot.instructions / elements, 2)
        row["alu_per_element"] = round(hot.alu / elements, 2)
        row["memory"] = dict(sorted(hot.memory.items()))
    return row


def _nvcc_release(path):
    """The toolkit that compiled a module, as it wrote into it."""
    found = re.search(rb"Cuda compilation tools, release (\d+\.\d+), V([\d.]+)", Path(path).read_bytes())
    return found and found[2].decode()


def _module():
    _cuda = pytest.importorskip("everett_cuda._cuda", reason="built without nvcc, so there is no machine code to count")
    if sass.tool("cuobjdump") is None:
        pytest.skip("counting machine code needs cuobjdump, which comes with the triton package (pip install triton)")
    return _cuda.__file__


@pytest.fixture(scope="module")
def kernels():
    found = sass.kernels(_module())
    if not found:
        pytest.skip("the CUDA module was built without sm_90 (EVERETT_CUDA_ARCHS)")
    return found


@pytest.fixture(scope="module")
def masked(kernels):
    found = {name: k for name, k in kernels.items() if name.startswith("masked_kernel<")}
    assert len(found) > 50
    return found


def test_limits_of_the_hot_kernels(kernels):
    for name, limit in LIMITS.items():
        assert sass.hot_path(kernels[name], INNER_TURNS).instructions / elements_of_a_turn(name) <= limit, name


def test_no_kernel_has_a_stack(kernels):
    for name, kernel in kernels.items():
        assert kernel.stack == 0, name
        assert not [i.text for i in kernel.instructions if i.opcode.startswith(("LDL", "STL"))], name


def test_registers_leave_room_for_warps(masked):
    for name, kernel in masked.items():
        assert kernel.registers <= REGISTERS[_element(name)], name


def test_hot_paths_move_16_bytes_at_a_time(masked):
    for name, kernel in masked.items():
        memory = sass.hot_path(kernel, INNER_TURNS).memory
        vectors = ELEMENTS * _element(name) // 16
        inputs = 2 if "(MaskedOp)1" in name else 1
        moved = {op: n for op, n in memory.items() if op.startswith(("LDG", "STG"))}
        assert all("128" in op for op in moved), (name, moved)
        assert sum(n for op, n in moved.items() if op.startswith("LDG")) == inputs * vectors, (name, moved)
        assert sum(n for op, n in moved.items() if op.startswith("STG")) == vectors, (name, moved)


def test_fills_store_16_bytes_at_a_time(kernels):
    found = [name for name in kernels if name.startswith("fill_kernel<")]
    assert len(found) > 30
    for name in found:
        memory = sass.hot_path(kernels[name], INNER_TURNS).memory
        stores = elements_of_a_turn(name) * _element(name) // 16
        assert {op: n for op, n in memory.items() if op.startswith(("LDG", "STG"))} == {"STG.E.128": stores}, (name, memory)


def test_nothing_is_fused(masked):
    # A multiply and an add that became one instruction would round once, and differ from the CPU.
    for name, kernel in masked.items():
        assert not [i.text for i in kernel.instructions if i.opcode.startswith(("FFMA", "DFMA"))], name


def test_counts_are_the_committed_ones(kernels):
    table = json.loads(TABLE.read_text())
    release = _nvcc_release(_module())
    if release != table["nvcc"]:
        pytest.skip(f"the table is of nvcc {table['nvcc']}, the module of {release}: only limits are checked")
    now = {name: measured(kernel) for name, kernel in sorted(kernels.items())}
    changed = {n: (table["kernels"].get(n), now.get(n)) for n in {*now, *table["kernels"]}
               if now.get(n) != table["kernels"].get(n)}  # fmt: skip
    assert not changed, f"(committed, now): {changed}; if meant: python tests/test_cuda_sass.py --write"


def test_the_counter_counts():
    # Negative controls on listings of its own: a loop with a rare branch, and an inner loop.
    def kernel(*lines):
        return sass.Kernel("k", 0, 0, [sass.Instruction(16 * i, text, p) for i, (p, text) in enumerate(lines)])

    load, store = ("", "LDG.E.128 R4, [R2]"), ("", "STG.E.128 [R2], R4")
    rare = kernel(("", "MOV R0, R1"), load, ("@P0", "BRA 0x50"), store, ("", "BRA 0x70"), ("", "LDG.E R4, [R2]"),
                  ("", "STG.E [R2], R4"), ("@P1", "BRA 0x10"), ("", "EXIT"))  # fmt: skip
    hot = sass.hot_path(rare)
    assert hot.instructions == 5 and hot.memory == {"LDG.E.128": 1, "STG.E.128": 1}
    inner = kernel(load, ("", "IADD3 R0, R0, R1, RZ"), ("@P0", "BRA 0x10"), store, ("@P1", "BRA 0x0"), ("", "EXIT"))
    assert [sass.hot_path(inner, n).instructions for n in (1, 4)] == [5, 11]
    assert sass.hot_path(kernel(("", "MOV R0, R1"), ("@P0", "BRA 0x0"), ("", "EXIT"))) is None


def _write():
    path = _module()
    rows = {name: measured(kernel) for name, kernel in sorted(sass.kernels(path).items())}
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    TABLE.write_text(f'{{\n  "nvcc": {json.dumps(_nvcc_release(path))},\n  "kernels": {{\n{lines}\n  }}\n}}\n')
    print(f"{len(rows)} kernels written to {TABLE}")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_cuda_sass.py --write")
    _write()
