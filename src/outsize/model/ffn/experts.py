"""The feed-forward of a mixture of experts: a router names a few for each token, their outputs are weighed
and summed (expert_sums.py).

Shapes: T tokens, D width, N experts, K used by a token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, softmax

from outsize.caching.prefetcher import Scored
from outsize.kernels.norm import RMSNorm
from outsize.model.ffn.dense import Dense
from outsize.model.ffn.expert_sums import Chunks, ExpertSums
from outsize.model.step import Step
from outsize.model_config import Description
from outsize.model_config import Mixture as MixtureConfig
from outsize.parallel.collective import Collective, Point
from outsize.weights.experts import ExpertBank


class Gate(Protocol):
    """What a layer's experts are chosen by, asked one layer early."""

    def early(self, h_TD: Tensor, most: int) -> Scored: ...


class OwnRouting(NamedTuple):
    """Of a router that reads the residual stream through a norm of its own, and weighs each expert besides
    (Gemma 4)."""

    norm: RMSNorm
    scale_N: Tensor


class Router:
    """Names and weighs each token's experts. In fp32, since a near tie decides what is computed."""

    def __init__(
        self,
        norm: RMSNorm,
        w_ND: Tensor,
        mixture: MixtureConfig,
        bias_N: Tensor | None = None,
        choice_N: Tensor | None = None,
        own: OwnRouting | None = None,
    ) -> None:
        """`norm`: of what experts read. `choice_N`: added to weights where experts are chosen."""
        self.norm, self._w_ND, self._mixture, self._choice_N = norm, w_ND, mixture, choice_N
        self._own = own
        self._bias_N = w_ND.new_zeros(len(w_ND)) if bias_N is None else bias_N
        self._is_sigmoid = mixture.score == "sigmoid"
        self._weigh = torch.sigmoid if self._is_sigmoid else partial(softmax, dim=-1)

    def __call__(
        self, x_TD: Tensor, wide: bool, routing_bias_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(T, K) ids and weights, the first choice first. `routing_bias_N`: added to each expert's logit, in
        ranges of the row's logits, when choosing (lossy); weights are the model's own."""
        x, m = x_TD.float(), self._mixture
        rows = [x @ self._w_ND.T] if wide else [(self._w_ND @ row)[None] for row in x]
        z_TN = torch.cat(rows) + self._bias_N
        # A sigmoid's last bit depends on a number's place among all of them; softmax goes row by row.
        apart = self._is_sigmoid and not wide
        p_TN = torch.cat([self._weigh(z) for z in z_TN.split(1)]) if apart else self._weigh(z_TN)
        if routing_bias_N is not None:
            range_T1 = z_TN.amax(-1, keepdim=True) - z_TN.amin(-1, keepdim=True)
            ids_TK = (z_TN + range_T1 * routing_bias_N).topk(m.used, dim=-1).indices
        else:
            ids_TK = self._order(p_TN).topk(m.used, dim=-1).indices
        weights_TK = p_TN.gather(1, ids_TK)
        if m.renorm:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        if self._own is not None:
            weights_TK = weights_TK * self._own.scale_N[ids_TK]
        return ids_TK, weights_TK if m.scale == 1.0 else weights_TK * m.scale

    def reads(self, h_TD: Tensor, x_TD: Tensor) -> Tensor:
        """(T, D): what it is called with, of the residual stream and what experts read."""
        return x_TD if self._own is None else self._own.norm(h_TD)

    def _order(self, p_TN: Tensor) -> Tensor:
        """(T, N): what experts are chosen by. Of groups, the best few by their two best experts."""
        m, order_TN = self._mixture, p_TN if self._choice_N is None else p_TN + self._choice_N
        if m.groups == 1 or m.used_groups == m.groups:
            return order_TN
        by_TGM = order_TN.view(len(order_TN), m.groups, -1)
        best_TU = by_TGM.topk(2, dim=-1).values.sum(-1).topk(m.used_groups, dim=-1).indices
        is_out = torch.ones(by_TGM.shape[:2], dtype=torch.bool, device="cpu").scatter(
            1, best_TU, False
        )
        return by_TGM.masked_fill(is_out[..., None], -torch.inf).flatten(1)

    def early(self, h_TD: Tensor, most: int) -> Scored:
        """What it would choose for these rows of the residual stream, one layer early."""
        own = self.norm if self._own is None else self._own.norm
        z_TN = own(h_TD).float() @ self._w_ND.T + self._bias_N
        p_N = self._order(self._weigh(z_TN)).amax(0).clamp(min=0.0)
        weights, ids = p_N.topk(min(most, len(p_N)))
        return tuple(zip(ids.tolist(), weights.tolist(), strict=True))


class SharedExpert:
    """The expert that all tokens use; few families multiply its output by the sigmoid of a product."""

    def __init__(self, dense: Dense, gate_D: Tensor | None = None) -> None:
        self._dense, self._gate_D = dense, gate_D

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        """(T, D) fp32."""
        y_TD = self._dense(x_TD, step).float()
        if self._gate_D is None:
            return y_TD
        x, gate_D = x_TD.float(), self._gate_D
        rows = [x @ gate_D] if step.wide else [(row @ gate_D)[None] for row in x]
        return y_TD * torch.cat([row.sigmoid() for row in rows])[:, None]


class Owned:
    """Of several ranks, whose experts are whose: those of a layer by turns."""

    def __init__(self, ranks: Collective, layer: int) -> None:
        self._ranks, self._at = ranks, Point(layer, "ffn")

    def is_own(self, expert: int) -> bool:
        return expert % self._ranks.world == self._ranks.rank

    def part(
        self, rows: list[list[int]], weights: list[list[float]], early: Scored
    ) -> tuple[list[list[int]], list[list[float]], Scored]:
        """What this rank computes of the rows' choices, and may prefetch."""
        kept = [
            [(e, w) for e, w in zip(ids, ws, strict=True) if self.is_own(e)]
            for ids, ws in zip(rows, weights, strict=True)
        ]
        return (
            [[e for e, _ in row] for row in kept],
            [[w for _, w in row] for row in kept],
            tuple((e, score) for e, score in early if self.is_own(e)),
        )

    def whole(self, totals: list[Tensor]) -> list[Tensor]:
        """Summed over ranks: (T, D) fp32 each."""
        return [pending.wait() for pending in [self._ranks.sum(t, self._at) for t in totals]]


EARLY = 4  # times as many experts as are used are told early


class Mixture:
    """h += sum of the chosen experts' weighed outputs. `ahead`: the next layer's router, if it is there."""

    def __init__(
        self,
        d: Description,
        router: Router,
        bank: ExpertBank,
        shared: SharedExpert | None = None,
        owned: Owned | None = None,
    ) -> None:
        """`owned`: which of the experts are this rank's, where several share them out."""
        assert d.mixture is not None
        self._owned = owned
        self.router, self._shared, self._scale = router, shared, d.residual_scale
        self._bank, self._used, self._sums = bank, d.mixture.used, ExpertSums(d, bank)
        self.ahead: Callable[[], Gate | None] = lambda: None

    def run(self, chunks: Chunks) -> None:
        """Changes the chunks' h_TD."""
        xs = [self.router.norm(h) for h, _ in chunks]
        bias = self._bank.routing_bias()
        routed = [
            self.router(self.router.reads(h, x), step.wide, None if step.wide else bias)
            for x, (h, step) in zip(xs, chunks, strict=True)
        ]
        rows = [row for ids, _ in routed for row in ids.tolist()]
        weights = [row for _, w in routed for row in w.tolist()]
        early = self._early(chunks)
        rows, weights = self._resolved(rows, weights, early)
        if self._owned is not None:
            rows, weights, early = self._owned.part(rows, weights, early)
        totals = self._sums(chunks, xs, rows, weights, early)
        totals = totals if self._owned is None else self._owned.whole(totals)
        for (h, step), x, total in zip(chunks, xs, totals, strict=True):
            self._end(h, step, x, total)

    def _end(self, h_TD: Tensor, step: Step, x_TD: Tensor, total_TD: Tensor) -> None:
        """`x_TD`: what experts read; `total_TD`: what they made of it, fp32."""
        if self._shared is not None:
            total_TD = total_TD + self._shared(x_TD, step)
        step.residual(h_TD, total_TD, scale=self._scale)

    def _early(self, chunks: Chunks) -> Scored:
        """Only for few rows: a prompt wants nearly all experts anyway."""
        settings, router = self._bank.settings, self.ahead()
        if router is None or (settings.prefetcher is None and settings.recorder is None):
            return ()
        last = torch.cat([h[-1:] if step.wide else h for h, step in chunks])
        return router.early(last, EARLY * self._used)

    def _resolved(
        self, rows: list[list[int]], weights: list[list[float]], early: Scored
    ) -> tuple[list[list[int]], list[list[float]]]:
        """After misses were handled, and the choices recorded."""
        bank, settings = self._bank, self._bank.settings
        if settings.recorder is not None:
            settings.recorder(bank.ordinal, rows, weights, early)
        return bank.resolve_misses(rows, weights)


class Norms(NamedTuple):
    """Of a layer with a dense feed-forward beside its experts: before the dense one, after either, after
    their sum."""

    dense: RMSNorm
    dense_post: RMSNorm
    experts_post: RMSNorm
    post: RMSNorm


class Beside(Mixture):
    """h += post(post1(dense(norm1(h))) + post2(experts' sum)), and then h *= a number (Gemma 4)."""

    def __init__(
        self,
        d: Description,
        router: Router,
        bank: ExpertBank,
        dense: SharedExpert,
        ends: tuple[Norms, float],
    ) -> None:
        super().__init__(d, router, bank)
        self._dense, (self._norms, self._out_scale) = dense, ends

    def _end(self, h_TD: Tensor, step: Step, x_TD: Tensor, total_TD: Tensor) -> None:
        norms = self._norms
        dense_TD = self._dense(step.backend.norm(h_TD, norms.dense), step)
        both_TD = norms.dense_post(dense_TD) + norms.experts_post(total_TD)
        step.residual(h_TD, both_TD, norms.post)
        h_TD.mul_(self._out_scale)
