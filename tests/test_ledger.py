"""The ledger of a run: what it records of sources, health and keys, that it holds no key, and what cannot break it."""

import base64
import gc
import hashlib
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import threading
import warnings
from contextlib import closing

import numpy as np
import pytest
import torch
from ledger_checks import Run, records_of, until, written
from processes import in_forked_child

import everett_cuda as ev
from everett_cuda import _C, followers, keys, session
from everett_cuda.drivers import open_driver
from everett_cuda.errors import HealthAlarm, LedgerError, StartupTestFailed
from everett_cuda.ledgers.chain import read_chain
from everett_cuda.ledgers.verify import summary_of, verify_ledgers
from everett_cuda.ledgers.writer import Ledger
from everett_cuda.source import Source


@pytest.fixture(autouse=True)
def closed():
    """Nothing stays open, and nothing follows."""
    before = list(followers._all)
    yield
    ev.close()
    keys.set_freshness("op")
    keys.configure(on_starved="stretch", max_stretch=2**16, timeout_s=60.0)
    assert not session.watchers and followers._all == before
    assert [t.name for t in threading.enumerate() if t.name.startswith("everett")] == []


@pytest.fixture
def sim():
    with Source.open("sim:seed=5,rate=10MB/s", ring_bytes=16384) as source:
        yield source


def of_type(path, *types):
    return [r for r in records_of(path) if r["type"] in types]


# --- what it records ---


def test_a_run_from_its_first_source_to_its_end(tmp_path):
    path = tmp_path / "run.evl"
    keys.configure(timeout_s=None)
    with ev.ledger(path, interval_s=600) as ledger:
        assert isinstance(ledger, Ledger) and stat.S_IMODE(path.stat().st_mode) == 0o600
        ev.open("sim:seed=7,h=6.4")
        x = torch.ones(64)
        ev.dropout(x, 0.5)
        torch.manual_seed(1)
        ev.dropout(x, 0.5)
        torch.manual_seed(1)
        ev.dropout(x, 0.5)
        session.current_source().take(100)
        ev.close()
        ev.open("sim:seed=8")
        ev.dropout(x, 0.5)
    begin, *rest, end = records_of(path)
    assert begin["format"] == "everett ledger 1" and re.fullmatch("[0-9a-f]{32}", begin["run"])
    assert begin["pid"] == os.getpid() and begin["environment"]["torch"] == torch.__version__
    assert begin["settings"] == {"freshness": "op", "on_starved": "stretch", "max_stretch": 65536, "timeout_s": None}
    assert [r["type"] for r in rest] == ["source", "state", "counts", "source", "counts"] and end["type"] == "end"
    first, state, closing, second, last = rest
    assert (first["uri"], first["serial"], first["kind"]) == ("sim:seed=7,h=6.4", "seed-7", "simulated")
    assert first["label"] == "NOT QUANTUM (simulated)" and first["raw_bytes_per_block"] == 50
    assert (first["min_entropy"], first["min_entropy_origin"]) == ("32/5", "claimed by user")
    assert first["health"]["alpha"] == "2^-60" and first["health"]["startup_bytes"] == 4096
    assert second["health"]["cutoffs"] == {  # of H = 4, as SP 800-90B's formulas give them (test_health.py)
        "repetition count (bits)": 121, "repetition count (bytes)": 16,
        "adaptive proportion (bits)": 847, "adaptive proportion (bytes)": 92,
    }  # fmt: skip
    assert (state["source"], state["state"]) == (1, "closed")
    assert (closing["why"], closing["keyring"], last["why"], last["keyring"]) == ("source closed", 0, "end", 1)
    draws = closing["draws"]
    assert (draws["draws"], draws["fresh"], draws["reused"]) == (3, 2, 1) and last["draws"]["fresh"] == 1
    counts = closing["sources"]["1"]
    assert counts["bytes_handed_out"] == 2 * 32 + 100 and counts["startup_tests"] == 1
    assert counts["bytes_handed_out"] + counts["bytes_destroyed"] == counts["conditioned_bytes_out"]
    assert last["sources"].keys() == {"2"}
    summary = summary_of(read_chain(path))
    assert (summary.draws["draws"], summary.draws["fresh"], summary.steps) == (4, 3, 2)


