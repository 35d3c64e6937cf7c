"""A chat that remembers, and does not compute again what it knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from outsize.cache.kv import KV
from outsize.options import Options
from outsize.reply import Reply

if TYPE_CHECKING:
    from outsize.api import Model, Streaming


@dataclass(slots=True)
class Past:
    """A cache and the tokens it was computed from."""

    kv: KV
    tokens: list[int] = field(default_factory=list)
    adapter: str | None = None  # that computed it

    def shared(self, ids: Sequence[int], adapter: str | None) -> int:
        """How many leading tokens need not be run again; the last always is."""
        if adapter != self.adapter:
            self.tokens, self.adapter = [], adapter
        count = 0
        for ours, theirs in zip(self.tokens, ids[:-1], strict=False):
            if ours != theirs:
                break
            count += 1
        return count


class Conversation:
    """Messages so far, and the cache that goes with them."""

    def __init__(self, model: Model, options: Options) -> None:
        self._model, self.options = model, options
        self.messages: list[dict[str, str]] = []
        self._past = Past(model.new_kv(model.context))
        self._streaming: Streaming | None = None

    @property
    def reply(self) -> Reply:
        """The last turn's account."""
        assert self._streaming is not None, "nothing said yet"
        return self._streaming.reply

    def cancel(self) -> None:
        """End the present reply."""
        if self._streaming is not None:
            self._streaming.cancel()

    def reset(self, system: str | None = None) -> None:
        """Forget everything said; with a system prompt, begin anew under it."""
        if system is not None:
            self.options = self.options.with_changes({"system": system})
        self.messages.clear()

    def say(self, text: str) -> Iterator[str]:
        """One turn: pieces of the reply. What was said before is not computed again."""
        messages = [*self.messages, {"role": "user", "content": text}]
        streaming = self._model.stream_from(messages, self.options, self._past)
        self._streaming = streaming
        try:
            yield from streaming
        finally:
            run = streaming.run
            # The last token was chosen, but has not been run; nor, after an error, have others.
            self._past.tokens = run.seq.tokens[: min(len(run.seq.tokens) - 1, run.kv.length)]
            answer = {"role": "assistant", "content": streaming.reply.text}
            self.messages = [*messages, answer]
