"""The feed-forward of nested experts: each token is computed by the first few pieces of it, as its request's
width and the layer's router say (DynaMoE, arXiv 2502.12325; MatFormer, arXiv 2310.07707).

A row's pieces are summed in their order in fp32, whoever else is in the step; with all of them it is the
whole feed-forward. Those of few rows run in one call, once they are all in memory; the others as any experts
(expert_sums.py), of which this is the twin: the same bits (tests/laws/test_nested.py).

Shapes: T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from outsize.caching.prefetcher import Scored
from outsize.kernels.norm import RMSNorm
from outsize.kernels.structs import ExpertMatrices, empty
from outsize.model.attention import vector
from outsize.model.ffn.expert_sums import Chunks, ExpertSums, native_experts
from outsize.model.step import Step
from outsize.model.width import Nested
from outsize.model_config import Description
from outsize.storage.table import Weights
from outsize.weights.experts import ExpertBank

LATER = 3  # layers after the next whose pieces are read ahead, as far as there are slots


class NestedExperts:
    """h += post(sum of the pieces that each row uses). `ahead`: the next layer's, if it is there."""

    def __init__(
        self, d: Description, nested: Nested, bank: ExpertBank, norm: RMSNorm, post: RMSNorm | None
    ) -> None:
        self._nested, self.bank, self._norm, self._post = nested, bank, norm, post
        self._activation, self._sums = d.activation, ExpertSums(d, bank)
        self.ahead: Callable[[], NestedExperts | None] = lambda: None
        self._held = list[ExpertMatrices | None]()
        self._is_plain = False  # was there no kernel?
        self.latest = 0  # pieces that the latest step used

    def run(self, chunks: Chunks) -> None:
        """Changes the chunks' h_TD."""
        xs = [step.backend.norm(h, self._norm) for h, step in chunks]
        each = [self._pieces(x, step) for x, (_, step) in zip(xs, chunks, strict=True)]
        totals = self._summed(chunks, xs, each)
        for (h, step), x, pieces, total in zip(chunks, xs, each, totals, strict=True):
            self._nested.correct(self.bank.layer, pieces, (x, total), step.wide)
            step.residual(h, total, self._post)

    def _summed(
        self, chunks: Chunks, xs: Sequence[Tensor], each: Sequence[list[int]]
    ) -> list[Tensor]:
        """(T, D) fp32 for each chunk."""
        recorder = self.bank.settings.recorder
        if recorder is None and len(chunks) == 1 and not chunks[0][1].wide:
            found = self._at_once(chunks, xs[0], each[0])
            if found is not None:
                return [found]
        rows = [list(range(n)) for some in each for n in some]
        weights, early = [[1.0] * len(row) for row in rows], self._early(chunks)
        if recorder is not None:
            recorder(self.bank.ordinal, rows, weights, early)
        return self._sums(chunks, xs, rows, weights, early)

    def _pieces(self, x_TD: Tensor, step: Step) -> list[int]:
        """That each row uses."""
        found, at = list[int](), 0
        for rows, width in step.widths:
            found += [self._nested.count] * (rows.start - at)
            found += self._nested.pieces(self.bank.layer, x_TD[rows], width, step.wide)
            at = rows.stop
        return found + [self._nested.count] * (len(x_TD) - at)

    def _at_once(self, chunks: Chunks, x_TD: Tensor, pieces: list[int]) -> Tensor | None:
        """(T, D) of few rows, in one call, where there is a kernel for the pieces and room for all."""
        bank, step, is_held = self.bank, chunks[0][1], self.bank.is_held
        if self._is_plain and not is_held:
            return None
        if not is_held:
            self._held = []
            self.latest = max(pieces)
            found = bank.first(pieces, self._early(chunks), self._later())
            experts = [self._sums.in_slot(w).native for w in found]
        else:
            self._held = self._held or [native_experts(w) for w in bank.held()]
            experts = self._held
        out_TD = empty(*x_TD.shape, dtype=torch.float32)
        done = bool(experts) and step.backend.nested(
            experts, pieces, x_TD, out_TD, self._activation
        )
        self._is_plain = bool(experts) and not done
        if is_held:
            bank.count_hits(max(pieces) if done else 0)
        else:
            bank.release()
        return out_TD if done else None

    def _early(self, chunks: Chunks) -> Scored:
        """What the next layer's router would use of these rows: all of it is sure."""
        settings, after = self.bank.settings, self.ahead()
        if after is None or (settings.prefetcher is None and settings.recorder is None):
            return ()
        return tuple((i, 1.0) for i in range(after.most(chunks)))

    def _later(self) -> list[tuple[ExpertBank, int]]:
        """Of the layers after the next, in order, what their latest steps used: nearly what they will use."""
        out, layer = list[tuple[ExpertBank, int]](), self.ahead()
        for _ in range(LATER):
            layer = None if layer is None else layer.ahead()
            if layer is not None:
                out.append((layer.bank, layer.latest))
        return out

    def most(self, chunks: Chunks) -> int:
        """Pieces that some row of the residual streams would use here, one layer early. Not counted."""
        if any(step.wide for _, step in chunks):
            return self._nested.count
        return max(self._foreseen(chunks))

    def _foreseen(self, chunks: Chunks) -> Iterator[int]:
        for h_TD, step in chunks:
            if sum(rows.stop - rows.start for rows, _ in step.widths) < len(h_TD):
                yield self._nested.count
            for rows, width in step.widths:
                x_TD = step.backend.norm(h_TD[rows], self._norm)
                yield max(self._nested.foreseen(self.bank.layer, x_TD, width))


def nested_sublayer(d: Description, nested: Nested, bank: ExpertBank, w: Weights) -> NestedExperts:
    """A layer's, over the norms in memory."""
    norm = RMSNorm(vector(w["ffn_norm"]), d.norm_eps, bank.activation_type)
    post = RMSNorm(vector(w["ffn_post_norm"]), d.norm_eps, torch.float32) if d.post_norm else None
    return NestedExperts(d, nested, bank, norm, post)
