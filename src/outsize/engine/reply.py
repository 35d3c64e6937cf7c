"""An answer and its account; what a prompt is while it is answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

from outsize.engine.request import Counts, Request
from outsize.sampling.logprobs import TokenLogprob
from outsize.system.memory import peak


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
    budget_bytes: int  # what --memory allows it
    bytes_read: int  # of weights, since the model was opened
    bytes_per_token: int  # read from disk for each token after the first
    hit_rate: float  # of the records asked for, those that did not have to be read
    waited_s: float  # the computation stood still for reads
    disk_bytes_per_s: int  # over the whole reply
    drafted: int  # draft tokens that were checked
    accepted: int  # of them
    accepted_per_position: tuple[float, ...]  # of draft token 1, 2, ...: the share accepted
    tokens_per_step: float
    step_s: float  # a step after the prompt's, on average
    experts: (
        Mapping[str, float] | None
    )  # what became of each request for an expert; None: a dense model
    model: str
    finish: str  # "stop", "length" or "cancelled"
    threads: (
        float  # that a step computed with, on average: fewer than there are where others were busy
    )
    options: Mapping[str, object]
    cached_reads: bool = (
        False  # through the page cache: the disk's file system refuses direct reads
    )
    reasoning: str = ""  # what the model thought before it answered, where it says that apart
    reused_tokens: int = 0  # of the prompt, that were not computed again
    reused_bytes_read: int = 0  # of keys and values, from the prefix cache on disk
    kept_bytes_written: int = 0  # of keys and values, to it
    logprobs: tuple[TokenLogprob, ...] = ()  # of the reply's tokens, if they were asked for
    lossy: bool = False  # tokens of the prompt may have skipped layers: not the model's own answer
    computed_share: float = 1.0  # of (token, layer) pairs; below 1, some skipped layers
    width: float = 1.0  # of nested experts' feed-forwards, what was computed on average

    def __str__(self) -> str:
        return self.text

    def to_json(self) -> dict[str, object]:
        made = {name: getattr(self, name) for name in self.__slots__}
        return made | {"logprobs": [asdict(one) for one in self.logprobs]}


@dataclass(frozen=True, slots=True)
class Score:
    """A text's tokens, and the log-probability in nats of each after the first."""

    tokens: list[int]
    logprobs: list[float]


class Usage(NamedTuple):
    """When a request began, and the counters of the model's reads then and now."""

    started: float
    before: Counts
    after: Counts
    cached_reads: bool = False  # through the page cache


def account(request: Request, model: str, options: Mapping[str, object], usage: Usage) -> Reply:
    """The reply of a run that has ended, or was interrupted."""
    started, before, after, cached_reads = usage
    new, first = len(request.seq.new_tokens), (request.first_s or started) - started
    later = request.end_s - (request.first_s or request.end_s)
    total, took = after.total - before.total, first + later
    experts = after.experts - before.experts
    return Reply(
        text=request.text,
        prompt_tokens=request.seq.num_prompt,
        new_tokens=new,
        first_token_s=round(first, 4),
        tokens_per_s=round((new - 1) / later, 3) if new > 1 and later > 0 else 0.0,
        prefill_tokens_per_s=round((request.seq.num_prompt - request.cached) / first, 3)
        if first > 0
        else 0.0,
        peak_memory_bytes=peak(),
        budget_bytes=int(str(options["memory"])),
        bytes_read=after.total.bytes_read,
        bytes_per_token=(after.total.bytes_read - request.first_read) // (new - 1)
        if new > 1
        else 0,
        hit_rate=round(total.hit_rate, 4),
        waited_s=round(total.waited_s, 4),
        disk_bytes_per_s=round(total.bytes_read / took) if took > 0 else 0,
        drafted=request.drafts.drafted,
        accepted=request.drafts.accepted,
        accepted_per_position=tuple(
            round(good / tried, 4) for tried, good in request.drafts.by_position
        ),
        tokens_per_step=round((new - 1) / request.drafts.steps, 4) if request.drafts.steps else 0.0,
        step_s=round(later / request.drafts.steps, 5) if request.drafts.steps else 0.0,
        experts=experts.to_json() if experts.hits + experts.misses else None,
        model=model,
        finish=request.seq.finish or "cancelled",
        threads=round((after.threads - before.threads) / max(1, after.steps - before.steps), 2),
        options=options,
        cached_reads=cached_reads,
        reasoning=request.stream.reasoning,
        reused_tokens=request.cached,
        reused_bytes_read=request.traffic.read,
        kept_bytes_written=request.traffic.written,
        logprobs=tuple(request.logprobs),
        lossy=request.is_lazy
        or options["kv"] == "int8"
        or "lossy" in str(options["neurons"])
        or "layers_off" in options,
        computed_share=round(request.computed, 4),
        width=1.0 if request.seq.width is None else round(request.seq.width.executed, 4),
    )
