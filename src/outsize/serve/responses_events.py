"""A reply as a response of OpenAI's: output items, whole or as the events in which they grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from outsize.serve.errors import ApiError
from outsize.serve.events import CallArguments, CallStart, End, Event, Part
from outsize.serve.sse import COMMENT, DONE, SSE, data

Frame = dict[str, object]
MESSAGE, REASONING, CALL = "message", "reasoning", "function_call"
PREFIXES = {MESSAGE: "msg_", REASONING: "rs_", CALL: "fc_"}


@dataclass(slots=True)
class Item:
    """An output item that grows: its text (a call's arguments), and of a message the tokens of it."""

    kind: str
    id: str
    head: Frame
    texts: list[str] = field(default_factory=list)
    logprobs: list[Frame] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def part(self, is_done: bool = True) -> Frame:
        """The one content part of a message or of reasoning."""
        text = self.text if is_done else ""
        if self.kind == REASONING:
            return {"type": "reasoning_text", "text": text}
        logprobs = self.logprobs if is_done else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def shown(self, status: str) -> Frame:
        """The item itself; while it is in progress, without what is in it."""
        is_done = status != "in_progress"
        made = {"id": self.id, "type": self.kind, "status": status, **self.head}
        if self.kind == CALL:
            return {**made, "arguments": self.text if is_done else ""}
        content = [self.part()] if is_done else []
        return (
            {**made, "content": content}
            if self.kind == MESSAGE
            else {**made, "summary": [], "content": content}
        )


@dataclass(slots=True)
class Kit:
    """What frames are made with besides events."""

    new_id: Callable[[str], str]
    clock: Callable[[], float]
    usage: Callable[[End], Frame]
    logprobs: Callable[[Part], list[Frame]]


class Frames:
    """The events of one response. `head`: its fields that do not change."""

    def __init__(self, head: Frame, kit: Kit) -> None:
        self._head, self._kit = head, kit
        self._done = list[Frame]()
        self._item: Item | None = None
        self._tokens = list[Frame]()  # that came before the text that they make
        self._number = 0

    def start(self) -> Iterator[Frame]:
        begun = self.response("in_progress", {})
        yield self._event("response.created", {"response": begun})
        yield self._event("response.in_progress", {"response": begun})

    def of(self, event: Event) -> Iterator[Frame]:
        match event:
            case Part():
                yield from self._part(event)
            case CallStart():
                yield from self._close("completed")
                yield self._open(CALL, {"call_id": event.id, "name": event.name})
            case CallArguments(text=text) if text and self._item is not None:
                self._item.texts.append(text)
                yield self._grown("response.function_call_arguments.delta", {"delta": text})
            case End():
                yield from self._last(event)

    def response(self, status: str, more: Frame) -> Frame:
        """The whole response as it is now."""
        empty = {"completed_at": None, "incomplete_details": None, "error": None, "usage": None}
        return {**self._head, "status": status, "output": list(self._done), **empty, **more}

    def failed(self, error: ApiError) -> Iterator[Frame]:
        """The response is given up, and clients that look for an error find it."""
        told = {"code": error.code or error.type, "message": error.message}
        response = self.response("failed", {"error": told})
        yield self._event("response.failed", {"response": response})
        shown = {"type": error.type, "param": error.param, **told}
        yield self._event("error", {**told, "param": error.param, "error": shown})

    def _event(self, kind: str, more: Frame) -> Frame:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **more}

    def _grown(self, kind: str, more: Frame) -> Frame:
        """An event of the item that grows."""
        assert self._item is not None, "no item is open"
        return self._event(
            kind, {"item_id": self._item.id, "output_index": len(self._done), **more}
        )

    def _part(self, part: Part) -> Iterator[Frame]:
        kind = REASONING if part.reasoning else MESSAGE
        if kind == MESSAGE:
            self._tokens += self._kit.logprobs(part) if part.tokens else []
        if not part.text:
            return
        if self._item is None or self._item.kind != kind:
            yield from self._close("completed")
            yield from self._begin(kind)
        assert self._item is not None, "just begun"
        self._item.texts.append(part.text)
        if kind == REASONING:
            yield self._grown(
                "response.reasoning_text.delta", {"content_index": 0, "delta": part.text}
            )
            return
        logprobs = self._taken(self._item)
        more = {"content_index": 0, "delta": part.text, "logprobs": logprobs}
        yield self._grown("response.output_text.delta", more)

    def _taken(self, item: Item) -> list[Frame]:
        """The tokens that are new, now the item's."""
        tokens, self._tokens = self._tokens, []
        item.logprobs += tokens
        return tokens

    def _begin(self, kind: str) -> Iterator[Frame]:
        """A message, or reasoning, with its one part."""
        yield self._open(kind, {"role": "assistant"} if kind == MESSAGE else {})
        assert self._item is not None, "just opened"
        part = {"content_index": 0, "part": self._item.part(is_done=False)}
        yield self._grown("response.content_part.added", part)

    def _open(self, kind: str, head: Frame) -> Frame:
        self._item = Item(kind, self._kit.new_id(PREFIXES[kind]), head)
        more = {"output_index": len(self._done), "item": self._item.shown("in_progress")}
        return self._event("response.output_item.added", more)

    def _close(self, status: str) -> Iterator[Frame]:
        """The item that grows is complete, or is cut."""
        item = self._item
        if item is None:
            return
        if item.kind == CALL:
            whole = {"name": item.head["name"], "arguments": item.text}
            yield self._grown("response.function_call_arguments.done", whole)
        else:
            yield from self._part_done(item)
        shown = item.shown(status)
        more = {"output_index": len(self._done), "item": shown}
        yield self._event("response.output_item.done", more)
        self._done.append(shown)
        self._item = None

    def _part_done(self, item: Item) -> Iterator[Frame]:
        where: Frame = {"content_index": 0}
        if item.kind == REASONING:
            yield self._grown("response.reasoning_text.done", {**where, "text": item.text})
        else:
            self._taken(item)
            text = {**where, "text": item.text, "logprobs": item.logprobs}
            yield self._grown("response.output_text.done", text)
        yield self._grown("response.content_part.done", {**where, "part": item.part()})

    def _last(self, end: End) -> Iterator[Frame]:
        is_cut = end.reason == "length"
        status = "incomplete" if is_cut else "completed"
        if self._item is None and not self._done:
            yield from self._begin(MESSAGE)  # an empty answer is a message, too
        yield from self._close(status)
        why = {"reason": "max_output_tokens"} if is_cut else None
        more: Frame = {"incomplete_details": why, "usage": self._kit.usage(end)}
        if not is_cut:
            more["completed_at"] = int(self._kit.clock())
        yield self._event(f"response.{status}", {"response": self.response(status, more)})


def whole(frames: Iterator[Frame]) -> object:
    """The response at the end of its frames."""
    *_, last = frames
    return last["response"]


class Writer:
    """The frames as server-sent events."""

    media_type = SSE

    def __init__(self, frames: Frames) -> None:
        self._frames = frames

    def start(self) -> bytes:
        return _sent(self._frames.start())

    def write(self, event: Event) -> bytes:
        return _sent(self._frames.of(event))

    def end(self) -> bytes:
        return DONE

    def silence(self) -> bytes:
        return COMMENT

    def failed(self, error: ApiError) -> bytes:
        return _sent(self._frames.failed(error)) + DONE


def _sent(frames: Iterator[Frame]) -> bytes:
    return b"".join(data(frame, str(frame["type"])) for frame in frames)
