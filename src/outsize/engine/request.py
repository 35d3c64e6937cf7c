"""One request on its way: its tokens, keys and values, decoded text, times and counters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from outsize.engine.decode import DraftCounts, Sequence
from outsize.kv.kv import KV
from outsize.options import Options
from outsize.prefix.disk import Traffic
from outsize.sampling.logprobs import TokenLogprob
from outsize.sampling.sample import Sampler
from outsize.storage.stats import IOStats
from outsize.text.detokenize import Stream


@dataclass(slots=True)
class Request:
    """One prompt on its way: its sequence, cache and text."""

    seq: Sequence
    kv: KV
    stream: Stream
    cached: int  # prompt tokens that were in the cache
    known: int  # tokens whose keys and values are in the cache, as of the last step that ended
    options: Options  # with a seed
    adapter: str | None = None
    exact: int = 0  # of `cached`, those that were computed as a prompt's are, in whole chunks
    keeps: bool = True  # its cache is its own, and may be taken apart when it has ended
    keys: list[bytes] | None = None  # names of its prompt's chunks, once they were asked for
    traffic: Traffic = field(
        default_factory=Traffic
    )  # of its prompt, with the prefix cache on disk
    sampler: Sampler | None = None  # once it runs
    drafts: DraftCounts = field(default_factory=DraftCounts)
    text: str = ""
    pushed: int = 0
    first_s: float | None = None
    first_read: int = 0  # bytes that had been read when the first token came
    end_s: float = 0.0
    closed: bool = False
    computed: float = 1.0  # share of the (token, layer) pairs so far

    @property
    def is_lazy(self) -> bool:
        """May tokens of its prompt skip layers, or parts of them? Then its keys and values are nobody
        else's."""
        return self.seq.prune is not None or self.seq.width is not None

    def advance(self, now: float, bytes_read: int = 0) -> str:
        """Text that became certain in the last step; none before the first token, nor once the end was
        seen."""
        new = self.seq.new_tokens[self.pushed :]
        if self.closed or not (new or self.seq.finish):
            return ""
        self.closed = self.seq.finish is not None
        if self.first_s is None:
            self.first_s, self.first_read = now, bytes_read
        if self.seq.finish is None or new:
            self.end_s = now
        piece = ""
        for token in new:
            piece += self.stream.push(token)
            self.pushed += 1
            if self.stream.stopped:  # what a draft brought beyond is not part of the answer
                del self.seq.tokens[self.seq.num_prompt + self.pushed :]
                break
        if self.seq.finish is not None:
            piece += self.stream.finish()
        if self.stream.stopped:
            self.seq.finish = "stop"
        self.text += piece
        return piece

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """Of the tokens whose text was looked at so far, if the options ask for it."""
        return [] if self.sampler is None else self.sampler.logprobs[: self.pushed]

    @property
    def logprobs_to_end(self) -> list[TokenLogprob]:
        """Those, and that of the token that ended the text, if one did."""
        ended = self.closed and self.seq.finish == "stop" and not self.stream.stopped
        return [] if self.sampler is None else self.sampler.logprobs[: self.pushed + ended]


class Counts(NamedTuple):
    """IOStats at one moment: of all weights, and of experts alone."""

    total: IOStats
    experts: IOStats
    steps: int = 0
    threads: int = 0  # over all steps
