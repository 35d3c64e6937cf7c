"""How busy a service is, and what it has done so far, for metrics and people."""

from __future__ import annotations

from dataclasses import dataclass, field

from outsize.engine.batch import Batch, Live
from outsize.engine.request import Request


@dataclass(frozen=True, slots=True)
class StreamLoad:
    """One request in the batch. `state`: "waiting", "prompt", "reply", or "aside" (its keys and values are
    in a file, until there is room)."""

    number: int
    state: str
    prompt_tokens: int
    new_tokens: int
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a service is, as of the last step."""

    running: int = 0
    waiting: int = 0
    kv_tokens: int = 0  # tokens whose keys and values are stored, those of kept prompts included
    kv_room: int = 0  # and for how many there is room
    prefix_tokens: int = 0  # of prompts that have ended
    streams: tuple[StreamLoad, ...] = ()


@dataclass(slots=True)
class Totals:
    """Over all requests that have ended."""

    requests: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    by_position: list[list[int]] = field(
        default_factory=list
    )  # (drafted, accepted) by place in a draft

    def add(self, request: Request) -> None:
        self.requests += 1
        self.cancelled += request.seq.finish == "cancelled"
        self.prompt_tokens += request.seq.num_prompt
        self.cached_tokens += request.cached
        self.new_tokens += len(request.seq.new_tokens)
        self.drafted += request.drafts.drafted
        self.accepted += request.drafts.accepted
        for place, (drafted, accepted) in enumerate(request.drafts.by_position):
            if place == len(self.by_position):
                self.by_position.append([0, 0])
            self.by_position[place][0] += drafted
            self.by_position[place][1] += accepted


def load_of(batch: Batch, arrived: int) -> Load:
    """Of a batch, and so many requests that have not joined it yet."""
    running, waiting = list(batch.running), list(batch.waiting)
    return Load(
        running=len(running),
        waiting=len(waiting) + arrived,
        kv_tokens=batch.stored,
        kv_room=batch.room,
        prefix_tokens=0 if batch.prefixes is None else batch.prefixes.tokens,
        streams=tuple(_stream(live) for live in (*running, *waiting)),
    )


def _stream(live: Live) -> StreamLoad:
    request = live.request
    new = len(request.seq.tokens) - request.seq.num_prompt
    state = "waiting" if live.flow is None else "reply" if new else "prompt"
    state = state if live.swapped is None else "aside"
    stored = 0 if live.swapped is not None else request.known
    return StreamLoad(live.number, state, request.seq.num_prompt, new, stored)
