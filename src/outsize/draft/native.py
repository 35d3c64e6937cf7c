"""A model's own layers for further tokens as its drafter (multi-token prediction, DeepSeek V3, arXiv
2412.19437): one layer reads a token's embedding and the model's state before it, and predicts the token
after.

It keeps keys and values of its own, of the tokens since the prompt: a prompt's states are gone once it is
computed, which costs some right guesses, and no answer. Several tokens are drafted by feeding it its own
states.
Shapes: T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outsize.draft.drafter import Draft, Drafter
from outsize.draft.model import DraftModel
from outsize.forward.span import Out
from outsize.kernels.norm import RMSNorm
from outsize.kernels.rows import Segment
from outsize.kv.kv import KV
from outsize.model.attention import vector
from outsize.model.layers import Linear
from outsize.model.transformer import Transformer


class FurtherLayer:
    """The layer, opened and resident. Shared by all sequences."""

    def __init__(self, model: DraftModel) -> None:
        self._model, self.context = model.transformer, model.context
        weights = self._model.loaded.kinds["layers"]["further"][0].pinned
        assert weights is not None
        eps = self._model.description.norm_eps
        self._norms = [
            RMSNorm(vector(weights[name]), eps, torch.float32)
            for name in ("token_norm", "state_norm")
        ]
        self._join = Linear(weights["join"])

    def new_kv(self) -> KV:
        return self._model.new_kv(self.context)

    @torch.inference_mode()
    def run(self, start: int, tokens: Sequence[int], states_TD: Tensor, kv: KV) -> Tensor:
        """(1, D) fp32: the last token's state, normed. A token at each position from `start` on, and the
        states of those before. Changes the cache."""
        t: Transformer = self._model
        kv.truncate(start)
        ours, theirs = self._norms
        joined = torch.cat([ours(t.embed(tokens)), theirs(states_TD)], dim=1).to(t.dtype)
        h_TD = self._join(joined, False).float()
        step = t.step([Segment(kv, range(start, start + len(tokens)))], False)
        t.begin(False)
        for layer in t.paged_layers:
            layer([(h_TD, step)])
        t.memory.end_pass()
        return t.normed(h_TD[-1:])

    def likeliest(self, state_1D: Tensor) -> int:
        """The token that a normed state predicts."""
        return int(self._model.project(state_1D)[0].argmax())


class NativeDraft(Drafter):
    """Drafts `k` tokens after each step, of its states."""

    def __init__(self, layer: FurtherLayer, k: int) -> None:
        self._layer, self._k, self._kv = layer, k, layer.new_kv()
        self._ready: tuple[int, ...] = ()
        self._length = 0  # of the sequence when it was asked last

    def propose(self, tokens: Sequence[int], most: int) -> Draft:
        self._length, ready = len(tokens), self._ready[:most]
        self._ready = ()
        return Draft(ready)

    def observe(self, draft: Draft, kept: Sequence[int], out: Out) -> None:
        """The step's rows were those of the last known token and of the draft, each with its state; `kept`
        are the tokens after those that were right."""
        start, states_TD = self._length - 1, out.states_KD[: len(kept)]
        room = min(self._k, self._layer.context - self._length - len(kept))
        tokens, drafted = list(kept), list[int]()
        while len(drafted) < room:
            states_TD = self._layer.run(start, tokens, states_TD, self._kv)
            start += len(tokens)
            tokens = [self._layer.likeliest(states_TD)]
            drafted += tokens
        self._ready = tuple(drafted)

    def skip(self) -> None:
        self._ready = ()
