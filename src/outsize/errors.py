"""Everything outsize raises on purpose. A message is one sentence with the numbers and the way out.

OutsizeError                    exit status 1: it could not be done
+-- UserError (ValueError)      exit status 2: what was asked for cannot be
|   +-- OptionError             a flag, keyword or setting
|   +-- SourceError             no such model, or it is not one
|   +-- CheckpointError         a foreign file is damaged or lies about itself
|   +-- UnsupportedError        a sound file of a kind we do not run
|   +-- TemplateError           a chat template that fails or runs wild
|   +-- ContextError            more tokens than the context holds
|   +-- TraceError              a recorded routing that is not one, or of another model
|   +-- BudgetError             the memory given is less than the least that works
|   +-- AdapterError            an adapter that is damaged, or of another model
|   +-- DataError               training text that is empty or malformed
+-- PackError                   a pack is damaged, or of another version or layout
+-- ReadError                   the disk, asked again and again, did not give a record
+-- CapacityError               more records wanted at once than there are slots for
+-- DiskFullError               not enough room to write
+-- FetchError                  the network, or an index, said no
+-- HashError                   what came is not what was asked for
+-- ClosedError                 a model used after it was closed, or that must be opened again
+-- BusyError                   asked from within its own step, or a conversation by two at once
+-- QueueFullError              more requests wait already than may
+-- UnavailableError            the model is being loaded, or the server ends
+-- PeerError                   another rank was lost, or is not one of ours
+-- ForkError                   a model used in a process that was forked after it was opened
"""

from __future__ import annotations


class OutsizeError(Exception):
    """The root: catch this to catch everything outsize raises on purpose."""

    exit_status = 1


class UserError(OutsizeError, ValueError):
    """What was asked for cannot be; the message says what can."""

    exit_status = 2


class OptionError(UserError):
    """A flag, keyword or setting is unknown or out of range."""


class SourceError(UserError):
    """The model named is not there, or is not a model."""


class CheckpointError(UserError):
    """A foreign file is damaged, truncated or lies about itself."""


class UnsupportedError(UserError):
    """A sound file of an architecture, type or tokenizer that outsize does not run."""


class TemplateError(UserError):
    """A chat template failed, or ran past its limits."""


class ContextError(UserError):
    """The prompt does not fit the context."""


class TraceError(UserError):
    """A trace of routing is malformed, or does not fit what it is used for."""


class BudgetError(UserError):
    """The memory given is less than the least that works."""


class AdapterError(UserError):
    """An adapter is damaged, or does not fit the model it is to change."""


class DataError(UserError):
    """Training text is empty or malformed."""


class PackError(OutsizeError):
    """A pack is damaged, or was made by another version or for another machine."""


class ReadError(OutsizeError):
    """A record could not be read from its disk."""


class CapacityError(OutsizeError):
    """More records were wanted at once than there are slots for."""


class DiskFullError(OutsizeError):
    """There is not enough room on the disk."""


class FetchError(OutsizeError):
    """A model could not be fetched."""


class HashError(OutsizeError):
    """A fetched file is not the one asked for."""


class ClosedError(OutsizeError):
    """A model was used after it was closed, or must be opened again."""


class BusyError(OutsizeError):
    """A model was asked from within one of its own steps, or a conversation by two callers at once."""


class ForkError(OutsizeError):
    """A model was used in a process that was forked after it was opened: it has none of its threads."""


class PeerError(OutsizeError):
    """Another rank hung up, is silent, sent what it should not, or is not one of ours; `rank` if known."""

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class QueueFullError(OutsizeError):
    """More requests wait already than may; `retry_after_s` says when to ask again."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(OutsizeError):
    """There is no model to ask at the moment: it is being loaded (`progress`, 0 to 1), or the server ends."""

    def __init__(
        self, message: str, retry_after_s: float = 1.0, progress: float | None = None
    ) -> None:
        super().__init__(message)
        self.retry_after_s, self.progress = retry_after_s, progress
