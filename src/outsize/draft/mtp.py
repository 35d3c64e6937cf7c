"""Multi-token prediction: mask tokens after each token of a step predict what follows it, and a small head
chooses among their predictions (arXiv 2507.11851; trained by `adapt/mtp/`).

Quadratic: mask tokens after the last known token and after every draft token, so that whatever is kept, a
draft for the next step is ready. Linear: after the last draft token alone; if one fails, the next has none.
Shapes: K mask tokens a block, C candidates, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from outsize.draft import mtp_head
from outsize.draft.drafter import Draft, Drafter
from outsize.draft.mtp_head import Stage
from outsize.forward.span import MaskTokens, Out
from outsize.model.lora import Adapter
from outsize.model.transformer import Transformer

CANDIDATES = (
    32  # of a mask token, found by one pass of the head for all; of them one is chosen exactly
)


class Prediction(NamedTuple):
    """A predicted token, and how likely it is held to be, those before it being right."""

    token: int
    prob: float


class MtpModel:
    """What training made: mask tokens, additions, the sampler head; and the network they draft with. Shared
    by all sequences."""

    def __init__(
        self, masks_KD: Tensor, adapter: Adapter, head: Sequence[Stage], transformer: Transformer
    ) -> None:
        self.rows_KD, self.adapter = masks_KD.float(), adapter
        self._head, self._model = head, transformer

    @property
    def k(self) -> int:
        return len(self.rows_KD)

    def masks(self, anchors: Sequence[int], depth: int) -> MaskTokens:
        """`depth` mask tokens after each of a step's tokens `anchors`."""
        return MaskTokens(tuple(anchors), self.rows_KD[:depth], self.adapter)

    @torch.inference_mode()
    def predict(self, states_KD: Tensor, last: int) -> tuple[Prediction, ...]:
        """What a block predicts after `last`, the token after its anchor."""
        out = []
        likely_KC = self._model.likely(states_KD, CANDIDATES)
        for state_D, ids_C in zip(states_KD, likely_KC, strict=True):
            mixed = state_D[None]
            if self._head:
                mixed = mtp_head.mix(mixed, self._model.embed([last]), self._head)
            probs_C = (self._model.head_rows(ids_C) @ mixed[0]).float().softmax(0)
            place = int(probs_C.argmax())
            last = int(ids_C[place])
            out.append(Prediction(last, float(probs_C[place])))
        return tuple(out)


def block_of(draft: Draft, anchor: int, out: Out) -> Tensor | None:
    """States of the mask tokens after the step's token number `anchor`, if there were any."""
    if draft.masks is None or out.masks_MD is None or anchor not in draft.masks.anchors:
        return None
    depth = len(draft.masks.rows_KD)
    at = draft.masks.anchors.index(anchor) * depth
    return out.masks_MD[at : at + depth]


class MtpDraft(Drafter):
    """Always drafts all predictions that are ready."""

    def __init__(self, model: MtpModel, k: int, layout: str) -> None:
        self._model, self._k, self._layout = model, k, layout
        self._ready: tuple[Prediction, ...] = ()

    def propose(self, tokens: Sequence[int], most: int) -> Draft:
        drafted = tuple(p.token for p in self._ready[:most])
        anchors = range(len(drafted) + 1) if self._layout == "quadratic" else [len(drafted)]
        return Draft(drafted, self._model.masks(tuple(anchors), self._k))

    def observe(self, draft: Draft, kept: Sequence[int], out: Out) -> None:
        states = block_of(draft, len(kept) - 1, out)
        self._ready = () if states is None else self._model.predict(states, kept[-1])

    def skip(self) -> None:
        self._ready = ()
