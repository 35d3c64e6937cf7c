"""One sequence's life: known tokens, computed tokens; each step closes the gap.

The flow yields spans and is sent their outputs. It knows no model, cache or device; prefill is a long
first span, plain decoding an empty draft.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

from outsize.draft.drafter import Draft, Drafter
from outsize.draft.verify import Check, Pick
from outsize.forward.prune import Prune
from outsize.forward.span import Out, Span
from outsize.model.lora import Adapter
from outsize.model.width import Width
from outsize.sampling.constraint import Constraint


@dataclass(slots=True)
class Sequence:
    """The state that outlives a step. `finish` is why it ended: "stop", "length" or "cancelled"."""

    tokens: list[int]
    num_prompt: int
    limit: int  # tokens in all
    ends: frozenset[int]  # ids that end the text
    finish: str | None = None
    constraint: Constraint | None = None  # what the text obeys; where it is complete, the text ends
    prune: Prune | None = None  # tokens that may skip layers: lossy
    width: Width | None = None  # of nested experts: lossy; None: all

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    def extend(self, kept: list[int]) -> None:
        """Take tokens until one ends the text or the room is used up; none after the end."""
        if self.finish is not None:
            return
        rule = self.constraint
        ended = "length" if rule is not None and rule.problem else "stop"
        for token in kept:
            if token in self.ends:
                self.finish = ended
                return
            self.tokens.append(token)
            if len(self.tokens) >= self.limit:
                self.finish = "length"
                break
        if rule is not None and rule.is_stopped and self.tokens[-len(kept) :] == kept:
            self.finish = ended


@dataclass(slots=True)
class DraftCounts:
    """Draft tokens checked and accepted. `by_position[i]`: (drafted, accepted) as draft token number i."""

    steps: int = 0  # after the prompt's
    drafted: int = 0
    accepted: int = 0
    by_position: list[list[int]] = field(default_factory=list)

    def add(self, drafted: int, accepted: int) -> None:
        self.steps += 1
        self.drafted += drafted
        self.accepted += accepted
        for place in range(drafted):
            if place == len(self.by_position):
                self.by_position.append([0, 0])
            self.by_position[place][0] += 1
            self.by_position[place][1] += place < accepted


def decode(
    seq: Sequence,
    drafts: tuple[Drafter, Check],
    pick: Pick,
    counts: DraftCounts | None = None,
    done: int = 0,
    adapter: Adapter | None = None,
) -> Generator[Span, Out, None]:
    """Run a sequence to its end. `drafts`: a drafter, and what decides which draft tokens are kept. `done`
    tokens are already in its cache. Nothing is drafted while there is a prompt to run: a long span's rows are
    computed another way than a step's."""
    (drafter, check), counts = drafts, counts or DraftCounts()
    while seq.finish is None:
        most = seq.limit - len(seq.tokens) - 1
        ready = len(seq.tokens) - done == 1
        draft = drafter.propose(seq.tokens, most) if ready else Draft()
        fed = (*seq.tokens[done:], *draft.tokens)
        out = yield Span(
            done, fed, len(draft.tokens) + 1, draft.masks, adapter, seq.prune, seq.width
        )
        kept = check(draft, out.logits_KV, seq.tokens, pick)
        done = len(seq.tokens) + len(kept) - 1  # the last kept token has not been run yet
        seq.extend(kept)
        if ready:
            counts.add(len(draft.tokens), len(kept) - 1)
            if seq.finish is None:
                drafter.observe(draft, kept, out)
    drafter.close()