def test_stretched_and_shared_keys_are_told_apart_over_time(tmp_path, ring):
    path = tmp_path / "run.evl"
    ring.put(bytes(range(64)))
    with ev.ledger(path, every_steps=2, interval_s=600):
        for _ in range(4):
            keys.draw_record()
        ev.step()
        keys.set_freshness("step")
        ev.step()
        keys.draw_record()
        keys.draw_record()
        ev.step()
    two, end = of_type(path, "counts")
    assert (two["why"], two["steps"], end["why"], end["steps"]) == ("steps", 2, "end", 3)
    kinds = ("draws", "fresh", "stretched", "shared")
    assert [two["draws"][k] for k in kinds] == [4, 2, 2, 0] and [end["draws"][k] for k in kinds] == [6, 2, 3, 1]
    assert (two["settings"]["freshness"], end["settings"]["freshness"]) == ("step", "step")


def test_counts_come_at_intervals(tmp_path, sim):
    path = tmp_path / "run.evl"
    with Ledger(path, Run(sim), interval_s=0.05):
        until(lambda: len(of_type(path, "counts")) >= 4)
        sim.take(320)
        until(lambda: of_type(path, "counts")[-1]["sources"]["1"]["bytes_handed_out"] == 320)
    times = [r["ms"] for r in of_type(path, "counts")]
    assert times == sorted(times) and {r["why"] for r in of_type(path, "counts")} == {"interval", "end"}


def test_health_history(tmp_path):
    path = tmp_path / "run.evl"
    with ev.ledger(path, interval_s=0.1):
        with pytest.raises(StartupTestFailed):
            ev.open("sim:seed=1,fault=stuck@100")
        ev.open("sim:seed=2,fault=stuck@20KiB")
        with pytest.raises(HealthAlarm):
            session.current_source().take(1 << 20)
        until(lambda: of_type(path, "alarm"))
    (refused,) = of_type(path, "refused")
    assert refused["error"] == "StartupTestFailed" and "in the start-up test of 4096 raw bytes" in refused["said"]
    alarms = of_type(path, "alarm")
    said = [str(a) for a in session.current_source().status().alarms]
    assert [f"{a['test']} {a['value']} reached cutoff {a['cutoff']} at byte {a['offset']}" for a in alarms] == said
    assert [(a["permanent"], a["startup"]) for a in alarms] == [(False, False), (True, True)]
    last = of_type(path, "counts")[-1]["sources"]["1"]
    assert last["state"] == "alarm" and sum(last["alarms"].values()) == 2
    text = str(summary_of(read_chain(path)))
    assert f"PERMANENT {said[1]}" in text and "refused:      sim:seed=1,fault=stuck@100" in text


def test_provenance_of_ranks(tmp_path, sim):
    path, run = tmp_path / "run.evl", Run(sim)
    with Ledger(path, run, interval_s=600) as ledger:
        ledger.count()
        run.told = {"0": {"said": "rank 0 has its own source", "serial": "A1"}, "1": {"said": "rank 1 gets root keys"}}
        ledger.count()
        ledger.count()
    (record,) = of_type(path, "provenance")
    assert record["ranks"] == run.told
    assert "rank 1:       rank 1 gets root keys" in str(summary_of(read_chain(path)))


def test_the_policy_of_several_processes_is_recorded_as_it_says_it(tmp_path):
    import torch.distributed as dist

    path = tmp_path / "run.evl"
    ev.open("sim:seed=7")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        with ev.ledger(path, interval_s=600):
            ev.distributed.setup()
            said = str(ev.distributed.provenance()[0])
    finally:
        ev.distributed.teardown()
        dist.destroy_process_group()
    (record,) = of_type(path, "provenance")
    assert record["ranks"]["0"]["said"] == said and record["ranks"]["0"]["kind"] == "simulated"


def test_arguments_of_the_program_are_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/me/train.py", "--api-key", "s3cr3t"])
    path = written(tmp_path / "run.evl")
    assert records_of(path)[0]["program"] == "train.py" and b"s3cr3t" not in path.read_bytes()


# --- it holds no key ---


def found(secret: bytes, data: bytes) -> bool:
    """Whether a file holds these bytes, as they are or as text, whole or a half of them."""
    for part in (secret, secret[:16], secret[16:]):
        words = np.frombuffer(part, "<u4")
        forms = [part, part.hex().encode(), base64.b64encode(part).rstrip(b"=")[:-1], part[::-1].hex().encode()]
        forms.append(b",".join(str(word).encode() for word in words))
        if any(form in data or form.upper() in data for form in forms):
            return True
    return False


