"""Whether a recording holds the keys and words that a run will draw, asked before the run and not in its middle."""

from ..errors import SourceExhausted
from ..health import UNIT_BYTES
from ..source import Source

BLOCK_BYTES = 32  # a key; four direct words


def raw_bytes_needed(blocks: int, raw_bytes_per_block: int) -> int:
    """Raw bytes that give so many conditioned blocks: whole units, and one more that proves the last."""
    return (-(-blocks * raw_bytes_per_block // UNIT_BYTES) + 1) * UNIT_BYTES


def check_recording(source: Source, keys: int, words: int) -> None:
    """Raises SourceExhausted when the recording behind `source` is too short for `keys` and `words` of 64 bits.

    Sources without an end (devices, the simulated one, a recording with loop=1) pass.
    """
    recorded = getattr(source.driver, "recorded_bytes", None)
    if recorded is None or source.driver.loop:
        return
    needed = raw_bytes_needed(keys + -(-8 * words // BLOCK_BYTES), source.status().raw_bytes_per_block)
    if recorded < needed:
        raise SourceExhausted(
            f"{source.uri} is too short for this run: {recorded:,} bytes there, {needed:,} needed for {keys:,} keys "
            f"and {words:,} direct words, and bits are never used twice. Give fewer --steps, or a longer recording."
        )
