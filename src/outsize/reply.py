"""An answer and its account; what a prompt is while it is answered."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from outsize.cache.kv import KV
from outsize.decode import flow
from outsize.decode.text import Stream


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer and its account. Times in seconds, sizes in bytes."""

    text: str
    prompt_tokens: int
    new_tokens: int
    first_token_s: float
    tokens_per_s: float  # after the first token
    prefill_tokens_per_s: float
    peak_memory_bytes: int  # of the process so far
    bytes_read: int  # of weights, since the model was opened
    model: str
    finish: str  # "stop", "length" or "cancelled"
    options: Mapping[str, object]

    def __str__(self) -> str:
        return self.text

    def to_json(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Score:
    """A text's tokens, and the log-probability in nats of each after the first."""

    tokens: list[int]
    logprobs: list[float]


@dataclass(slots=True)
class Run:
    """One prompt on its way: its sequence, cache and text."""

    seq: flow.Sequence
    kv: KV
    stream: Stream
    cached: int  # prompt tokens that were in the cache
    text: str = ""
    pushed: int = 0
    first_s: float | None = None
    end_s: float = 0.0
    closed: bool = False

    def advance(self, now: float) -> str:
        """Text that became certain in the last step; none once the end was seen."""
        if self.closed:
            return ""
        self.closed = self.seq.finish is not None
        new = self.seq.new_tokens[self.pushed :]
        self.first_s = now if self.first_s is None else self.first_s
        if self.seq.finish is None or new:
            self.end_s = now
        self.pushed += len(new)
        piece = self.stream.push(new) if new else ""
        if self.seq.finish is not None:
            piece += self.stream.finish()
        if self.stream.stopped:
            self.seq.finish = "stop"
        self.text += piece
        return piece


def peak_memory() -> int:
    """The most memory this process has held so far, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
