"""What follows the keys and so must hear of steps and of the end: things that keep secrets of their own on a GPU, the
policy of several processes, and ledgers.

They come after the keys in the order of files, so the keys know them only as `Follower`s.
"""

from typing import Protocol


class Follower(Protocol):
    """A GPU's key for graphs or its direct words, the keys that processes share, or a ledger."""

    def end_step(self, by_optimizer: bool) -> None:
        """A step ended, outside backwards and captures; by_optimizer: without the user's asking."""

    def forget(self) -> None:
        """The source was closed: secrets must go."""

    def status(self) -> str:
        """One line for `ev.status()`; empty where there is nothing to tell."""


_all: list[Follower] = []


def follow(follower: Follower, first: bool = False) -> None:
    """From now on `follower` hears of every step's end and of the source's closing; first: before all others."""
    _all.insert(0 if first else len(_all), follower)


def unfollow(follower: Follower) -> None:
    """From now on `follower` hears of nothing."""
    _all.remove(follower)


def end_step(by_optimizer: bool) -> None:
    for follower in _all:
        follower.end_step(by_optimizer)


def forget() -> None:
    for follower in _all:
        follower.forget()


def status() -> tuple[str, ...]:
    """What they tell of themselves, a line each."""
    return tuple(line for follower in _all if (line := follower.status()))
