"""Reads compiled CUDA kernels: registers, stack, and the instructions on the hot path of a kernel's loop.

The hot path is counted, not the listing: of all ways from the head of a loop back to it, the one that moves most bytes
in 16-byte loads and stores, and of those the shortest. So a ragged tail or a rare branch in the same loop does not
count, and an instruction that is only predicated off does.
"""

import ctypes
import importlib.util
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

ALU = ("LOP3", "IADD3", "SHF", "PRMT", "ISETP", "SEL", "VIMNMX", "LEA", "FSETP", "FSEL", "FMNMX", "HSET2", "PLOP3", "LOP")


class Instruction(NamedTuple):
    address: int
    text: str  # without predicate
    predicate: str  # "@P0", "@!P1" or ""

    @property
    def opcode(self):
        return self.text.split()[0].rstrip(";")


class Kernel(NamedTuple):
    name: str
    registers: int
    stack: int
    instructions: list


class HotPath(NamedTuple):
    instructions: int
    alu: int  # of these on the integer pipe (a rough class by opcode)
    memory: dict  # opcode: number, of loads and stores


def tool(name):
    """A disassembler of the triton package, or None without it."""
    spec = importlib.util.find_spec("triton")
    path = spec and Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    return path if path and path.exists() else None


def _demangled(name):
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_char_p  # leaks a few bytes a name
    full = (demangle(name.encode(), None, None, None) or name.encode()).decode()
    full = full.replace("(anonymous namespace)::", "").replace("everett::", "").removeprefix("void ")
    depth = 0
    for i, c in enumerate(full):  # cut the parameters: the "(" outside of "<...>"
        depth += {"<": 1, ">": -1}.get(c, 0)
        if c == "(" and depth == 0:
            return full[:i]
    return full


def _cuobjdump(*arguments):
    return subprocess.run([tool("cuobjdump"), *arguments], capture_output=True, text=True, check=True).stdout


def kernels(path, arch="sm_90"):
    """Every kernel for one architecture in an object file or module, by its demangled name without namespaces."""
    usage = _cuobjdump("-res-usage", "-arch", arch, path)
    used = {m[1]: (int(m[2]), int(m[3])) for m in re.finditer(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)}
    result = {}
    for part in _cuobjdump("-sass", "-arch", arch, path).split("Function : ")[1:]:
        mangled, body = part.split("\n", 1)
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][^;]*);", body)
        instructions = [Instruction(int(a, 16), text.strip(), p.strip()) for a, p, text in found]
        registers, stack = used[mangled.strip()]
        name = _demangled(mangled.strip())
        result[name] = Kernel(name, registers, stack, instructions)
    return result


def _blocks(instructions):
    """Basic blocks: first index: (indices, successors as first indices)."""
    at = {i.address: k for k, i in enumerate(instructions)}
    target = {}
    for k, i in enumerate(instructions):
        if i.opcode.startswith(("BRA", "JMP")) and (m := re.search(r"0x([0-9a-f]+)", i.text)):
            target[k] = at[int(m[1], 16)]
    ends = {k for k, i in enumerate(instructions) if k in target or i.opcode in ("EXIT", "RET")}
    starts = sorted({0, *target.values(), *(k + 1 for k in ends if k + 1 < len(instructions))})
    blocks = {}
    for s, e in zip(starts, [*starts[1:], len(instructions)], strict=True):
        last, successors = e - 1, []
        if last in target:
            successors.append(target[last])
        always = instructions[last].predicate == "" and (last in ends) and not (
            instructions[last].opcode.startswith("BRA.DIV") or re.search(r"\bU?!?U?P\d", instructions[last].text))
        if not always and e < len(instructions):
            successors.append(e)
        blocks[s] = (range(s, e), successors)
    return blocks


def hot_path(kernel, inner_turns=1):
    """The hot path of the kernel's loop, or None where no loop moves 16 bytes at a time. A loop inside of it (rounds that
    are counted at run time) counts `inner_turns` times."""
    instructions = kernel.instructions
    blocks = _blocks(instructions)

    def worth(s):
        moves = sum(bool(re.match(r"(LDG|STG)\.E\.(\w+\.)*128", instructions[k].opcode)) for k in blocks[s][0])
        return moves, s in blocks[s][1], -len(blocks[s][0])  # 16-byte moves, then inner loops, then few instructions

    best = None
    for head in blocks:
        # Only a jump back closes a loop, and blocks are in address order: the best path over the jumps ahead from head.
        value, came = {head: worth(head)}, {head: None}
        for s in sorted(b for b in blocks if b >= head):
            if s not in value:
                continue
            for t in blocks[s][1]:
                if t > s:
                    v = tuple(a + b for a, b in zip(value[s], worth(t), strict=True))
                    if t not in value or v > value[t]:
                        value[t], came[t] = v, s
                elif t == head and value[s][0] and (best is None or value[s] > best[0]):
                    path, at = [], s
                    while at is not None:
                        path += list(blocks[at][0]) * (inner_turns if at in blocks[at][1] else 1)
                        at = came[at]
                    best = (value[s], path)
    if best is None:
        return None
    path = [instructions[k] for k in best[1]]
    memory = {}
    for i in path:
        if i.opcode.startswith(("LDG", "LDL", "LDS", "LD.", "STG", "STL", "STS", "ST.", "RED", "ATOM")):
            memory[i.opcode] = memory.get(i.opcode, 0) + 1
    return HotPath(len(path), sum(i.opcode.startswith(ALU) for i in path), memory)
