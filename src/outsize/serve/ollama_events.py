"""A reply as Ollama sends it: JSON objects, one a line, of which the last has the account."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import cast

from outsize.engine.reply import Reply
from outsize.serve import errors
from outsize.serve.errors import ApiError
from outsize.serve.events import CallArguments, CallStart, End, Event, Part
from outsize.serve.messages import cut_call, object_of
from outsize.serve.openai_common import account
from outsize.serve.sse import NDJSON

Frame = dict[str, object]
NS = 1e9
REASONS = {"stop": "stop", "length": "length", "tool_calls": "stop"}


def now() -> str:
    """The time as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


@dataclass(slots=True)
class Call:
    """A call that is being written: Ollama sends it whole, its arguments as an object."""

    start: CallStart
    written: list[str] = field(default_factory=list)


class Frames:
    """The objects of one reply. `is_chat`: as messages, else as pieces of a response."""

    def __init__(self, model: str, created: str, is_chat: bool) -> None:
        self._head: Frame = {"model": model, "created_at": created}
        self._is_chat = is_chat
        self._call: Call | None = None
        self._text = list[str]()
        self.load_s = 0.0  # that the request waited for the model
        self.logprobs: Callable[[Part], list[Frame]] | None = None  # if they were asked for
        self.context: Callable[[str], list[int]] | None = None  # the tokens of prompt and answer

    def of(self, event: Event) -> Iterator[Frame]:
        if self._call is not None and not isinstance(event, CallArguments):
            yield self._called(self._call)
            self._call = None
        match event:
            case Part():
                yield from self._part(event)
            case CallStart():
                self._call = Call(event)
            case CallArguments(text=text) if self._call is not None:
                self._call.written.append(text)
            case End():
                yield self.last(REASONS[event.reason], self._account(event.reply))

    def _part(self, part: Part) -> Iterator[Frame]:
        told = self.logprobs(part) if self.logprobs and part.tokens else []
        more: Frame = {"logprobs": told} if told else {}
        if not part.reasoning:
            self._text.append(part.text)
        if part.text or more:
            yield self.frame("thinking" if part.reasoning else "text", part.text, more)

    def _account(self, reply: Reply) -> Frame:
        more = {} if self.context is None else {"context": self.context("".join(self._text))}
        return {**durations(reply, self.load_s), **more}

    def frame(self, kind: str, text: str, more: Frame | None = None) -> Frame:
        """More text; `kind`: "text" or "thinking"."""
        said = {"thinking": text} if kind == "thinking" else {}
        shown = "" if said else text
        if self._is_chat:
            message = {"role": "assistant", "content": shown, **said}
            return {**self._head, "message": message, "done": False, **(more or {})}
        return {**self._head, "response": shown, **said, "done": False, **(more or {})}

    def last(self, reason: str, more: Frame | None = None) -> Frame:
        return {**self.frame("text", ""), "done": True, "done_reason": reason, **(more or {})}

    def _called(self, call: Call) -> Frame:
        """A call, or the text of one that was cut in the middle."""
        arguments = object_of(text := "".join(call.written))
        if arguments is None:
            return self.frame("text", cut_call(call.start.name, text))
        function = {"index": call.start.index, "name": call.start.name, "arguments": arguments}
        made = self.frame("text", "")
        calls = [{"id": call.start.id, "function": function}]
        if not self._is_chat:
            return {**made, "tool_calls": calls}
        return {**made, "message": {**cast("Frame", made["message"]), "tool_calls": calls}}


def durations(reply: Reply, load_s: float) -> Frame:
    """What a reply took, times in nanoseconds."""
    rate = reply.tokens_per_s
    eval_s = (reply.new_tokens - 1) / rate if rate > 0 else 0.0
    return {
        "total_duration": round(NS * (load_s + reply.first_token_s + eval_s)),
        "load_duration": round(NS * load_s),
        "prompt_eval_count": reply.prompt_tokens,
        "prompt_eval_duration": round(NS * reply.first_token_s),
        "eval_count": reply.new_tokens,
        "eval_duration": round(NS * eval_s),
        "outsize": account([reply]),
    }


def whole(frames: Iterable[Frame]) -> Frame:
    """The one object that answers a request without a stream."""
    made: Frame = {}
    joined: Frame = {}
    for frame in frames:
        made = frame
        parts = cast("Frame", frame.get("message", frame))
        for name in ("content", "response", "thinking"):
            if name in parts:
                joined[name] = f"{joined.get(name, '')}{parts[name]}"
        for name, source in (("tool_calls", parts), ("logprobs", frame)):
            if name in source:
                joined[name] = [
                    *cast("list[object]", joined.get(name, [])),
                    *cast("list[object]", source[name]),
                ]
    told = {"logprobs": joined.pop("logprobs")} if "logprobs" in joined else {}
    if "message" in made:
        return {**made, "message": {**cast("Frame", made["message"]), **joined}, **told}
    return {**made, **joined, **told}


class Writer:
    """The frames as lines."""

    media_type = NDJSON

    def __init__(self, frames: Frames) -> None:
        self._frames = frames

    def start(self) -> bytes:
        return b""

    def write(self, event: Event) -> bytes:
        return b"".join(line(frame) for frame in self._frames.of(event))

    def end(self) -> bytes:
        return b""

    def silence(self) -> bytes:
        return line(self._frames.frame("text", ""))

    def failed(self, error: ApiError) -> bytes:
        return line(errors.body(error, errors.OLLAMA, ""))


def line(frame: Frame) -> bytes:
    """A frame as it is sent."""
    return (json.dumps(frame, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
