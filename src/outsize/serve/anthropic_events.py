"""A reply as Anthropic sends it: a message of content blocks, whole or as server-sent events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import cast

from outsize.serve import errors
from outsize.serve.errors import ApiError
from outsize.serve.events import CallArguments, CallStart, End, Event, Part
from outsize.serve.messages import cut_call, object_of
from outsize.serve.openai_common import account
from outsize.serve.sse import SSE, data

Frame = dict[str, object]
REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
TEXT, THINKING, TOOL = "text", "thinking", "tool_use"


class Frames:
    """The events of one message, each as a dict of which "type" is the event's name."""

    def __init__(
        self, id: str, model: str, prompt_tokens: int, shows_thinking: bool = True
    ) -> None:
        self._id, self._model, self._prompt_tokens = id, model, prompt_tokens
        self._shows_thinking = shows_thinking
        self._index, self._open = 0, ""  # of the block that is being written, and its type

    def start(self) -> Frame:
        usage = {
            "input_tokens": self._prompt_tokens, "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0, "output_tokens": 0,
        }  # fmt: skip
        message: Frame = {
            "id": self._id, "type": "message", "role": "assistant", "model": self._model,
            "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage,
        }  # fmt: skip
        return {"type": "message_start", "message": message}

    def of(self, event: Event) -> Iterator[Frame]:
        match event:
            case Part(text=text, reasoning=True) if text:
                yield from self._in(THINKING)
                if self._shows_thinking:
                    yield self._delta({"type": "thinking_delta", "thinking": text})
            case Part(text=text) if text:
                yield from self._in(TEXT)
                yield self._delta({"type": "text_delta", "text": text})
            case CallStart():
                yield from self._stop()
                yield self._begin(TOOL, {"id": event.id, "name": event.name, "input": {}})
            case CallArguments(text=text) if text:
                yield self._delta({"type": "input_json_delta", "partial_json": text})
            case End():
                yield from self._stop()
                yield self._last(event)

    def end(self) -> Frame:
        return {"type": "message_stop"}

    def _in(self, kind: str) -> Iterator[Frame]:
        """Go on with a block of a type, or begin one."""
        if self._open == kind:
            return
        yield from self._stop()
        empty: Frame = {"thinking": "", "signature": ""} if kind == THINKING else {"text": ""}
        yield self._begin(kind, empty)

    def _begin(self, kind: str, empty: Frame) -> Frame:
        self._open = kind
        block = {"type": kind, **empty}
        return {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: Frame) -> Frame:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _stop(self) -> Iterator[Frame]:
        if not self._open:
            return
        if self._open == THINKING:  # clients wait for a signature; there is nothing to be signed
            yield self._delta({"type": "signature_delta", "signature": ""})
        yield {"type": "content_block_stop", "index": self._index}
        self._index, self._open = self._index + 1, ""

    def _last(self, end: End) -> Frame:
        by_string = end.reason == "stop" and end.stop is not None
        reason = "stop_sequence" if by_string else REASONS[end.reason]
        delta = {"stop_reason": reason, "stop_sequence": end.stop if by_string else None}
        return {"type": "message_delta", "delta": delta, "usage": _usage(end)}


def _usage(end: End) -> Frame:
    """What was computed, and what was known: the prompt is the sum of both."""
    reply, cached = end.reply, end.reply.reused_tokens
    return {
        "input_tokens": reply.prompt_tokens - cached, "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached, "output_tokens": reply.new_tokens, "outsize": account([reply]),
    }  # fmt: skip


def whole(frames: Iterable[Frame]) -> Frame:
    """The message that frames make, as their reader puts it together."""
    message: Frame = {}
    blocks, written = list[Frame](), list[str]()
    for frame in frames:
        if frame["type"] == "message_start":
            message = {**cast("Frame", frame["message"])}
        elif frame["type"] == "content_block_start":
            blocks.append({**cast("Frame", frame["content_block"])})
            written = []
        elif frame["type"] == "content_block_delta":
            _join(blocks[-1], cast("Frame", frame["delta"]), written)
        elif frame["type"] == "content_block_stop" and blocks[-1]["type"] == TOOL:
            blocks[-1] = _called(blocks[-1], "".join(written))
        elif frame["type"] == "message_delta":
            message |= cast("Frame", frame["delta"])
            message["usage"] = frame["usage"]
    return {**message, "content": blocks}


def _join(block: Frame, delta: Mapping[str, object], written: list[str]) -> None:
    if delta["type"] == "input_json_delta":
        written.append(str(delta["partial_json"]))
        return
    name = str(delta["type"]).removesuffix("_delta")
    block[name] = f"{block[name]}{delta[name]}"


def _called(block: Frame, arguments: str) -> Frame:
    """A call, or the text of one that was cut in the middle."""
    made = object_of(arguments)
    if made is None:
        return {"type": TEXT, "text": cut_call(str(block["name"]), arguments)}
    return {**block, "input": made}


class Writer:
    """The frames as server-sent events."""

    media_type = SSE

    def __init__(self, frames: Frames, request_id: str) -> None:
        self._frames, self._request_id = frames, request_id

    def start(self) -> bytes:
        return _sent(self._frames.start())

    def write(self, event: Event) -> bytes:
        return b"".join(_sent(frame) for frame in self._frames.of(event))

    def end(self) -> bytes:
        return _sent(self._frames.end())

    def silence(self) -> bytes:
        return _sent({"type": "ping"})

    def failed(self, error: ApiError) -> bytes:
        return _sent(errors.body(error, errors.ANTHROPIC, self._request_id))


def _sent(frame: Frame) -> bytes:
    return data(frame, str(frame["type"]))
