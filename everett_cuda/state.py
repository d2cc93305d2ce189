"""`ev.state_dict()` and `ev.load_state_dict()`: what a checkpoint needs of this package, one rank's, in plain Python types.

Keys are not in it, neither future ones (they are fresh from the source when they are needed) nor the ratchet's; the draws
themselves are named by torch's generators, whose states belong into the checkpoint anyway. What is: counters, so that
tickets and steps go on; settings; and how far the journal had got.
"""

from pathlib import Path

from . import __version__, environment, journaling, keys, session
from .errors import EverettError, JournalError
from .reference import LAW_VERSION
from .replayed_source import ReplayedSource

FORMAT = 1
_PRESENT_ONLY = ("tape_entries", "tape_evicted", "stretched_in_a_row")  # of this process, not of the run


def state_dict() -> dict:
    """A dict of strings, numbers, dicts and None, for torch.save; each rank saves its own. SourceNotOpen without one."""
    source = session.current_source().status()
    rank, world_size = environment.rank_and_world_size()
    now = journaling.current()
    return {
        "format": FORMAT,
        "everett_cuda": __version__,
        "stream_law": LAW_VERSION,
        "rank": rank,
        "world_size": world_size,
        "source": source.label,
        "settings": keys.settings(),
        "counters": {name: n for name, n in keys.counters().items() if name not in _PRESENT_ONLY},
        "journal": None if now is None else now.position,
    }


def load_state_dict(state: dict, *, journal_key: bytes | None = None) -> None:
    """Counters and settings go on from a `state_dict`; call it with the source open, before the first draw.

    When a journal was being written: the next segment beside it is begun (run.1.evj), with journal_key if it was encrypted.
    When one is being written now, it goes on if it holds no draw yet, else its next segment is begun. Draws made meanwhile
    are in none of them: they belong to the part of the run that the checkpoint undoes.

    Raises EverettError for the state of another rank, number of ranks, or stream law; ValueError for what is no state.
    """
    _check(state)
    counts = {**dict.fromkeys(_PRESENT_ONLY, 0), **state["counters"]}
    source = session.current_source()
    wanted = state["journal"]
    now = journaling.current()
    if now is None and wanted is not None and wanted["encrypted"] and journal_key is None:
        if not isinstance(source, ReplayedSource):
            raise JournalError(
                f"{wanted['path']} was encrypted, and its next segment must be too: give journal_key, or call "
                "ev.journal(...) before ev.load_state_dict"
            )
    settings = state["settings"]
    keys.set_freshness(settings["freshness"])
    keys.configure(**{name: settings[name] for name in ("on_starved", "max_stretch", "timeout_s")})
    if isinstance(source, ReplayedSource):
        # A recorded program that wrote no journal when it loaded left no record of it.
        if source.begun or wanted is not None:
            source.load(counts)
        else:
            keys.continue_from(counts)
        return
    if now is None and wanted is not None:
        path, segment = journaling.next_segment(Path(wanted["path"]), wanted["segment"])
        now = journaling.begin(path, journal_key if wanted["encrypted"] else None, segment, wanted)
    if now is None:
        keys.continue_from(counts)
    else:
        now.continue_from(counts, {name: state[name] for name in ("rank", "world_size", "journal", "source")})


def _check(state: dict) -> None:
    expected = {"format", "rank", "world_size", "stream_law", "settings", "counters", "journal"}
    if not isinstance(state, dict) or not expected <= state.keys():
        raise ValueError("not a state of everett_cuda: pass what ev.state_dict() gave, each rank its own")
    if state["format"] != FORMAT:
        raise EverettError(f"the state has format {state['format']}, and this everett_cuda reads format {FORMAT}")
    rank, world_size = environment.rank_and_world_size()
    if state["world_size"] != world_size:
        raise EverettError(
            f"the state was saved by one of {state['world_size']} ranks, and here are {world_size}: who draws what would "
            "not be the same. Resume on as many ranks, or begin anew: leave ev.load_state_dict out, and counters start at 0."
        )
    if state["rank"] != rank:
        raise EverettError(f"the state is that of rank {state['rank']}, and this is rank {rank}: each rank loads its own")
    if state["stream_law"] != LAW_VERSION:
        raise EverettError(
            f"the state was saved under stream law {state['stream_law']}, and this everett_cuda has law {LAW_VERSION}: "
            "equal keys would not give equal bits"
        )
