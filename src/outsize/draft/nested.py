"""Self-drafting by nested experts: the model itself, at a narrow width, drafts token by token into the very
cache that the whole model then writes over when it checks. No second model, no second cache; the checking
step forgets what was drafted before it computes anything, so that its bits are those of no draft at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from outsize.draft.drafter import Draft, Drafter
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.kv.kv import KV
from outsize.model.lora import Adapter
from outsize.model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class NestedModel:
    """The network that drafts for itself, at a share of its feed-forwards; `k` tokens at once."""

    transformer: Transformer
    share: float
    k: int


@dataclass(frozen=True, slots=True)
class Own:
    """A sequence's cache, as it is when asked for, and its adapter."""

    kv: Callable[[], KV]
    adapter: Adapter | None = None


class NestedDraft(Drafter):
    """Drafts the narrow model's likeliest tokens."""

    def __init__(self, model: NestedModel, k: int, own: Own) -> None:
        self._model, self._k, self._own = model.transformer, k, own
        self._width = self._model.nested.width(model.share)

    def propose(self, tokens: Sequence[int], most: int) -> Draft:
        last, drafted, kv = tokens[-1], list[int](), self._own.kv()
        for at in range(len(tokens) - 1, len(tokens) - 1 + min(self._k, most)):
            span = Span(at, [last], adapter=self._own.adapter, width=self._width)
            (out,) = full(self._model, [span], [kv])
            last = int(out.logits_KV[-1].argmax())
            drafted.append(last)
        return Draft(tuple(drafted))