def test_no_key_and_no_raw_bytes_are_in_the_file(tmp_path):
    path = tmp_path / "run.evl"
    ev.open("sim:seed=7")
    with ev.ledger(path, interval_s=0.05, every_steps=1):
        for _ in range(50):
            ev.dropout(torch.ones(8), 0.5)
            ev.step()
        words = session.current_source().direct_words(400)
        n = keys.counters()["fresh"]
    assert n == 50
    with closing(open_driver("sim:seed=7")) as driver:
        raw, at = bytearray(80 * 150), 0
        while at < len(raw):
            at += driver.readinto(memoryview(raw)[at:], 1.0)
    blocks = [hashlib.sha256(raw[i : i + 80]).digest() for i in range(0, len(raw), 80)]
    assert words.tobytes() == b"".join(blocks[n : n + 100])  # so these are the keys
    data = path.read_bytes()
    derived = [f(key) for key in blocks for f in (_C.stretched_key, _C.key_commitment)]
    assert not [s for s in (*blocks, *derived, bytes(raw[:512])) if found(s, data)]
    assert found(blocks[3], data + blocks[3].hex().encode()) and found(blocks[3], data[:100] + blocks[3][16:])


# --- what cannot break it ---


def test_a_ledger_is_never_written_over(tmp_path):
    path, victim, link = tmp_path / "run.evl", tmp_path / "victim", tmp_path / "link.evl"
    path.write_text("precious")
    victim.write_text("precious")
    link.symlink_to(victim)
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    for place in (path, link, tmp_path / "dangling"):
        with pytest.raises(LedgerError, match="exists, and a ledger is never written over"):
            ev.ledger(place)
    with pytest.raises(LedgerError, match="cannot be made: No such file"):
        ev.ledger(tmp_path / "no" / "run.evl")
    assert path.read_text() == victim.read_text() == "precious" and not (tmp_path / "none").exists()


@pytest.mark.parametrize("interval_s", [0, -1, float("nan"), float("inf")])
def test_odd_arguments_make_no_file(tmp_path, interval_s):
    with pytest.raises(ValueError, match="interval_s"):
        ev.ledger(tmp_path / "run.evl", interval_s=interval_s)
    for every_steps in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="every_steps"):
            ev.ledger(tmp_path / "run.evl", every_steps=every_steps)
    with pytest.raises(ValueError, match="needs a path"):
        ev.ledger(key="k")
    assert not list(tmp_path.iterdir())


def test_one_ledger_at_a_time(tmp_path):
    with ev.ledger(tmp_path / "run.evl"):
        with pytest.raises(LedgerError, match=r"run.evl is being written; close it"):
            ev.ledger(tmp_path / "two.evl")
    with ev.ledger(tmp_path / "two.evl") as second:
        second.close()
    with pytest.raises(LedgerError, match="is closed"):
        second.count()
    assert {verify_ledgers([tmp_path / f"{name}.evl"]).good for name in ("run", "two")} == {True}


