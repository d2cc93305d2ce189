"""Every error this package raises on purpose. Each message says what happened, which rule it broke and what to try."""


class EverettError(RuntimeError):
    """Base of all errors raised by everett_cuda (argument mistakes are plain ValueError or TypeError)."""


class SourceNotOpen(EverettError):
    """An op asked for bits before any source was opened."""


class SourceError(EverettError):
    """The source cannot be opened, was closed, or broke while it was being read."""


class UnknownScheme(SourceError, ValueError):
    """The URI names no driver that is installed."""


class BadParameter(SourceError, ValueError):
    """A source URI is malformed, or one of its parameters is unknown or out of range."""


class DeviceNotFound(SourceError):
    """No device that the URI could mean is attached."""


class SourceExhausted(SourceError):
    """A recording has no bytes left; it never wraps around unless `loop=1` was given."""


class HealthAlarm(EverettError):
    """A health test failed. Nothing is handed out until an operator opens the source again."""


class StartupTestFailed(HealthAlarm):
    """The source failed the start-up test, so it never handed out a byte."""


class Starved(EverettError):
    """No fresh key arrived in the time, or within the number of stretched keys, that the policy allows."""


class ForkedError(EverettError):
    """A forked child touched its parent's source or keys; it must open a source of its own."""


class RNGDesync(EverettError):
    """Ranks that must have the same random numbers have not: their torch RNG states or their steps differ."""


class NoDistribution(EverettError, ValueError):
    """Weights that are no distribution: NaN, infinite or negative ones, or too few above 0."""


class JournalError(EverettError):
    """A journal cannot be written, so nothing is drawn; or it cannot be read, or not be replayed here."""


class ReplayMismatch(EverettError):
    """A replayed program asked for something else than what its journal holds next."""


class ReplayMiss(EverettError):
    """A recomputation inside a backward asked for a key that no forward drew, or that the tape has dropped."""


class LedgerError(EverettError):
    """A ledger cannot be written or read, or a key to sign it with cannot be used."""
