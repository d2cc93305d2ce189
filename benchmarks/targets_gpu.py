"""What a GPU must reach (H100), and whether the rows of a run say that it does."""

from collections.abc import Callable
from dataclasses import dataclass

Rows = list[dict]


def _value(rows: Rows, field: str, **wanted) -> float | None:
    """The field of the first row that has all that is wanted; None without such a row."""
    for row in rows:
        if all(row.get(k) == v for k, v in wanted.items()) and row.get(field) is not None:
            return row[field]
    return None


def _ratio(rows: Rows, slower: dict, faster: dict) -> float | None:
    """How often the second is as fast as the first, by medians."""
    a, b = _value(rows, "p50_us", **slower), _value(rows, "p50_us", **faster)
    return a / b if a and b else None


@dataclass
class Target:
    """least: the smallest value that counts as reached, in `unit`; measured: from the rows of all benchmarks, or None."""

    what: str
    least: float
    unit: str
    measured: Callable[[Rows], float | None]


def _percent(what: str, least: float, **wanted) -> Target:
    return Target(what, least, "% of copy", lambda rows: _value(rows, "percent_of_copy", **wanted))


def _times(what: str, least: float, slower: dict, faster: dict) -> Target:
    return Target(what, least, "times", lambda rows: _ratio(rows, slower, faster))


def _dropout(case: str, measure: str = "forward", dtype: str = "bfloat16") -> dict:
    name = f"ev.dropout {case}" + (" backward" if measure == "backward" else "")
    return {"bench": "dropout", "measure": measure, "dtype": dtype, "cache": "cold", "case": name}


def _all() -> list[Target]:
    targets = []
    for measure, rivals in (("forward", ("F.dropout", "triton")), ("backward", ("torch backward",))):
        ours = _dropout("chacha8", measure)
        targets.append(_percent(f"bf16 dropout {measure}, ChaCha8, of clone", 95, **ours))
        targets += [_times(f"bf16 dropout {measure}, over {r}", 1.2, {**ours, "case": r}, ours) for r in rivals]
        for stream, least in (("chacha12", 93), ("philox", 93), ("chacha20", 85)):
            targets.append(_percent(f"bf16 dropout {measure}, {stream}, of clone", least, **_dropout(stream, measure)))
        targets.append(_times(f"bf16 dropout {measure}, ChaCha8 over Philox", 0.98, _dropout("philox", measure), ours))
        fp32 = _dropout("chacha8", measure, "float32")
        targets.append(_percent(f"fp32 dropout {measure}, ChaCha8, of clone", 97, **fp32))
    for megabytes in (1, 4, 16):
        for measure in ("calls", "50 calls in a graph"):
            where = {"bench": "dropout", "measure": measure, "cache": f"L2, {megabytes} MB"}
            slower, faster = {**where, "case": "F.dropout"}, {**where, "case": "ev.dropout"}
            targets.append(_times(f"bf16 dropout, {megabytes} MB, {measure}, over F.dropout", 1.0, slower, faster))
    for measure, least in (("dropout+add", 1.7), ("bias+GELU+dropout", 2.5)):
        where = {"bench": "fused", "measure": measure}
        ours = {**where, "case": "everett_cuda"}
        targets.append(_times(f"{measure} over torch eager", least, {**where, "case": "torch"}, ours))
        targets.append(_times(f"{measure} over torch.compile", 1.0, {**where, "case": "torch.compile"}, ours))
    for kind, chacha, philox in (("words", 90, 95), ("uniform", 85, 95), ("normal", 70, 85)):
        for stream, least in (("chacha8", chacha), ("philox", philox)):
            row = {"bench": "noise", "measure": kind, "case": f"everett_cuda {stream}"}
            targets.append(_percent(f"{kind} fill, {stream}, of memset", least, **row))
    normal = {"bench": "noise", "measure": "normal"}
    slower, faster = {**normal, "case": "torch.randn"}, {**normal, "case": "everett_cuda chacha8"}
    targets.append(_times("normals over torch.randn", 2.0, slower, faster))
    for n in (512 * 1024, 8192 * 1024):
        graph = {"bench": "dropout", "measure": "graph of 24 layers", "n": n}
        for case in ("ev.dropout", "ev.dropout, a new key each replay"):
            what = f"graph of 24 layers of {n >> 10} K elements, {case}, over F.dropout"
            targets.append(_times(what, 1.0, {**graph, "case": "F.dropout"}, {**graph, "case": case}))
    copy = {"bench": "pool", "measure": "slab copy"}
    slower, faster = {**copy, "case": "pinned copy_"}, {**copy, "case": "slab"}
    targets.append(_times("slab copy over a pinned copy", 0.9, slower, faster))
    return targets


TARGETS = _all()


def judged(rows: Rows) -> list[tuple[str, str, str, str]]:
    """(what, least, measured, "yes", "NO" or "not measured") of every target."""
    result = []
    for t in TARGETS:
        value = t.measured(rows)
        verdict = "not measured" if value is None else "yes" if value >= t.least else "NO"
        result.append((t.what, f"{t.least:g} {t.unit}", "" if value is None else f"{value:.2f}", verdict))
    return result