@pytest.fixture
def full_disk():
    """Called with a file: it can grow by n bytes more, and no file of this process beyond that."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(path, n):
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + n, limits[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("room", [0, 1, 300])
def test_a_full_disk_is_told_at_once_at_each_step_and_at_the_close(tmp_path, full_disk, room):
    path = tmp_path / "run.evl"
    ev.open("sim:seed=7")
    ledger = ev.ledger(path, interval_s=600, every_steps=1)
    ev.step()
    whole = path.read_bytes()
    full_disk(path, room)
    with pytest.warns(RuntimeWarning, match="the ledger has failed.*consistent to line 3"):
        with pytest.raises(LedgerError, match="cannot be written"):
            ev.step()
    with pytest.raises(LedgerError, match="nothing is recorded any more"):
        ev.step()
    assert "FAILED" in str(ev.status()) and "FAILED" in str(ev.ledger())
    with pytest.raises(LedgerError, match="consistent to line 3"):
        ledger.close()
    ev.step()  # without a ledger the run may go on
    assert path.read_bytes() == whole
    (verdict,) = verify_ledgers([path]).ledgers
    assert verdict.words.startswith("unfinished: consistent to line 3")


def test_a_failure_at_the_end_does_not_hide_what_has_stopped_the_run(tmp_path, full_disk):
    path = tmp_path / "run.evl"
    with pytest.raises(ZeroDivisionError), ev.ledger(path):
        full_disk(path, 10)
        raise ZeroDivisionError
    assert not session.watchers


def test_a_killed_run_leaves_a_ledger_that_is_signed_up_to_its_last_interval(tmp_path):
    signature = pytest.importorskip("everett_cuda.ledgers.signature")
    pytest.importorskip("cryptography", reason="needs the extra 'sign'")
    (tmp_path / "keys").mkdir()
    (tmp_path / "run").mkdir()
    public = signature.generate(tmp_path / "keys" / "k").public
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[3])\n"
        "from ledger_checks import Run; from everett_cuda.ledgers.writer import Ledger\n"
        "from everett_cuda.source import Source\n"
        "ledger = Ledger(sys.argv[1], Run(Source.open('sim:seed=3')), sys.argv[2], interval_s=0.001)\n"
        "while True: ledger.count()\n"
    )
    for n in range(2):
        path = tmp_path / "run" / f"{n}.evl"
        here = os.path.dirname(__file__)
        child = subprocess.Popen([sys.executable, "-c", code, path, tmp_path / "keys" / "k", here])
        try:
            until(lambda path=path, n=n: path.exists() and path.stat().st_size > 20_000 + 9_999 * n)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        (verdict,) = verify_ledgers([path], public).ledgers
        assert verdict.chain == "unfinished" and verdict.signer == "verified", verdict
        assert verdict.lines - verdict.signed_lines <= 2 and verdict.signed_lines > 10
        assert [p for p in verdict.problems if "has no end" not in p] == []


def test_a_forked_child_leaves_its_parents_ledger_alone(tmp_path):
    path = tmp_path / "run.evl"
    ev.open("sim:seed=7")
    with ev.ledger(path, interval_s=600, every_steps=1) as ledger:
        before = path.read_bytes()

        def child():
            ev.step()
            ledger.count()
            ev.open("sim:seed=8")
            with ev.ledger(tmp_path / "child.evl"):
                ev.dropout(torch.ones(8), 0.5)
                ev.step()
            ledger.close()
            return "done"

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of forking with threads
            assert in_forked_child(child) == "done"
        assert path.read_bytes() == before
    assert verify_ledgers([path, tmp_path / "child.evl"]).good


def test_a_ledger_that_is_left_open_ends_with_the_process(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from ledger_checks import Run; from everett_cuda.ledgers.writer import Ledger\n"
        "from everett_cuda.source import Source\n"
        "run = Run(fresh=1)\n"
        "ledger = Ledger(sys.argv[1], run)\n"
        "source = Source.open('sim:seed=3')\n"
        "run.sources().append(source); ledger.opened(source); source.take(32)\n"
    )
    arguments = [sys.executable, "-c", code, tmp_path / "run.evl", os.path.dirname(__file__)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert verify_ledgers([tmp_path / "run.evl"]).good
    last = of_type(tmp_path / "run.evl", "counts")[-1]
    assert (last["why"], last["sources"]["1"]["bytes_handed_out"]) == ("end", 32)


def test_threads_may_write_at_once(tmp_path, sim):
    path = tmp_path / "run.evl"
    with Ledger(path, Run(sim), interval_s=0.01) as ledger:
        threads = [threading.Thread(target=lambda: [ledger.count() for _ in range(50)]) for _ in range(4)]
        for step in ("start", "join"):
            for thread in threads:
                getattr(thread, step)()
    assert verify_ledgers([path]).good and len(of_type(path, "counts")) >= 201


# --- the summary ---


def test_without_a_file_it_sums_up(tmp_path):
    assert str(ev.ledger()) == "source:       none"
    ev.open("sim:seed=7")
    ev.dropout(torch.ones(8), 0.5)
    summary = ev.ledger()
    assert summary.file == "" and summary.draws["fresh"] == 1
    text = str(summary)
    assert "sim:seed=7: simulated source (Philox, seed 7), serial seed-7" in text and "NOT QUANTUM (simulated)" in text
    assert "keys:         1 fresh, 0 stretched" in text and "32 handed out" in text
    with ev.ledger(tmp_path / "run.evl", interval_s=600):
        ev.dropout(torch.ones(8), 0.5)
        now = ev.ledger()
        assert now.file == str(tmp_path / "run.evl") and now.draws["fresh"] == 2
        assert now.sources[1].counts["bytes_handed_out"] == 64
        line = next(x for x in str(ev.status()).splitlines() if x.startswith("ledger:"))
        assert line == f"ledger:       {tmp_path / 'run.evl'}, 2 lines, not signed"
    assert "ledger:" not in str(ev.status())


def test_a_closed_ledger_is_garbage(tmp_path):
    import weakref

    ledger = ev.ledger(tmp_path / "run.evl")
    ledger.close()
    gone = weakref.ref(ledger)
    del ledger
    gc.collect()
    assert gone() is None
