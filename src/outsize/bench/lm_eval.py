"""lm-evaluation-harness's model interface over a pack: https://github.com/EleutherAI/lm-evaluation-harness"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM

from outsize.engine.model import Model


class Harness(LM):  # type: ignore[misc]
    """Three questions a task may ask of a model."""

    def __init__(self, model: Model) -> None:
        LM.__init__(self)
        self._model = model

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-probability of a continuation after a context, and whether it is the greedy one."""
        return [self._continuation(*request.args) for request in requests]

    def _continuation(self, context: str, continuation: str) -> tuple[float, bool]:
        tokens = self._model.tokens
        stripped = context.rstrip()  # white space belongs to the token that follows it
        context, continuation = stripped, context[len(stripped) :] + continuation
        whole = tokens.encode(context + continuation, start=True)
        given = len(tokens.encode(context, start=True)) if context else len(tokens.start)
        if given == 0:
            whole, given = [self._any_start(), *whole], 1
        room = self._model.context
        cut = max(0, len(whole) - room)
        logprobs, likeliest = self._model.score_tokens(whole[cut:])
        last = len(whole) - given
        return sum(logprobs[-last:]), all(likeliest[-last:])

    def _any_start(self) -> int:
        pack = self._model.pack
        return pack.bos if pack.bos is not None else pack.eos[0]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability of whole texts, in windows of the context."""
        return [self._rolling(request.args[0]) for request in requests]

    def _rolling(self, text: str) -> float:
        ids = [self._any_start(), *self._model.tokens.encode(text, start=False)]
        total, room = 0.0, self._model.context - 1
        for start in range(0, len(ids) - 1, room):
            total += sum(self._model.score_tokens(ids[start : start + room + 1])[0])
        return total

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Text until a stop string."""
        out = []
        for request in requests:
            context, how = request.args
            stop = how.get("until", [])
            (reply,) = self._model.generate(
                context, raw=True, stop=[stop] if isinstance(stop, str) else list(stop),
                max_tokens=int(how.get("max_gen_toks", 256)),
                temperature=float(how.get("temperature", 0.0)) if how.get("do_sample") else 0.0,
            )  # fmt: skip
            out.append(reply.text)
        return out
