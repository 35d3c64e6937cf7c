"""Draft model: a smaller model of the same vocabulary drafts token by token (arXiv 2211.17192). It keeps
its own keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from outsize.draft.drafter import Draft, Drafter
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.model.transformer import Transformer
from outsize.sampling.probs import Probs
from outsize.sampling.sample import Sampler


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A smaller model, opened and fully resident. It drafts token ids, so it needs no tokenizer."""

    transformer: Transformer
    context: int
    close: Callable[[], None]


class ModelDraft(Drafter):
    """Drafts another model's likeliest tokens or, with a sampler, draws from `drawn_from`."""

    def __init__(self, model: DraftModel, k: int, sampler: Sampler | None = None) -> None:
        self._model, self._context, self._k = model.transformer, model.context, k
        self._kv = self._model.new_kv(self._context)
        self._sampler, self.drawn_from = sampler, list[Probs]()
        self._known: list[int] = []  # tokens whose keys and values it has

    def propose(self, tokens: Sequence[int], most: int) -> Draft:
        self.drawn_from.clear()
        count = min(self._k, most, self._context - len(tokens))
        if count <= 0:
            return Draft()
        same = 0
        for ours, theirs in zip(self._known, tokens, strict=False):
            if ours != theirs:
                break
            same += 1
        start = min(same, len(tokens) - 1)
        fed, drafted = list(tokens[start:]), list[int]()
        for _ in range(count):
            (out,) = full(self._model, [Span(start, fed)], [self._kv])
            start += len(fed)
            fed = [self._pick(out.logits_KV[-1], [*tokens, *drafted])]
            drafted += fed
        self._known = [*tokens, *drafted[:-1]]
        return Draft(tuple(drafted))

    def _pick(self, logits_V: Tensor, tokens: Sequence[int]) -> int:
        if self._sampler is None:
            return int(logits_V.argmax())
        self.drawn_from.append(self._sampler.probs(logits_V, tokens))
        return self.drawn_from[-1].draw(self._sampler.random)
