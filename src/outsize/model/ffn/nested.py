"""The feed-forward of nested experts: each token is computed by the first few pieces of it, as its request's
width and the layer's router say (DynaMoE, arXiv 2502.12325; MatFormer, arXiv 2310.07707).

A row's pieces are summed in their order in fp32, whoever else is in the step; with all of them it is the
whole feed-forward. Held pieces of few rows run in one call; the others as any experts (expert_sums.py), of
which this is the twin: the same bits (tests/laws/test_nested.py).

Shapes: T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from outsize.caching.prefetcher import Scored
from outsize.kernels.norm import RMSNorm
from outsize.kernels.structs import ExpertMatrices
from outsize.model.attention import vector
from outsize.model.ffn.expert_sums import Chunks, ExpertSums, native_experts
from outsize.model.step import Step
from outsize.model.width import Nested
from outsize.model_config import Description
from outsize.storage.table import Weights
from outsize.weights.experts import ExpertBank


class NestedExperts:
    """h += post(sum of the pieces that each row uses). `ahead`: the next layer's, if it is there."""

    def __init__(
        self, d: Description, nested: Nested, bank: ExpertBank, norm: RMSNorm, post: RMSNorm | None
    ) -> None:
        self._nested, self._bank, self._norm, self._post = nested, bank, norm, post
        self._activation, self._sums = d.activation, ExpertSums(d, bank)
        self.ahead: Callable[[], NestedExperts | None] = lambda: None
        self._held = list[ExpertMatrices | None]()

    def run(self, chunks: Chunks) -> None:
        """Changes the chunks' h_TD."""
        xs = [step.backend.norm(h, self._norm) for h, step in chunks]
        each = [self._pieces(x, step) for x, (_, step) in zip(xs, chunks, strict=True)]
        rows = [list(range(n)) for some in each for n in some]
        totals = self._summed(chunks, xs, each, rows)
        for (h, step), x, pieces, total in zip(chunks, xs, each, totals, strict=True):
            self._nested.correct(self._bank.layer, pieces, (x, total), step.wide)
            step.residual(h, total, self._post)

    def _summed(
        self,
        chunks: Chunks,
        xs: Sequence[Tensor],
        each: Sequence[list[int]],
        rows: list[list[int]],
    ) -> list[Tensor]:
        """(T, D) fp32 for each chunk."""
        recorder = self._bank.settings.recorder
        if recorder is None and len(chunks) == 1:
            found = self._at_once(chunks[0][1], xs[0], each[0])
            if found is not None:
                return [found]
        weights, early = [[1.0] * len(row) for row in rows], self._early(chunks)
        if recorder is not None:
            recorder(self._bank.ordinal, rows, weights, early)
        return self._sums(chunks, xs, rows, weights, early)

    def _pieces(self, x_TD: Tensor, step: Step) -> list[int]:
        """That each row uses."""
        found, at = list[int](), 0
        for rows, width in step.widths:
            found += [self._nested.count] * (rows.start - at)
            found += self._nested.pieces(self._bank.layer, x_TD[rows], width, step.wide)
            at = rows.stop
        return found + [self._nested.count] * (len(x_TD) - at)

    def _at_once(self, step: Step, x_TD: Tensor, pieces: list[int]) -> Tensor | None:
        """(T, D) of few rows, in one call, where all pieces are held and there is a kernel for them."""
        if not self._bank.is_held:
            self._held = []
        if step.wide or not self._bank.is_held:
            return None
        if not self._held:
            self._held = [native_experts(w) for w in self._bank.held()]
        out_TD = torch.empty(x_TD.shape, dtype=torch.float32, device="cpu")
        if not step.backend.nested(self._held, pieces, x_TD, out_TD, self._activation):
            return None
        self._bank.count_hits(max(pieces))
        return out_TD

    def _early(self, chunks: Chunks) -> Scored:
        """What the next layer's router would use of these rows: all of it is sure."""
        settings, after = self._bank.settings, self.ahead()
        if after is None or (settings.prefetcher is None and settings.recorder is None):
            return ()
        return tuple((i, 1.0) for i in range(after.most(chunks)))

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
                yield max(self._nested.foreseen(self._bank.layer, x_TD, width))


def nested_sublayer(d: Description, nested: Nested, bank: ExpertBank, w: Weights) -> NestedExperts:
    """A layer's, over the norms in memory."""
    norm = RMSNorm(vector(w["ffn_norm"]), d.norm_eps, bank.activation_type)
    post = RMSNorm(vector(w["ffn_post_norm"]), d.norm_eps, torch.float32) if d.post_norm else None
    return NestedExperts(d, nested, bank, norm, post)
