"""A request to a web service and the exact reading of its answer: what is asked for, or an error, and nothing between.

Errors of reading are ValueErrors that never show any part of the answer: it may be random bytes.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass


def parse_path(text: str) -> str:
    """A file name."""
    if "\0" in text:
        raise ValueError("a file name")
    return text


def count_between(low: int, high: int) -> Callable[[str], int]:
    """A parser of whole numbers in [low, high]."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text[:10]) <= high):
            raise ValueError(f"a whole number from {low} to {high}")
        return int(text)

    return parse


def one_of(*words: str) -> Callable[[str], str]:
    """A parser of one of a few words."""

    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(" or ".join(words))
        return text

    return parse


@dataclass(frozen=True)
class Request:
    """One request of a service: `params` is the query, `body` is sent as JSON unless it is None.

    n_bytes: what a right answer decodes to. content_type: what a right answer is.
    """

    method: str
    path: str
    n_bytes: int
    params: Mapping[str, object]
    body: object = None
    content_type: str = "application/json"


def json_object(body: bytes) -> dict:
    """The object that a body of JSON is; ValueError, which shows nothing of it, for anything else."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def expect(answer: Mapping[str, object], name: str, *allowed: object) -> None:
    """ValueError unless the field `name`, where the answer has it at all, is one of `allowed`."""
    if name in answer and not any(type(answer[name]) is type(a) and answer[name] == a for a in allowed):
        raise ValueError(f"its {name} is not what was asked for")


def list_of(answer: Mapping[str, object], name: str, n: int) -> list:
    """The field `name`, which must be a list of exactly n values."""
    values = answer.get(name)
    if not isinstance(values, list):
        raise ValueError(f"it has no list {name}")
    if len(values) != n:
        raise ValueError(f"it has {len(values)} values instead of {n}")
    return values
