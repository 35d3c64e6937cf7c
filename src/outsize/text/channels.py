"""Split a reply into reasoning and answer, as its tokens come.

Two formats. gpt-oss (harmony): control tokens open a header and a message, `<|start|>assistant<|channel|>
analysis<|message|>...<|end|>`; the channel `final` is the answer, `analysis` is reasoning, and a `commentary`
to a recipient is a call of a tool. Others: a block between two tags, `<think>...</think>`, which begins the
reply, or was begun by the template already.
https://developers.openai.com/cookbook/articles/openai-harmony
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from outsize.text.tokens import TAGS, Tokens

HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
CALL = "<|channel|>commentary to={}<|message|>"  # the header of a call, in the text of a reply
TEXT, REASONING = "text", "reasoning"
Piece = tuple[str, str]  # kind, text


@dataclass(frozen=True, slots=True)
class Format:
    """How a model's replies are divided."""

    harmony: frozenset[int] = frozenset()  # the marker tokens
    tags: tuple[str, str] | None = None
    tag_tokens: tuple[
        tuple[int, str], ...
    ] = ()  # tags that are control tokens, which decoding drops
    opened: bool = False  # the prompt ends within a block, or within a header

    def after(self, tokens: Tokens, prompt: Sequence[int]) -> Format:
        """The format of a reply to this prompt."""
        if self.harmony:
            last = next((i for i in reversed(prompt) if i in self.harmony), None)
            return replace(self, opened=last == tokens.control("<|start|>"))
        if self.tags is None:
            return self
        tail = "".join(dict(self.tag_tokens).get(i) or tokens.decode([i]) for i in prompt[-16:])
        return replace(self, opened=tail.rstrip().endswith(self.tags[0]))


PLAIN = Format()


def format_of(tokens: Tokens, template: str | None) -> Format:
    """The format that a model's vocabulary and chat template speak of."""
    markers = [tokens.control(name) for name in HARMONY]
    found = frozenset(m for m in markers if m is not None)
    if len(found) == len(HARMONY):
        return Format(harmony=found)
    for tags in TAGS:
        if all(tokens.knows(tag) for tag in tags) or (
            template and any(tag in template for tag in tags)
        ):
            ids = [(tokens.control(tag), tag) for tag in tags]
            return Format(tags=tags, tag_tokens=tuple((i, t) for i, t in ids if i is not None))
    return PLAIN


class Harmony:
    """gpt-oss's channels, token by token."""

    def __init__(self, tokens: Tokens, opened: bool, shown: bool = False) -> None:
        """`shown`: the text of a call begins with its header, in one form: CALL."""
        self._call = CALL if shown else "{} "
        self._names = {tokens.control(name): name for name in HARMONY}
        self._header: str | None = "" if opened else None  # the text of the header being read
        self._role = ""  # what came before the channel's name
        self._kind, self._said = TEXT, {TEXT: False, REASONING: False}
        self._bare = opened  # no marker has come: without one, this is no header but the answer

    def marker(self, token: int) -> Iterator[Piece]:
        """Take a marker; the text that it stands for, which is none, or the name of a tool that is called."""
        name, self._bare = self._names[token], False
        if name == "<|message|>":
            yield from self._open()
        elif name == "<|channel|>":
            self._role, self._header = self._header or "", ""
        elif name == "<|start|>":
            self._role, self._header = "", ""
        else:
            self._header, self._kind = None, TEXT

    def _open(self) -> Iterator[Piece]:
        """The header is whole: what kind of text follows."""
        words = (self._header or "").split()
        called = [w for w in [*self._role.split(), *words] if w.startswith("to=")]
        self._kind = REASONING if words[:1] == ["analysis"] and not called else TEXT
        self._role, self._header = "", None
        if self._said[self._kind]:
            yield self._kind, "\n"
        if called:
            yield self._kind, self._call.format(called[0].removeprefix("to="))

    def text(self, piece: str) -> Iterator[Piece]:
        """A piece of decoded text: of a header, or of a message."""
        if self._header is not None:
            self._header += piece
            if self._bare and not "to=".startswith(self._header.lstrip()[:3]):
                piece, self._header, self._bare = self._header, None, False
        if self._header is None and piece:
            self._said[self._kind] = True
            yield self._kind, piece

    def finish(self) -> Iterator[Piece]:
        """A reply that ended before its first marker."""
        if self._bare and self._header:
            yield TEXT, self._header


class Tags:
    """A block of reasoning between two tags, in text as it comes."""

    def __init__(self, tags: tuple[str, str], opened: bool) -> None:
        self._open, self._close = tags
        self._state = "inside" if opened else "before"
        self._held = ""

    def text(self, piece: str) -> Iterator[Piece]:
        """What is certain of a piece, with what was held before it."""
        self._held += piece
        if self._state == "before":
            self._begin()
        if self._state == "inside":
            yield from self._inside()
        if self._state == "after":
            self._held = self._held.lstrip()
            self._state = "after" if not self._held else "rest"
        if self._state == "rest":
            yield from self._give(TEXT, len(self._held))

    def _begin(self) -> None:
        """Decide, once there is enough, whether the reply begins with a block."""
        body = self._held.lstrip()
        if body.startswith(self._open):
            self._held, self._state = body[len(self._open) :], "inside"
        elif not self._open.startswith(body):
            self._state = "rest"

    def _inside(self) -> Iterator[Piece]:
        at = self._held.find(self._close)
        if at >= 0:
            yield from self._give(REASONING, at)
            self._held, self._state = self._held[len(self._close) :], "after"
            return
        sizes = range(min(len(self._close) - 1, len(self._held)), 0, -1)
        keep = next((n for n in sizes if self._close.startswith(self._held[-n:])), 0)
        yield from self._give(REASONING, len(self._held) - keep)

    def _give(self, kind: str, size: int) -> Iterator[Piece]:
        out, self._held = self._held[:size], self._held[size:]
        if out:
            yield kind, out

    def finish(self) -> Iterator[Piece]:
        """What was held, at the end."""
        yield from self._give(REASONING if self._state == "inside" else TEXT, len(self._held))
