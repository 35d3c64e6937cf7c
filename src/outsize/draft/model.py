"""A smaller model of the same vocabulary guesses, token by token (arXiv 2211.17192). It keeps its own
keys and values."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from outsize.draft.drafter import Draft
from outsize.forward.full import full
from outsize.forward.span import Out, Span
from outsize.kv.kv import KV
from outsize.model.transformer import Transformer
from outsize.sampling.probs import Probs
from outsize.sampling.sample import Sampler


class ModelDraft:
    """Guesses of another transformer: its likeliest tokens or, with a sampler, draws from `drawn_from`."""

    def __init__(
        self,
        transformer: Transformer,
        kv: KV,
        context: int,
        k: int,
        sampler: Sampler | None = None,
    ) -> None:
        self._model, self._kv, self._context, self._k = transformer, kv, context, k
        self._sampler, self.drawn_from = sampler, list[Probs]()
        self._known: list[int] = []  # tokens whose keys and values it has

    def propose(self, tokens: Sequence[int], most: int) -> Draft:
        self.drawn_from.clear()
        room = self._context - len(tokens)
        count = min(self._k, most, room)
        if count <= 0:
            return Draft()
        same = 0
        for ours, theirs in zip(self._known, tokens, strict=False):
            if ours != theirs:
                break
            same += 1
        start = min(same, len(tokens) - 1)
        fed, guesses = list(tokens[start:]), list[int]()
        for _ in range(count):
            (out,) = full(self._model, [Span(start, fed)], [self._kv])
            start += len(fed)
            fed = [self._guess(out.logits_KV[-1], [*tokens, *guesses])]
            guesses += fed
        self._known = [*tokens, *guesses[:-1]]
        return Draft(tuple(guesses))

    def _guess(self, logits_V: Tensor, tokens: Sequence[int]) -> int:
        if self._sampler is None:
            return int(logits_V.argmax())
        self.drawn_from.append(self._sampler.chances(logits_V, tokens))
        return self.drawn_from[-1].draw(self._sampler.random)

    def observe(self, draft: Draft, kept: Sequence[int], out: Out) -> None:
        """The next proposal begins where the texts agree."""

    def close(self) -> None:
        """Nothing to end: the keys and values go with it."""
