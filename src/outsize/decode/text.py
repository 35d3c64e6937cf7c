"""Between text and tokens: encoding, streaming decoding, stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Tokens:
    """A pack's tokenizer with its start token."""

    def __init__(self, tokenizer: Tokenizer, bos: int | None, add_bos: bool) -> None:
        self._tokenizer = tokenizer
        self.start = [bos] if add_bos and bos is not None else []

    def encode(self, text: str, start: bool) -> list[int]:
        """Token ids; `start` puts the model's own start token first, once, if it has one."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids if not start or ids[: len(self.start)] == self.start else self.start + ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def piece(self, token: int) -> str:
        """A token's own name, special or not."""
        return self._tokenizer.id_to_token(token) or ""


class Stream:
    """Decodes as tokens come; never emits half a character, nor a part of a stop string."""

    def __init__(self, tokens: Tokens, stops: Sequence[str]) -> None:
        self._tokens, self._stops = tokens, stops
        self._ids: list[int] = []
        self._from = self._decoded = 0  # ids before `_from` are done; `_decoded` gives context
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is now certain. Token by token, so that it does not depend on how many came at once."""
        self._ids.append(token)
        before = self._tokens.decode(self._ids[self._decoded : self._from])
        now = self._tokens.decode(self._ids[self._decoded :])
        if now.endswith(UNFINISHED) and len(self._ids) - self._from < 16:
            return ""
        self._decoded, self._from = self._from, len(self._ids)
        return self._cut(now[len(before) :], last=False)

    def finish(self) -> str:
        """What was held back, at the end. A character that never became whole is dropped."""
        before = self._tokens.decode(self._ids[self._decoded : self._from])
        rest = self._tokens.decode(self._ids[self._decoded :])[len(before) :]
        return self._cut(rest.rstrip(UNFINISHED), last=True)

    def _cut(self, text: str, last: bool) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = 0 if last else self._overlap()
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def _overlap(self) -> int:
        """Length of the longest end of the held text that may begin a stop string."""
        longest = max((len(s) for s in self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0
