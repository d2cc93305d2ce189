"""English text that ships with CPython (the help topics of `pydoc`), as character numbers and as batches."""

from dataclasses import dataclass

import torch

HELD_OUT = 0.1  # part of the text, at its end, that is never trained on


@dataclass(frozen=True)
class Text:
    """characters: the alphabet, in order; train and held_out: character numbers, shape (n,), dtype int64."""

    characters: str
    train: torch.Tensor
    held_out: torch.Tensor


def load() -> Text:
    """All help topics of this Python, joined in the order of their names: about 700,000 characters."""
    from pydoc_data.topics import topics

    joined = "\n".join(topics[name].strip("\n") for name in sorted(topics))
    characters = "".join(sorted(set(joined)))
    number = {c: i for i, c in enumerate(characters)}
    numbers = torch.tensor([number[c] for c in joined])
    split = int(len(numbers) * (1 - HELD_OUT))
    return Text(characters, numbers[:split], numbers[split:])


def batch(
    numbers: torch.Tensor, size: int, context: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """`size` windows of `context` characters and of those that follow each; both of shape (size, context), int64.

    The windows come from a generator of their own: the default generator, which both dropouts draw from, stays apart.
    """
    starts = torch.randint(len(numbers) - context, (size, 1), generator=generator)
    at = starts + torch.arange(context)
    return numbers[at], numbers[at + 1]
