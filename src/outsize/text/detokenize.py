"""Tokens -> the text of a reply, as they come: whole characters, stop strings, reasoning apart."""

from __future__ import annotations

from collections.abc import Sequence

from outsize.text.channels import HARMONY, REASONING, TEXT, Format, Harmony, Piece, Tags, format_of
from outsize.text.tokens import UNFINISHED, Tokens


class Decoder:
    """Decodes as tokens come; never emits half a character."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._ids: list[int] = []
        self._from = self._decoded = 0  # ids before `_from` are done; `_decoded` gives context

    def push(self, token: int) -> str:
        """Text that is now certain. Token by token, so that it does not depend on how many came at once."""
        self._ids.append(token)
        before = self._tokens.decode(self._ids[self._decoded : self._from])
        now = self._tokens.decode(self._ids[self._decoded :])
        if now.endswith(UNFINISHED) and len(self._ids) - self._from < 16:
            return ""
        self._decoded, self._from = self._from, len(self._ids)
        return now[len(before) :]

    def finish(self) -> str:
        """What was held back, at the end of a text. A character that never became whole is dropped."""
        before = self._tokens.decode(self._ids[self._decoded : self._from])
        rest = self._tokens.decode(self._ids[self._decoded :])[len(before) :]
        self._decoded = self._from = len(self._ids)
        return rest.rstrip(UNFINISHED)


class Stops:
    """Cuts a text before a stop string; never emits a part of one. From the first of `marks` on, which begin
    what is no text for people, stop strings are not looked for."""

    def __init__(self, stops: Sequence[str], marks: Sequence[str] = ()) -> None:
        self._stops, self._marks = stops, marks if stops else ()
        self._held = ""
        self.found: str | None = None  # the stop string that the text was cut before

    @property
    def stopped(self) -> bool:
        return self.found is not None

    def cut(self, text: str, last: bool) -> str:
        """What is certain of a piece, with what was held before it."""
        if self.stopped:
            return ""
        self._held += text
        (at, stop), (marked, _) = self._first(self._stops), self._first(self._marks)
        if at >= 0 and not 0 <= marked < at:
            self.found = stop
            return self._held[:at]
        if marked >= 0:
            self._stops = self._marks = ()
        keep = 0 if last else self._overlap()
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def _first(self, names: Sequence[str]) -> tuple[int, str]:
        """Where the first of these is in the held text, and which; -1: nowhere."""
        found = [(at, name) for name in names if (at := self._held.find(name)) >= 0]
        return min(found, key=lambda pair: pair[0], default=(-1, ""))

    def _overlap(self) -> int:
        """Length of the longest end of the held text that may begin a stop string, or a mark."""
        names = (*self._stops, *self._marks)
        longest = max((len(s) for s in names), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(name.startswith(self._held[-size:]) for name in names):
                return size
        return 0


class Stream:
    """A reply's text as its tokens come. `reasoning` is what the model has thought so far; stop strings
    are looked for in the answer alone, before the first of the control tokens that are `shown`."""

    def __init__(
        self,
        tokens: Tokens,
        stops: Sequence[str],
        form: Format | None = None,
        shown: Sequence[str] = (),
    ) -> None:
        self._form = form = format_of(tokens, None) if form is None else form
        self._decoder, self._stops = Decoder(tokens), Stops(stops, shown)
        self._harmony = Harmony(tokens, form.opened, HARMONY[1] in shown) if form.harmony else None
        self._tags = Tags(form.tags, form.opened) if form.tags else None
        named = {tokens.control(name): name for name in shown}
        self._named = {i: name for i, name in named.items() if i is not None}
        self._named |= dict(form.tag_tokens)
        self._constrain = tokens.control("<|constrain|>")
        self.reasoning = ""

    @property
    def stopped(self) -> bool:
        """Has a stop string been seen?"""
        return self._stops.stopped

    @property
    def stop(self) -> str | None:
        """The stop string that was seen."""
        return self._stops.found

    def push(self, token: int) -> str:
        """The answer's text that is now certain."""
        if token in self._form.harmony and self._harmony is not None:
            before = self._divided(self._decoder.finish())
            return self._taken([*before, *self._harmony.marker(token)])
        if self._harmony is not None and token == self._constrain:  # parts the words of a header
            return self._taken(self._divided(self._decoder.finish() + " "))
        if token in self._named:
            return self._taken(self._divided(self._decoder.finish() + self._named[token]))
        return self._taken(self._divided(self._decoder.push(token)))

    def finish(self) -> str:
        """What was held back, at the end."""
        rest = self._divided(self._decoder.finish())
        divider = self._harmony or self._tags
        if divider is not None:
            rest += divider.finish()
        return self._taken(rest, last=True)

    def _divided(self, piece: str) -> list[Piece]:
        divider = self._harmony or self._tags
        return [(TEXT, piece)] if divider is None else list(divider.text(piece))

    def _taken(self, pieces: Sequence[Piece], last: bool = False) -> str:
        self.reasoning += "".join(text for kind, text in pieces if kind == REASONING)
        return self._stops.cut("".join(text for kind, text in pieces if kind == TEXT), last)
