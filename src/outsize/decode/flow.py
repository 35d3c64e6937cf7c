"""One sequence's life: known tokens, computed tokens; each step closes the gap.

The flow yields spans and is sent their outputs. It knows no model, cache or device; prefill is a long
first span, plain decoding an empty draft.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from outsize.draft.none import Drafter
from outsize.draft.verify import Pick, verify
from outsize.forward.span import Out, Span


@dataclass(slots=True)
class Sequence:
    """The state that outlives a step. `finish` is why it ended: "stop", "length" or "cancelled"."""

    tokens: list[int]
    num_prompt: int
    limit: int  # tokens in all
    ends: frozenset[int]  # ids that end the text
    finish: str | None = None

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    def extend(self, kept: list[int]) -> None:
        """Take tokens until one ends the text or the room is used up; none after the end."""
        if self.finish is not None:
            return
        for token in kept:
            if token in self.ends:
                self.finish = "stop"
                return
            self.tokens.append(token)
            if len(self.tokens) >= self.limit:
                self.finish = "length"
                return


def decode(
    seq: Sequence, drafter: Drafter, pick: Pick, done: int = 0
) -> Generator[Span, Out, None]:
    """Run a sequence to its end. `done` tokens are already in its cache."""
    while seq.finish is None:
        draft = drafter.propose(seq.tokens)
        fed = (*seq.tokens[done:], *draft.tokens)
        out = yield Span(start=done, tokens=fed, want=len(draft.tokens) + 1)
        kept = verify(draft, out.logits_KV, seq.tokens, pick)
        done = len(seq.tokens) + len(kept) - 1  # the last kept token has not been run yet
        seq.extend(kept)
