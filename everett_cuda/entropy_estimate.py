"""Min-entropy of recorded samples by the estimators of NIST SP 800-90B section 6.3 (data not assumed to be IID).

An estimate can only lower a claim (3.1.3: the assessed entropy is the least of the claim and the estimates): a good
pseudo-random generator passes them all. The estimators are in `csrc/entropy_estimate.cpp` and `entropy_predict.cpp`;
they agree with NIST's own tool, SP800-90B_EntropyAssessment, to the six digits that it prints.
"""

import concurrent.futures
import math
from dataclasses import dataclass

import numpy as np

from . import _C

ASSESSED_SAMPLES = 1_000_000  # 90B 3.1.1 asks for at least this many consecutive raw samples

NAMES = {
    "most_common_value": "most common value (6.3.1)",
    "collision": "collision (6.3.2)",
    "markov": "Markov (6.3.3)",
    "compression": "compression (6.3.4)",
    "t_tuple": "t-tuple (6.3.5)",
    "lrs": "longest repeated substring (6.3.6)",
    "multi_mcw": "multi most common in window (6.3.7)",
    "lag": "lag (6.3.8)",
    "multi_mmc": "multi Markov with counting (6.3.9)",
    "lz78y": "LZ78Y (6.3.10)",
}


@dataclass(frozen=True)
class Estimates:
    """What the estimators say of one recording.

    symbols: estimator to bits of min-entropy a symbol, of the symbols as they are. bits: the same a bit, of the symbols
    written as bits, most significant first; empty where a symbol is one bit. An estimator that needs more samples than
    there are is left out. min_entropy: bits a symbol, the least of all (a bit's times bits_per_symbol); 0 where every
    symbol is the same.
    """

    samples: int
    bits_per_symbol: int
    symbols: dict[str, float]
    bits: dict[str, float]

    @property
    def min_entropy(self) -> float:
        least = min(self.symbols.values())
        return min(least, self.bits_per_symbol * min(self.bits.values())) if self.bits else least

    @property
    def enough(self) -> bool:
        """Whether there were as many samples as SP 800-90B asks for."""
        return self.samples >= ASSESSED_SAMPLES


def _run(symbols: np.ndarray, k: int) -> dict[str, float]:
    found = _C.entropy_estimates(symbols, k)
    # Adding 0.0 turns the -0.0 of a constant source into 0.0.
    return {name: found[name] + 0.0 for name in NAMES if not math.isnan(found.get(name, math.nan))}


def estimate(samples: np.ndarray, bits_per_symbol: int = 8) -> Estimates:
    """Estimates the min-entropy of `samples`: shape (n,), dtype uint8, each below 2**bits_per_symbol (1 to 8).

    10 seconds for 1,000,000 bytes, without Python's GIL. At least 100 samples; below some 10,000 most estimators say
    little. Raises TypeError or ValueError for samples of another kind.
    """
    if not (isinstance(samples, np.ndarray) and samples.dtype == np.uint8 and samples.ndim == 1):
        raise TypeError("samples: a numpy array of uint8 with one dimension")
    if not 1 <= bits_per_symbol <= 8:
        raise ValueError(f"bits_per_symbol: from 1 to 8, got {bits_per_symbol}")
    if len(samples) < 100:
        raise ValueError(f"samples: at least 100 are needed to estimate anything, got {len(samples)}")
    seen = np.flatnonzero(np.bincount(samples, minlength=256))
    if seen[-1] >> bits_per_symbol:
        raise ValueError(f"samples: {seen[-1]} does not fit in bits_per_symbol={bits_per_symbol}")
    if len(seen) == 1:
        zero = {"most_common_value": 0.0}
        return Estimates(len(samples), bits_per_symbol, zero, {} if bits_per_symbol == 1 else zero)
    # Symbols that never occur are closed up, as NIST's tool does: the alphabet is what was seen.
    closed = np.zeros(256, np.uint8)
    closed[seen] = np.arange(len(seen))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        whole = pool.submit(_run, closed[samples], len(seen))
        if bits_per_symbol == 1:
            return Estimates(len(samples), 1, whole.result(), {})
        bits = np.unpackbits(samples).reshape(-1, 8)[:, 8 - bits_per_symbol :].reshape(-1)
        return Estimates(len(samples), bits_per_symbol, whole.result(), _run(np.ascontiguousarray(bits), 2))
