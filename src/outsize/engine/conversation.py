"""A chat that remembers, and does not compute again what it knows."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Protocol

from outsize.arguments import text as checked_text
from outsize.engine.reply import Reply
from outsize.engine.stream import Streaming
from outsize.errors import BusyError, ContextError, OptionError
from outsize.kv.kv import KV
from outsize.kv.prefix import CachedPrefix
from outsize.options import Options
from outsize.text.channels import TEXT, Piece
from outsize.text.template import Message

OVERFLOWS = ("error", "drop-oldest")
LEAST_ROOM = 4  # of the context, one part in so many is kept for the reply when turns are dropped


class ChatModel(Protocol):
    """What a conversation needs of a model."""

    @property
    def context(self) -> int: ...
    @property
    def longest(self) -> int: ...
    def new_kv(self, tokens: int) -> KV: ...
    def count(self, prompt: list[Message], options: Options) -> int: ...
    def stream_from(
        self, prompt: list[Message], options: Options, prefix: CachedPrefix
    ) -> Streaming: ...


class Conversation:
    """Messages so far, and the cache that goes with them."""

    def __init__(self, model: ChatModel, options: Options, overflow: str = "error") -> None:
        self._model, self.options = model, options
        self.overflow = checked_overflow(overflow)
        self.messages: list[Message] = []
        self.dropped = 0  # messages that the last turn let go
        self._prefix = CachedPrefix(model.new_kv(model.context))
        self._streaming: Streaming | None = None
        self._cancelled = False
        self._open = _nothing()

    @property
    def reply(self) -> Reply:
        """The last turn's reply, with its usage statistics."""
        assert self._streaming is not None, "nothing said yet"
        return self._streaming.reply

    def cancel(self) -> None:
        """End the present reply."""
        self._cancelled = True
        if self._streaming is not None:
            self._streaming.cancel()

    def reset(self, system: str | None = None) -> None:
        """Forget everything said; with a system prompt, begin anew under it ("": under none)."""
        if system is not None:
            self.options = self.options.with_changes({"system": system or None})
        self.messages.clear()

    def say(self, text: str) -> Iterator[str]:
        """One turn: pieces of the reply. What was said before is not computed again."""
        return (piece for kind, piece in self.parts(text) if kind == TEXT)

    def parts(self, text: str) -> Iterator[Piece]:
        """One turn: pieces of the reply ("text") and of what the model thinks ("reasoning"). What it thought
        is not part of the history, nor is a turn that was broken off before the first piece."""
        checked_text("text", text)
        self._streaming, self._cancelled = None, False
        return self._next_turn(text)

    def _next_turn(self, text: str) -> Iterator[Piece]:
        """A turn that nobody has read to its end is over when the next begins. Raises BusyError."""
        try:
            self._open.close()
        except ValueError:
            raise BusyError(
                "a turn of this conversation is still being answered; wait for its end, or begin another "
                "conversation"
            ) from None
        self._open = self._turn(text)
        yield from self._open

    def _turn(self, text: str) -> Generator[Piece, None, None]:
        messages = self._fitting([*self.messages, {"role": "user", "content": text}])
        streaming = self._model.stream_from(messages, self.options, self._prefix)
        self._streaming = streaming
        if self._cancelled:
            streaming.cancel()
        try:
            yield from streaming.parts
        finally:
            request = streaming.request
            # The last token was chosen, but has not been run; nor, after an error, have others.
            tokens = request.seq.tokens
            self._prefix.tokens = tokens[: min(len(tokens) - 1, request.known)]
            self._prefix.exact = min(request.exact, len(self._prefix.tokens))
            if request.text or request.seq.finish not in (None, "cancelled"):
                answer = {"role": "assistant", "content": request.text}
                self.messages = [*messages, answer]

    def _fitting(self, messages: list[Message]) -> list[Message]:
        """The messages, without the oldest turns where that is asked for and needed. Raises ContextError."""
        context, self.dropped = self._model.context, 0
        room = min(self.options.max_tokens, context // LEAST_ROOM)
        while (size := self._model.count(messages, self.options)) + room > context:
            rest = _later_turns(messages)
            if self.overflow == "error" or not rest:
                break
            self.dropped += len(messages) - len(rest)
            messages = rest
        if size < context:
            return messages
        way_out = (
            "this message alone does not fit: shorten it"
            if not _later_turns(messages)
            else "/reset forgets what was said, --overflow drop-oldest (here: /overflow drop-oldest; in "
            "Python: overflow=) lets the oldest turns go"
        )
        raise ContextError(
            f"the chat has {size:,} tokens, the context holds {context:,}; {way_out}, and --context makes it "
            f"longer (this model goes to {self._model.longest:,})"
        )


def _nothing() -> Generator[Piece, None, None]:
    """A turn that is over."""
    yield from ()


def _later_turns(messages: list[Message]) -> list[Message]:
    """Without the oldest turn: from the second message of a user on; nothing if there is none."""
    starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
    return messages[starts[1] :] if len(starts) > 1 else []


def checked_overflow(overflow: str) -> str:
    """Raises OptionError."""
    if overflow not in OVERFLOWS:
        raise OptionError(f"overflow is {overflow!r}; known are {', '.join(OVERFLOWS)}")
    return overflow
