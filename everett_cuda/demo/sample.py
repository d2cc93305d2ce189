"""Characters chosen by direct bits: each one by one 64-bit word of the source, unexpanded, in exact integers."""

from dataclasses import dataclass

import numpy as np
import torch

from ..source import Source

WEIGHT_BITS = 53
WORD_TIMEOUT_S = 60.0


def weights_of(logits: np.ndarray) -> list[int]:
    """Integer weights W = floor(2^53 * softmax(logits)); logits of shape (n,), -inf gives 0. The softmax is in float64.

    Raises ValueError for NaN, +inf or no finite logit: there is no distribution to draw from.
    """
    logits = np.asarray(logits, dtype=np.float64)
    top = logits.max()
    if not np.isfinite(top):  # NaN spreads to the maximum
        raise ValueError("logits: no distribution, since one is NaN or +inf, or all are -inf")
    share = np.exp(logits - top)
    return [int(w) for w in np.floor(share / share.sum() * 2.0**WEIGHT_BITS)]


def choose(weights: list[int], word: int) -> int:
    """The first i with W_0 + ... + W_i > floor(u * Z / 2^64), Z the sum of the weights: inverse CDF in exact integers.

    weights: whole numbers from 0 on, with Z from 1 to 2^64; word: u, a uniform 64-bit word. The words that choose i lie
    side by side and number W_i * 2^64 / Z to within one, so its probability is W_i / Z to within 2^-64, and a weight of
    0 is never chosen. Raises ValueError outside these ranges.
    """
    total = sum(weights)
    if min(weights, default=0) < 0 or not 0 < total <= 2**64:
        raise ValueError(f"weights: none below 0 and a sum from 1 to 2^64, got a sum of {total}")
    if not 0 <= word < 2**64:
        raise ValueError(f"word: 64 bits, got {word}")
    place = (word * total) >> 64
    for i, weight in enumerate(weights):
        place -= weight
        if place < 0:
            return i
    raise AssertionError("place < total, so some weight holds it")


@dataclass(frozen=True)
class Line:
    """text without its newline; bits: direct bits that chose it, 64 for each character and for the newline."""

    text: str
    bits: int


@torch.inference_mode()
def sample_line(model: torch.nn.Module, characters: str, source: Source, longest: int, temperature: float) -> Line:
    """One line of at most `longest` characters, each chosen by one direct word; a newline ends it.

    The model reads a newline first, and all but letters have weight 0 in the first place, so that there is a line of
    text to see and not one of blanks or asterisks. Puts the model into eval mode. Raises what `Source.direct_words`
    raises; Starved after 60 s for a word.
    """
    model.eval()
    newline = characters.index("\n")
    no_letters = [i for i, character in enumerate(characters) if not character.isalpha()]
    numbers = [newline]
    for taken in range(1, longest + 1):
        window = torch.tensor([numbers[-model.shape.context :]])
        logits = model(window)[0, -1].double() / temperature
        if taken == 1:
            logits[no_letters] = -torch.inf
        word = int(source.direct_words(1, WORD_TIMEOUT_S)[0])
        chosen = choose(weights_of(logits.numpy()), word)
        if chosen == newline:
            break
        numbers.append(chosen)
    return Line("".join(characters[i] for i in numbers[1:]), 64 * taken)
