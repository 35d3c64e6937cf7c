"""Samples a token from logits: plain functions, one draw a token from the sequence's own generator."""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outsize.errors import OptionError, PackError
from outsize.options import Options
from outsize.sampling.constraint import Constraint
from outsize.sampling.logprobs import TokenLogprob, logprob_of
from outsize.sampling.probs import Probs

Floats = NDArray[np.float64]


def greedy(logits_V: Tensor, tokens: Sequence[int]) -> int:
    """The likeliest token; of equals, the first. Raises PackError."""
    token = int(logits_V.argmax())  # one that is no number, if there is one
    _check_number(float(logits_V[token]))
    return token


def _check_number(largest: float) -> None:
    """Damaged weights make logits that are no numbers, which no token can be drawn from. Raises PackError."""
    if not math.isfinite(largest):
        raise PackError(
            f"the largest logit is {largest}, from which no token can be drawn: the weights, or an "
            "adapter's, have values that are not finite; fetch the model again, or run it without the adapter"
        )


def penalize(logits_V: Tensor, tokens: Sequence[int], options: Options) -> Tensor:
    """Make recently seen tokens, of prompt and reply, less likely: repeat_penalty divides (CTRL, arXiv
    1909.05858); presence_penalty is taken off once, frequency_penalty for each time (OpenAI's)."""
    reach = options.repeat_last_n
    counts = Counter(tokens if reach < 0 else tokens[-reach:] if reach else ())
    if not counts:
        return logits_V
    ids = torch.tensor(sorted(counts), dtype=torch.int64, device="cpu")
    times = torch.tensor([counts[int(i)] for i in ids], dtype=logits_V.dtype, device="cpu")
    seen, penalty = logits_V[ids], options.repeat_penalty
    seen = torch.where(seen > 0, seen / penalty, seen * penalty)
    off = options.presence_penalty + options.frequency_penalty * times
    return logits_V.index_copy(0, ids, seen - off)


def biased(logits_V: Tensor, biases: Mapping[int, float]) -> Tensor:
    """With a number added to the logits of some tokens. Raises OptionError for one that there is not."""
    if biases and (largest := max(biases)) >= len(logits_V):
        raise OptionError(
            f"logit_bias names token {largest:,}, and the vocabulary has {len(logits_V):,}; leave it out"
        )
    ids = torch.tensor(list(biases), dtype=torch.int64, device="cpu")
    more = torch.tensor(list(biases.values()), dtype=logits_V.dtype, device="cpu")
    return logits_V.index_add(0, ids, more)


def keep_top_k(prob: Floats, k: int) -> Floats:
    """`prob` is sorted, largest first."""
    return prob[:k] if k else prob


def keep_top_p(prob: Floats, p: float) -> Floats:
    """The fewest tokens that hold at least p of the probability, the first at least."""
    return prob[: int(np.searchsorted(np.cumsum(prob) / prob.sum(), p)) + 1] if p < 1 else prob


def keep_min_p(prob: Floats, p: float) -> Floats:
    """Tokens at least p times as likely as the likeliest."""
    return prob[: int(np.count_nonzero(prob >= p * prob[0]))]


def probs(logits_V: Tensor, options: Options) -> Probs:
    """The distribution to draw from: cut at temperature 1 (top-k, top-p, min-p), then heated or cooled; at 0
    the likeliest token alone. Raises PackError."""
    if options.temperature == 0:
        return Probs(np.array([greedy(logits_V, ())]), np.ones(1))
    logits = logits_V.double().numpy()
    count = min(options.top_k or len(logits), len(logits))
    part = np.argpartition(-logits, count - 1)[:count]
    order = part[np.lexsort((part, -logits[part]))]  # ties by id, so that a seed is enough
    _check_number(float(logits[order[0]]))
    prob = np.exp(logits[order] - logits[order[0]])
    prob = keep_min_p(keep_top_p(keep_top_k(prob, options.top_k), options.top_p), options.min_p)
    prob = prob[: np.count_nonzero(prob)]  # impossible ones are not drawn, however a sum is rounded
    return Probs(order[: len(prob)], prob ** (1 / options.temperature))


class Sampler:
    """The draws of one sequence; called with logits (V,) and the tokens so far, it picks the next.
    `logprobs` has what was picked so far, if the options ask for it."""

    def __init__(self, options: Options, seed: int, constraint: Constraint | None = None) -> None:
        """`constraint`: what the tokens must obey; it is advanced by those that are picked."""
        self._options, self._constraint = options, constraint
        self.random = np.random.Generator(np.random.PCG64(seed))
        self.logprobs: list[TokenLogprob] = []
        neutral = options.repeat_penalty == 1.0
        self._is_free = neutral and not (options.presence_penalty or options.frequency_penalty)

    def probs(self, logits_V: Tensor, tokens: Sequence[int]) -> Probs:
        return probs(self._penalized(logits_V, tokens), self._options)

    def __call__(self, logits_V: Tensor, tokens: Sequence[int]) -> int:
        rule = self._constraint
        token = self._pick(logits_V if rule is None else rule.mask(logits_V), tokens)
        if rule is not None:
            rule.advance(token)
        if self._options.logprobs is not None:
            self.logprobs.append(logprob_of(logits_V, token, self._options.logprobs))
        return token

    def _pick(self, logits_V: Tensor, tokens: Sequence[int]) -> int:
        if self._options.temperature == 0:
            return greedy(self._penalized(logits_V, tokens), tokens)
        return self.probs(logits_V, tokens).draw(self.random)

    def _penalized(self, logits_V: Tensor, tokens: Sequence[int]) -> Tensor:
        biases = self._options.logit_bias
        made = logits_V if self._is_free else penalize(logits_V, tokens, self._options)
        return biased(made, biases) if biases else made


def seeded(options: Options) -> Options:
    """With the seed that will be used, so that a result states it. It is drawn from the system: the caller's
    generators stay as they are."""
    if options.seed is not None:
        return options
    return options.with_changes({"seed": secrets.randbits(31)})


def of_each(options: Options, count: int) -> list[Options]:
    """Of the prompts of one call. The seed that was asked for is that of all, so that each gets the text it
    would get alone; where none was, each has another. Raises OptionError."""
    known = seeded(options)
    first, step = known.seed or 0, 0 if options.seed is not None else 1
    made = [known.for_prompt(i) for i in range(count)]
    return [one.with_changes({"seed": first + i * step}) for i, one in enumerate(made)]
