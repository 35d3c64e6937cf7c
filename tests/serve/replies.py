"""Replies and events as the engine makes them, for tests of what dialects make of them."""

from __future__ import annotations

from outsize.engine.reply import Reply
from outsize.serve.events import CallArguments, CallStart, End, Event, Part

CALLS: list[Event] = [
    Part(0, "Look. "),
    CallStart(0, 0, "call_1", "weather"),
    CallArguments(0, 0, '{"city": '),
    CallArguments(0, 0, '"Köln"}'),
    CallStart(0, 1, "call_2", "time"),
    CallArguments(0, 1, "{}"),
]
CUT_CALL: list[Event] = [CallStart(0, 0, "call_1", "weather"), CallArguments(0, 0, '{"ci')]
THOUGHTS: list[Event] = [
    Part(0, "Let me ", reasoning=True),
    Part(0, "see.", reasoning=True),
    Part(0, "4"),
    Part(0, "2"),
]


def reply() -> Reply:
    """Of 7 tokens to a prompt of 11, in 0.5 s and 2 s more."""
    return Reply(
        text="", prompt_tokens=11, new_tokens=7, first_token_s=0.5, tokens_per_s=3.0,
        prefill_tokens_per_s=22.0, peak_memory_bytes=0, budget_bytes=0, bytes_read=0, bytes_per_token=0,
        hit_rate=1.0, waited_s=0.0, disk_bytes_per_s=0, drafted=4, accepted=3,
        accepted_per_position=(), tokens_per_step=1.0, step_s=0.1, experts=None, model="m", finish="stop",
        threads=1.0, options={},
    )  # fmt: skip


def end(reason: str = "stop", stop: str | None = None) -> End:
    return End(0, reason, stop, reply())
