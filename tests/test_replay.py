"""Replays: bit for bit what was recorded, and an error at the first thing that was not."""

import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import everett, everett_process
from processes import in_forked_child
from torch.utils.checkpoint import checkpoint

import everett_cuda as ev
from everett_cuda import journal_file, keys, replayed_source
from everett_cuda.errors import JournalError, ReplayMismatch, SourceNotOpen

USER_KEY = bytes(range(40))


@pytest.fixture(autouse=True)
def no_source_is_left():
    yield
    ev.close()
    keys.set_freshness("op")
    keys.configure(on_starved="stretch", max_stretch=2**16, timeout_s=60.0)


def train(path, steps=4, key=None, skip=None, more=None, freshness="op"):
    """A program that uses everything: weights and data by ours and by torch, checkpoints of both kinds, noise, direct
    words, inference, a repeated seed. skip, more: the step in which a draw is left out, or added."""
    ev.set_freshness(freshness)
    ev.open("sim:seed=7")
    journal = ev.journal(path, key)
    model = ev.convert(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 4)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = []
    for i in range(steps):
        x = ev.randn(4, 8) + torch.randn(4, 8)
        x.requires_grad_()
        y = checkpoint(model, x, use_reentrant=i % 2 == 0)
        if i != skip:
            y = ev.add_noise(y, 0.1)
        if i == more:
            y = ev.dropout(y, 0.5)
        (y**2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.inference_mode():
            seen.append(model(x.detach()) + ev.rand(4, freshness="direct"))
        if i == 2:
            for _ in range(2):
                torch.manual_seed(11)
                seen.append(ev.dropout(torch.ones(8), 0.5))
    journal.close()
    return [p.detach().clone() for p in model.parameters()] + seen


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def recorded(path, **options):
    made = train(path, **options)
    ev.close()
    torch.manual_seed(999)  # a replay must not live on what is left of the generators
    return made


# --- equal --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freshness", ["op", "step"])
@pytest.mark.parametrize("key", [None, USER_KEY], ids=["clear", "encrypted"])
def test_an_unseeded_program_runs_again_bit_for_bit(tmp_path, key, freshness):
    path = tmp_path / "run.evj"
    first = recorded(path, key=key, freshness=freshness)
    kinds = {r.drawn for r in ev.read_journal(path, key) if r.type in (journal_file.KEY, journal_file.DRAW)}
    assert {journal_file.DRAWN[k] for k in kinds} == {"fresh", "reused", "replayed"} | (
        {"shared"} if freshness == "step" else set()
    )
    with ev.replay(path, key) as source:
        again = train(path, key=key, freshness=freshness)
        assert source.complete
    assert equal(first, again)
    other = recorded(tmp_path / "other.evj", freshness=freshness)
    assert not equal(first, other), "the control: another recording is another run"


def test_keys_that_were_stretched_are_replayed_too(tmp_path):
    path = tmp_path / "run.evj"

    def draws():
        ev.open("sim:seed=7,rate=100kB/s")
        with ev.journal(path):
            return [keys.draw_record() for _ in range(20_000)]

    first = draws()
    stretched = keys.counters()["stretched"]
    assert stretched > 0
    with ev.replay(path):
        assert draws() == first and keys.counters()["stretched"] == stretched


def test_a_replay_never_calls_itself_quantum_or_opens_a_device(tmp_path):
    path = tmp_path / "run.evj"
    recorded(path)
    with ev.replay(path) as source:
        assert ev.open("quantis-usb:") is source is ev.current_source()
        status = ev.status()
        assert status.source.kind == "replayed"
        assert status.source.label == "NOT FRESH QUANTUM (replayed journal of NOT QUANTUM (simulated))"
        assert "as recorded: " in str(status) and status.source.label in str(status)
        train(path)
    assert not isinstance(ev.open("sim:seed=1"), replayed_source.ReplayedSource)


def test_devices_keep_their_own_order(tmp_path):
    """Threads of two devices may come in another order; on one device the order counts."""
    path = tmp_path / "run.evj"
    ev.open("sim:seed=7")
    nonces = [torch.arange(2 * i, 2 * i + 2) for i in range(6)]

    def draw(device, nonce):
        return keys._keyring.draw(nonce.data_ptr(), False, device)

    with ev.journal(path):
        first = {(device, i): draw(device, nonces[i]) for i in range(6) for device in (0, 1)}
    with ev.replay(path):
        again = {(device, i): draw(device, nonces[i]) for device in (1, 0) for i in range(6)}
    assert first == again and len(set(first.values())) == 12
    with pytest.raises(ReplayMismatch, match="record 1 of"), ev.replay(path):
        draw(0, nonces[1])


def test_threads_that_draw_meanwhile_hand_in_records_without_a_deadlock(tmp_path):
    path, n = tmp_path / "run.evj", 3000
    nonce = torch.zeros(2, dtype=torch.int64)
    ev.open("sim:seed=7")
    with ev.journal(path), torch.inference_mode():
        for _ in range(n):
            for device in (0, 1, 2):
                keys._keyring.draw(nonce.data_ptr(), True, device)
    done = []

    def draws(device):
        for _ in range(n):
            keys._keyring.draw(nonce.data_ptr(), True, device)
        done.append(device)

    with ev.replay(path):
        threads = [threading.Thread(target=draws, args=(d,), daemon=True) for d in (0, 1, 2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
    assert sorted(done) == [0, 1, 2]


# --- different ----------------------------------------------------------------------------------------------------


def numbers_of_step(path, step):
    """(first record of the step, its end) in the journal."""
    records = list(ev.read_journal(path))
    ends = [r.index for r in records if r.type == journal_file.STEP]
    return (ends[step - 1] + 1 if step else 1), ends[step]


def test_a_draw_left_out_is_named(tmp_path):
    path = tmp_path / "run.evj"
    recorded(path)
    first, end = numbers_of_step(path, 2)
    with (
        pytest.raises(ReplayMismatch, match=r"record (\d+) of .*run.evj: recorded was draw \d+: ") as caught,
        ev.replay(path),
    ):
        train(path, skip=2)
    assert first < int(str(caught.value).split()[1]) < end


def test_a_draw_too_many_is_named(tmp_path):
    path = tmp_path / "run.evj"
    recorded(path)
    first, end = numbers_of_step(path, 1)
    with pytest.raises(ReplayMismatch, match=r"record (\d+) of .*the program asked for") as caught, ev.replay(path):
        train(path, more=1)
    assert first < int(str(caught.value).split()[1]) < end


def test_a_last_draw_of_a_step_left_out_is_found_at_its_end(tmp_path):
    path = tmp_path / "run.evj"
    ev.open("sim:seed=7")

    def program(draws):
        with ev.journal(path):
            for n in draws:
                for _ in range(n):
                    keys.draw_record()
                ev.step()

    program([2, 3, 1])
    records = list(ev.read_journal(path))
    with pytest.raises(ReplayMismatch, match="record 6 of .*draw 5: .*asked for the end of a step"), ev.replay(path):
        program([2, 2, 1])
    assert records[6].type == journal_file.KEY
    with pytest.raises(ReplayMismatch, match="record 7 of .*recorded was end of step .*asked for a draw"), ev.replay(path):
        program([2, 4, 1])


def test_an_end_too_early_and_a_journal_too_short(tmp_path):
    path = tmp_path / "run.evj"
    recorded(path)
    with pytest.raises(ReplayMismatch, match="holds more than the program asked for"), ev.replay(path):
        train(path, steps=3)
    with pytest.raises(ReplayMismatch, match=r"nothing: the journal ends there \(closed\)"), ev.replay(path):
        train(path, steps=5)


def test_a_killed_run_is_replayed_as_far_as_it_was_recorded(tmp_path):
    path, torn = tmp_path / "run.evj", tmp_path / "torn.evj"
    first = recorded(path)
    _, end = numbers_of_step(path, 1)
    reader = ev.read_journal(path)
    for record in reader:
        if record.index == end:
            size = reader.good_bytes
    torn.write_bytes(path.read_bytes()[: size + 30])
    with pytest.raises(ReplayMismatch, match=f"record {end + 1} of .*the journal ends there .*is torn"), ev.replay(torn):
        train(torn)
    with pytest.raises(ReplayMismatch, match="is torn"), ev.replay(torn) as source:
        try:
            train(torn)
        finally:
            assert source.seen == end
    assert len(first) == 10


def test_another_number_of_direct_words_is_named(tmp_path):
    path = tmp_path / "run.evj"

    def program(*takes):
        source = ev.open("sim:seed=7")
        with ev.journal(path):
            for n in takes:
                source.direct_words(n) if n else ev.step()

    program(3, 0, 2)
    ev.close()
    for takes, said in (
        ((3, 0, 1), "record 3 of .*take 2: 16 bytes .*asked for 8 bytes of direct words"),
        ((3, 0, 3), "record 3 of .*take 2: 16 bytes .*asked for 24 bytes of direct words"),
        ((3, 1, 0, 2), "record 2 of .*end of step .*asked for 8 bytes"),
        ((0,), "record 1 of .*take 1: 24 bytes .*asked for the end of a step"),
        ((3, 0, 2, 1), "record 4 of .*the journal ends there"),
    ):
        with pytest.raises(ReplayMismatch, match=said), ev.replay(path):
            program(*takes)
    with ev.replay(path):
        program(3, 0, 2)


def test_after_a_difference_nothing_is_drawn(tmp_path):
    path = tmp_path / "run.evj"
    recorded(path)
    with pytest.raises(ReplayMismatch), ev.replay(path) as source:
        ev.journal(path)
        with pytest.raises(ReplayMismatch, match="record 1 of"):
            keys.draw_record()
        for attempt in (keys.draw_record, lambda: ev.dropout(torch.ones(3), 0.5)):
            with pytest.raises(ReplayMismatch, match="record 1 of"):
                attempt()
        for attempt in (lambda: source.direct_words(1), ev.step):
            with pytest.raises(ReplayMismatch, match="record 1 of"):
                attempt()
    assert keys.watched_by() == ""


def test_draws_before_the_journal_begins_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "run.evj"
    recorded(path)
    monkeypatch.setenv("EVERETT_REPLAY", str(path))
    monkeypatch.setattr("everett_cuda.replaying._current", None)
    source = ev.open("sim:seed=7")
    for attempt in (keys.draw_record, lambda: source.direct_words(1)):
        with pytest.raises(ReplayMismatch, match="before the program called ev.journal"):
            attempt()
    ev.step()  # not in the journal either
    train(path)
    with pytest.raises(ReplayMismatch, match="the journal ends there"):
        keys.draw_record()
    ev.close()
    with pytest.raises(ReplayMismatch, match="the journal ends there"):
        ev.open("sim:seed=7")


def test_a_forked_child_has_no_part_in_a_replay(tmp_path):
    path = tmp_path / "run.evj"
    recorded(path)
    with ev.replay(path):
        for attempt in (keys.draw_record, lambda: ev.current_source().direct_words(1), lambda: ev.journal(path)):
            assert in_forked_child(attempt).startswith("ForkedError")
        train(path)


def test_group_keys_are_recorded_and_compared(tmp_path):
    path = tmp_path / "run.evj"

    def program(first, second):
        ev.open("sim:seed=7")
        made = []
        with ev.journal(path):
            for key in (first, second):
                memory = np.frombuffer(bytearray(key), np.uint8)
                keys.set_group_key(True, memory.ctypes.data)
                made += [keys.draw_record(world=True), keys.draw_record()]
                ev.step()
        ev.close()
        return made

    a, b, c = (bytes([i]) * 32 for i in (1, 2, 3))
    first = program(a, b)
    groups = [r for r in ev.read_journal(path) if r.type == journal_file.GROUP]
    assert [(r.data, journal_file.FAMILIES[r.family]) for r in groups] == [(a, "world"), (b, "world")]
    with ev.replay(path):
        assert program(a, b) == first
    with (
        pytest.raises(ReplayMismatch, match=f"record {groups[1].index} of .*the program asked for another key"),
        ev.replay(path),
    ):
        program(a, c)
    with (
        pytest.raises(ReplayMismatch, match=f"record {groups[0].index} of .*the program asked for another key"),
        ev.replay(path),
    ):
        program(c, b)


def test_a_graphs_key_left_out_is_named(tmp_path):
    path, memory = tmp_path / "run.evj", np.zeros(32, np.uint8)
    ev.open("sim:seed=7")
    with ev.journal(path):
        keys.draw_graph_key(memory.ctypes.data)
        ev.step()
    with pytest.raises(ReplayMismatch, match="record 1 of .*a fresh key for captured graphs; .*the end of a step"):
        with ev.replay(path):
            ev.step()
    with pytest.raises(ReplayMismatch, match="record 2 of .*end of step .*asked for a key for captured graphs"):
        with ev.replay(path):
            for _ in range(2):
                keys.draw_graph_key(memory.ctypes.data)


# --- elsewhere ----------------------------------------------------------------------------------------------------


def altered(path, to, **facts):
    """A copy of a journal in clear with another header."""
    data = path.read_bytes()
    reader = ev.read_journal(path)
    to.write_bytes(journal_file.encode_header({**reader.header, **facts}) + data[reader.good_bytes :])
    return to


@pytest.mark.parametrize(
    "fact, value, said, allowed",
    [
        ("torch", "2.5.0", "torch: recorded 2.5.0, here .*--allow-versions", True),
        ("everett_cuda", "0.0.1", "everett_cuda: recorded 0.0.1", True),
        ("stream_law", 2, "stream_law: recorded 2, here 1", False),
        ("default_dtype", "torch.float64", "default_dtype: .*set_default_dtype", False),
        ("world_size", 2, "world_size: recorded 2, here 1", False),
        ("rank", 1, "rank: recorded 1, here 0", False),
    ],
)
def test_another_environment_is_refused_before_the_first_draw(tmp_path, fact, value, said, allowed):
    path = tmp_path / "run.evj"
    first = recorded(path)
    other = altered(path, tmp_path / "other.evj", **{fact: value})
    with pytest.raises(JournalError, match=said), ev.replay(other):
        raise AssertionError("not reached")
    if not allowed:
        with pytest.raises(JournalError, match=said), ev.replay(other, allow_versions=True):
            raise AssertionError("not reached")
    else:
        with pytest.warns(UserWarning, match=fact), ev.replay(other, allow_versions=True):
            assert equal(first, train(other))


def test_what_only_rounds_otherwise_is_a_warning(tmp_path):
    path = tmp_path / "run.evj"
    recorded(path)
    with pytest.warns(UserWarning, match="threads: recorded 99"), ev.replay(altered(path, tmp_path / "o.evj", threads=99)):
        train(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with ev.replay(path):
            train(path)


def test_files_that_cannot_be_replayed(tmp_path):
    path = tmp_path / "run.evj"
    with pytest.raises(JournalError, match="No such file"), ev.replay(path):
        pass
    path.write_bytes(b"something else")
    with pytest.raises(JournalError, match="not a journal"), ev.replay(path):
        pass
    recorded(tmp_path / "e.evj", key=USER_KEY)
    with pytest.raises(JournalError, match="is encrypted"), ev.replay(tmp_path / "e.evj"):
        pass
    with pytest.raises(JournalError, match="not the key"), ev.replay(tmp_path / "e.evj", USER_KEY[1:]):
        pass
    with pytest.raises(SourceNotOpen):
        ev.current_source()


# --- the command --------------------------------------------------------------------------------------------------

PROGRAM = """
import os, sys, torch, everett_cuda as ev
torch.set_num_threads(1)
ev.open("sim:seed=7")
ev.journal(sys.argv[1])
model = ev.convert(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1)))
optimizer = torch.optim.AdamW(model.parameters())
for i in range(5):
    ev.add_noise(model(torch.randn(4, 8)), 0.1).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if i == 3 and len(sys.argv) > 3:
        sys.exit(0)
torch.save(model.state_dict(), sys.argv[2])
"""


def test_the_command_replays_a_program(tmp_path):
    path, program = tmp_path / "run.evj", tmp_path / "train.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(program), str(path)]
    subprocess.run([*command, str(tmp_path / "a.pt")], check=True, env=environment, timeout=100)
    process = everett_process("replay", path, "--", *command, tmp_path / "b.pt")
    out, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert "records of" in said and ": all of it (the program ended)" in said
    a, b = torch.load(tmp_path / "a.pt"), torch.load(tmp_path / "b.pt")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    process = everett_process("replay", path, "--", *command, tmp_path / "c.pt", "early")
    out, said = process.communicate(timeout=100)
    assert process.returncode == 1 and "NOT ALL OF IT" in said and not (tmp_path / "c.pt").exists()


def test_the_command_says_what_is_wrong_before_it_starts_anything(tmp_path):
    path, started = tmp_path / "run.evj", tmp_path / "started"
    touch = ("touch", started)
    assert everett("replay", path, "--", *touch).exit_code == 1
    recorded(path, key=USER_KEY)
    result = everett("replay", path, "--", *touch)
    assert result.exit_code == 1 and "is encrypted" in result.stderr
    wrong = tmp_path / "wrong"
    wrong.write_bytes(bytes(32))
    wrong.chmod(0o600)
    result = everett("replay", path, "--key-file", wrong, "--", *touch)
    assert result.exit_code == 1 and "not the key" in result.stderr and not started.exists()
    assert everett("replay", path).exit_code == 2
    right = tmp_path / "right"
    right.write_bytes(USER_KEY)
    right.chmod(0o600)
    result = everett("replay", path, "--key-file", right, "--", *touch)
    assert result.exit_code == 1 and "nothing was replayed" in result.stderr and started.exists()
    assert everett("replay", path, "--key-file", right, "--", "sh", "-c", "exit 7").exit_code == 7
    assert everett("replay", path, "--key-file", right, "--", tmp_path / "none").exit_code == 2


def test_the_command_shows_a_journal(tmp_path):
    path = tmp_path / "run.evj"
    recorded(path)
    shown = everett("journal", path)
    assert shown.exit_code == 0 and "NOT QUANTUM (simulated)" in shown.stdout and "closed after" in shown.stdout
    listed = everett("journal", path, "--records").stdout
    document = json.loads(everett("journal", path, "--json").stdout)
    count = sum(document["records"].values())
    assert len(listed.splitlines()) == len(shown.stdout.splitlines()) + count
    assert document["closed"] and document["good_bytes"] == path.stat().st_size
    for record in ev.read_journal(path):
        if record.type == journal_file.KEY:
            assert record.data.hex() not in listed
    path.write_bytes(path.read_bytes()[:-1])
    torn = everett("journal", path)
    assert torn.exit_code == 1 and "is torn" in torn.stdout
    assert everett("journal", Path("/dev/null")).exit_code == 1
