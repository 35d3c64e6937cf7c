"""A smaller model of the same vocabulary guesses, token by token (arXiv 2211.17192). It keeps its own
keys and values."""

from __future__ import annotations

from collections.abc import Sequence

from outsize.cache.kv import KV
from outsize.draft.none import Draft
from outsize.forward.full import full
from outsize.forward.span import Out, Span
from outsize.model.transformer import Transformer


class ModelDraft:
    """Greedy guesses of another transformer."""

    def __init__(self, transformer: Transformer, kv: KV, context: int, k: int) -> None:
        self._model, self._kv, self._context, self._k = transformer, kv, context, k
        self._known: list[int] = []  # tokens whose keys and values it has

    def propose(self, tokens: Sequence[int], most: int) -> Draft:
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
        fed, guesses = list(tokens[start:]), []
        for _ in range(count):
            (out,) = full(self._model, [Span(start, fed)], [self._kv])
            start += len(fed)
            fed = [int(out.logits_KV[-1].argmax())]
            guesses += fed
        self._known = [*tokens, *guesses[:-1]]
        return Draft(tuple(guesses))

    def observe(self, draft: Draft, kept: Sequence[int], out: Out) -> None:
        """The next proposal begins where the texts agree."""

    def close(self) -> None:
        """Nothing to end: the keys and values go with it."""
