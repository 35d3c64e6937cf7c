"""Prompts that begin alike are computed once: keys and values of finished prompts are kept, the latest used
last to go, and those of prompts under way are shared (prefix caching).

Only a prompt's own tokens are shared, up to a multiple of the model's chunk: a reply's were computed one by
one, and a chunk's last bits depend on where it was cut. So an answer has the same bits with this cache and
without (tests/laws/test_batch.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outsize.engine.request import Request
from outsize.kv.kv import KV


@dataclass(eq=False, slots=True)
class Kept:
    """Keys and values, and the tokens they are of."""

    kv: KV
    tokens: list[int]
    adapter: str | None


class Prefixes:
    """Keeps keys and values of prompts, the latest used at the end."""

    def __init__(self, chunk: int) -> None:
        self._chunk, self._kept = chunk, list[Kept]()
        self.hits = 0  # tokens that were not computed again

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values are kept."""
        return sum(len(kept.tokens) for kept in self._kept)

    def forget(self) -> bool:
        """Let go of what was not used for longest; False: nothing is left."""
        return bool(self._kept) and self._kept.pop(0) is not None

    def clear(self) -> None:
        self._kept.clear()

    def is_coming(self, request: Request, running: Sequence[Request]) -> bool:
        """Will a request that runs soon have computed more of this prompt's beginning than there is now?"""
        now = max((self._shared(request, k.tokens, k.adapter) for k in self._kept), default=0)
        for other in running:
            shared = self._shared(request, other.seq.tokens[: other.seq.num_prompt], other.adapter)
            if not other.is_lazy and shared > max(now, self._computed(other)):
                return True
        return False

    def use(self, request: Request, running: Sequence[Request]) -> None:
        """Begin a request's cache with the longest beginning of its prompt that there is."""
        best, length = self._longest(request, running)
        if not length:
            return
        request.kv.copy_from(best.kv, length)
        request.cached = request.known = length
        self.hits += length
        if isinstance(best, Kept):
            self._kept.remove(best)
            self._kept.append(best)

    def keep(self, request: Request) -> None:
        """What a request that has ended computed of its prompt. Takes its cache."""
        length = self._computed(request)
        if not length:
            return
        tokens = request.seq.tokens[:length]
        request.kv.truncate(length)
        for kept in list(self._kept):
            if kept.adapter == request.adapter and kept.tokens == tokens[: len(kept.tokens)]:
                self._kept.remove(kept)
        if not any(
            k.adapter == request.adapter and k.tokens[:length] == tokens for k in self._kept
        ):
            request.kv.fit()
            self._kept.append(Kept(request.kv, tokens, request.adapter))

    def _longest(self, request: Request, running: Sequence[Request]) -> tuple[Kept | Request, int]:
        best: tuple[Kept | Request, int] = request, 0
        for kept in self._kept:
            length = self._shared(request, kept.tokens, kept.adapter)
            best = (kept, length) if length > best[1] else best
        for other in running:
            if other is request:
                continue
            prompt = other.seq.tokens[: self._computed(other)]
            length = self._shared(request, prompt, other.adapter)
            best = (other, length) if length > best[1] else best
        return best

    def _computed(self, request: Request) -> int:
        """Tokens of a request's prompt that are stored, up to a multiple of the chunk."""
        if request.is_lazy:
            return 0
        return min(request.known, request.seq.num_prompt) // self._chunk * self._chunk

    def _shared(self, request: Request, tokens: Sequence[int], adapter: str | None) -> int:
        """Leading tokens in common, in whole chunks; the prompt's last is always run."""
        if adapter != request.adapter:
            return 0
        ours, at = request.seq.tokens, 0
        most = min(len(tokens), request.seq.num_prompt - 1) // self._chunk * self._chunk
        while at < most and ours[at : at + self._chunk] == tokens[at : at + self._chunk]:
            at += self._chunk
        return at
