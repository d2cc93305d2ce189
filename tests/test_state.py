"""Checkpoints: counters, settings and journals go on; keys are never in them, and others' states are refused."""

import io
import json
from pathlib import Path

import pytest
import torch

import everett_cuda as ev
from everett_cuda import journal_file, journaling, keys
from everett_cuda.errors import EverettError, JournalError, ReplayMismatch, SourceNotOpen

USER_KEY = bytes(range(40))


@pytest.fixture(autouse=True)
def no_source_is_left():
    yield
    ev.close()
    keys.set_freshness("op")
    keys.configure(on_starved="stretch", max_stretch=2**16, timeout_s=60.0)


def draw(n):
    return [keys.draw_record() for _ in range(n)]


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save({"ev": state}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["ev"]


def tickets(path, key=None):
    return [r.ticket for r in ev.read_journal(path, key) if r.type in (journal_file.KEY, journal_file.DRAW)]


def test_counters_and_settings_go_on():
    ev.open("sim:seed=7")
    ev.set_freshness("step")
    ev.configure(on_starved="wait", max_stretch=5, timeout_s=None)
    draw(3)
    ev.step()
    draw(2)
    state = saved_and_loaded(ev.state_dict())
    before = keys.counters()
    ev.close()
    ev.set_freshness("op")
    ev.configure(on_starved="stretch", max_stretch=9, timeout_s=1)
    ev.open("sim:seed=8")
    ev.load_state_dict(state)
    assert keys.settings() == state["settings"]
    assert (state["settings"]["freshness"], state["settings"]["timeout_s"]) == ("step", None)
    present = ("tape_entries", "tape_evicted", "stretched_in_a_row")
    assert {k: v for k, v in keys.counters().items() if k not in present} == {
        k: v for k, v in before.items() if k not in present
    }
    draw(1)
    assert keys.counters()["draws"] == before["draws"] + 1 and keys.counters()["fresh"] == before["fresh"] + 1


def test_a_state_holds_plain_types_and_no_key(tmp_path):
    ev.open("sim:seed=7")
    with ev.journal(tmp_path / "run.evj", USER_KEY) as journal:
        draw(3)
        state = ev.state_dict()
        assert state["journal"] == journal.position and state["journal"]["records"] == 4
    text = json.dumps(state)
    assert json.loads(text) == state
    for record in ev.read_journal(tmp_path / "run.evj", USER_KEY):
        if record.type == journal_file.KEY:
            assert record.data.hex() not in text and record.number.hex() not in text
    assert USER_KEY.hex() not in text


@pytest.mark.parametrize("key", [None, USER_KEY], ids=["clear", "encrypted"])
def test_a_resumed_run_writes_the_next_segment(tmp_path, key):
    path = tmp_path / "run.evj"
    ev.open("sim:seed=7")
    ev.journal(path, key)
    draw(3)
    ev.step()
    state = ev.state_dict()
    draw(2)  # lost to the crash
    ev.close()
    ev.open("sim:seed=8")
    if key:
        with pytest.raises(JournalError, match="was encrypted.*journal_key"):
            ev.load_state_dict(state)
        assert journaling.current() is None
    ev.load_state_dict(state, journal_key=key)
    now = journaling.current()
    assert now.path == tmp_path / "run.1.evj" and now.encrypted == (key is not None)
    draw(2)
    again = ev.state_dict()
    ev.close()
    assert tickets(path, key) == [1, 2, 3, 4, 5] and tickets(now.path, key) == [4, 5]
    reader = ev.read_journal(now.path, key)
    load = next(r for r in reader if r.type == journal_file.LOAD)
    assert (load.ticket, load.count) == (3, state["counters"]["boundaries"])
    assert reader.header["continues"] == state["journal"]
    ev.open("sim:seed=9")
    ev.load_state_dict(again, journal_key=key)
    assert journaling.current().path == tmp_path / "run.2.evj"


def test_a_program_that_opens_its_journal_itself_gets_no_second_one(tmp_path):
    path = tmp_path / "run.evj"
    ev.open("sim:seed=7")
    ev.journal(path)
    draw(3)
    state = ev.state_dict()
    ev.close()
    ev.open("sim:seed=7")
    journal = ev.journal(path, resume=True)
    ev.load_state_dict(state)
    assert journaling.current() is journal and journal.path.name == "run.1.evj"
    draw(1)
    ev.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.1.evj", "run.evj"]
    assert tickets(tmp_path / "run.1.evj") == [4]


def rolling_back(path):
    """Draws, saves, draws, goes back to what it saved, draws."""
    ev.open("sim:seed=7")
    ev.journal(path)
    seen = draw(2)
    ev.step()
    state = ev.state_dict()
    seen += draw(2)
    ev.step()
    ev.load_state_dict(state)
    seen += draw(3)
    ev.step()
    seen += [ev.current_source().direct_words(2).tobytes()]
    ev.close()
    return seen


def test_going_back_within_a_process_begins_a_segment_and_is_replayed(tmp_path):
    path = tmp_path / "run.evj"
    first = rolling_back(path)
    assert tickets(path) == [1, 2, 3, 4] and tickets(tmp_path / "run.1.evj") == [3, 4, 5]
    closing = list(ev.read_journal(path))[-1]
    assert json.loads(closing.data)["next"] == "run.1.evj"
    torch.manual_seed(5)
    with ev.replay(path):
        assert rolling_back(path) == first
    (tmp_path / "run.1.evj").unlink()
    with pytest.raises(JournalError, match="run.1.evj: No such file"), ev.replay(path):
        rolling_back(path)


def resumed(state, n=2):
    ev.open("sim:seed=8")
    torch.manual_seed(8)
    ev.load_state_dict(state)
    seen = draw(n)
    ev.close()
    return seen


def test_a_resumed_run_is_replayed_from_its_segment(tmp_path):
    ev.open("sim:seed=7")
    ev.journal(tmp_path / "run.evj")
    draw(3)
    state = ev.state_dict()
    ev.close()
    first = resumed(state)
    with ev.replay(tmp_path / "run.1.evj"):
        assert resumed(state) == first
    other = {**state, "counters": {**state["counters"], "draws": 2}}
    with pytest.raises(
        ReplayMismatch, match="counters continue from draw 3, .*asked for the loading of a checkpoint of draw 2"
    ):
        with ev.replay(tmp_path / "run.1.evj"):
            resumed(other)


def test_loading_without_a_journal_begins_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ev.open("sim:seed=7")
    draw(1)
    state = ev.state_dict()
    ev.load_state_dict(state)
    assert state["journal"] is None and journaling.current() is None and not list(Path().iterdir())


@pytest.mark.parametrize(
    "change, error, said",
    [
        ({"world_size": 4}, EverettError, "one of 4 ranks, and here are 1"),
        ({"rank": 1}, EverettError, "that of rank 1, and this is rank 0"),
        ({"stream_law": 2}, EverettError, "stream law 2"),
        ({"format": 9}, EverettError, "format 9"),
        ({"counters": None, "rank": None}, EverettError, "rank"),
    ],
)
def test_states_of_others_are_refused(change, error, said):
    ev.open("sim:seed=7")
    draw(1)
    before = keys.counters()
    with pytest.raises(error, match=said):
        ev.load_state_dict({**ev.state_dict(), **change})
    assert keys.counters() == before
    with pytest.raises(ValueError, match="not a state"):
        ev.load_state_dict({"model": {}})


def test_another_number_of_processes_is_seen_in_the_launchers_environment(monkeypatch):
    ev.open("sim:seed=7")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    state = ev.state_dict()
    assert (state["rank"], state["world_size"]) == (1, 2)
    ev.load_state_dict(state)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(EverettError, match="each rank loads its own"):
        ev.load_state_dict(state)


def test_without_a_source_there_is_no_state():
    with pytest.raises(SourceNotOpen):
        ev.state_dict()
