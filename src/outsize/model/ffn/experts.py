"""The feed-forward of a mixture of experts: a router names a few for each token, their outputs are weighed
and summed.

Few rows: experts are computed in the order in which they are in memory, the missing ones arriving
meanwhile; each row's outputs are kept apart and summed in the order of its choices, so that a row's
bits depend neither on that order nor on other rows. Many rows: each expert is fetched once for all of a
prompt, and computed for one chunk after another, so that a chunk's bits are its own.

Shapes: T tokens, D width, N experts, K used by a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, softmax

from outsize.caching.prefetcher import Scored
from outsize.kernels.norm import RMSNorm
from outsize.kernels.structs import ExpertMatrices
from outsize.model.ffn.dense import Biased, Dense
from outsize.model.layers import Linear
from outsize.model.step import Step
from outsize.model_config import Description
from outsize.model_config import Mixture as MixtureConfig
from outsize.storage.table import Weights
from outsize.weights.experts import ExpertBank

Chunks = Sequence[tuple[Tensor, Step]]


class Router:
    """Names and weighs each token's experts. In fp32, since a near tie decides what is computed."""

    def __init__(
        self,
        norm: RMSNorm,
        w_ND: Tensor,
        mixture: MixtureConfig,
        bias_N: Tensor | None = None,
        choice_N: Tensor | None = None,
    ) -> None:
        """`choice_N`: added to weights where experts are chosen."""
        self.norm, self._w_ND, self._mixture, self._choice_N = norm, w_ND, mixture, choice_N
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
        return ids_TK, weights_TK if m.scale == 1.0 else weights_TK * m.scale

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
        z_TN = self.norm(h_TD).float() @ self._w_ND.T + self._bias_N
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


Expert = Dense | Biased
BIASES = ("gate_up_bias", "down_bias")
EARLY = 4  # times as many experts as are used are told early


@dataclass(frozen=True, slots=True)
class Built:
    """The expert over a slot's views, whatever is in them; `native`: for the kernel that runs several."""

    weights: Weights
    ffn: Expert
    native: ExpertMatrices | None


def native_experts(w: Weights) -> ExpertMatrices | None:
    """None where a matrix is in pieces or in another encoding."""
    found = [w[k][0].coded() if len(w[k]) == 1 else None for k in ("gate_up", "down")]
    gate_up, down = found
    return None if gate_up is None or down is None else ExpertMatrices(gate_up, down)


class Mixture:
    """h += sum of the chosen experts' weighed outputs. `ahead`: the next layer's router, if it is there."""

    def __init__(
        self,
        d: Description,
        router: Router,
        bank: ExpertBank,
        shared: SharedExpert | None = None,
    ) -> None:
        assert d.mixture is not None
        self.router, self._shared, self._scale = router, shared, d.residual_scale
        self._bank, self._activation, self._used = bank, d.activation, d.mixture.used
        self._weighs_input = d.mixture.weighs_input
        self.ahead: Callable[[], Router | None] = lambda: None
        self._built: dict[int, Built] = {}

    def run(self, chunks: Chunks) -> None:
        """Changes the chunks' h_TD."""
        xs = [self.router.norm(h) for h, _ in chunks]
        bias = self._bank.routing_bias()
        routed = [
            self.router(x, step.wide, None if step.wide else bias)
            for x, (_, step) in zip(xs, chunks, strict=True)
        ]
        rows = [row for ids, _ in routed for row in ids.tolist()]
        weights = [row for _, w in routed for row in w.tolist()]
        early = self._early(chunks)
        rows, weights = self._resolved(rows, weights, early)
        sums = _Sums(chunks, xs, self._used, self._activation, self._weighs_input)
        in_order = any(step.wide for _, step in chunks)
        places = _places(rows, weights)
        for found in self._bank.stream(rows, early, in_order):
            sums.add([(self._in_slot(w), places[expert]) for expert, w in found])
        sums.finish(self._shared, self._scale)

    def _in_slot(self, w: Weights) -> Built:
        """The expert over a slot's views: the same slot needs no new one, whatever is in it. Biases are
        joined, and so copied, at each use."""
        if "down_bias" in w:
            biases = (torch.cat([b.encoding.decode(b.fields)[0] for b in w[k]]) for k in BIASES)
            return Built(w, Biased(Linear(w["gate_up"]), Linear(w["down"]), *biases), None)
        found = self._built.get(id(w))
        if found is None:
            made = Dense((Linear(w["gate_up"]), Linear(w["down"])), self._activation)
            found = self._built[id(w)] = Built(w, made, native_experts(w))
        return found

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


Places = list[tuple[int, int, float]]  # row, slot, weight


def _places(rows: Sequence[Sequence[int]], weights: Sequence[Sequence[float]]) -> dict[int, Places]:
    """For each expert, who chose it."""
    out: dict[int, Places] = {}
    for t, (ids, ws) in enumerate(zip(rows, weights, strict=True)):
        for k, (e, w) in enumerate(zip(ids, ws, strict=True)):
            out.setdefault(e, []).append((t, k, w))
    return out


class _Sums:
    """Collects the experts' outputs for all chunks."""

    def __init__(
        self, chunks: Chunks, xs: Sequence[Tensor], used: int, activation: str, weighs_input: bool
    ) -> None:
        self._chunks, self._xs, self._activation = chunks, xs, activation
        self._weighs_input = weighs_input
        self._starts, at = [], 0
        for h, _ in chunks:
            self._starts.append(at)
            at += len(h)
        self._outs = [
            torch.zeros_like(h) if step.wide else h.new_zeros(len(h), used, h.shape[1])
            for h, step in chunks
        ]

    def add(self, experts: Sequence[tuple[Built, Places]]) -> None:
        """Compute some experts for those who chose them."""
        for (h, step), x, start, out in zip(
            self._chunks, self._xs, self._starts, self._outs, strict=True
        ):
            rows = range(start, start + len(h))
            mine = [(e, [(t - start, k, w) for t, k, w in p if t in rows]) for e, p in experts]
            mine = [(e, p) for e, p in mine if p]
            native, theirs = [e.native for e, _ in mine], [p for _, p in mine]
            if self._weighs_input:
                for e, places in mine:
                    add_weighed(e.ffn, places, x, step, out)
                continue
            if step.backend.experts(native, theirs, x, out, self._activation):
                continue
            for e, places in mine:
                add(e.ffn, places, x, step, out)

    def finish(self, shared: SharedExpert | None, scale: float) -> None:
        """Add the sums, and what the shared expert makes, to the residual streams."""
        for (h, step), x, out in zip(self._chunks, self._xs, self._outs, strict=True):
            total = out if step.wide else _in_order(out)
            if shared is not None:
                total = total + shared(x, step)
            step.residual(h, total, scale=scale)


def _in_order(out_TKD: Tensor) -> Tensor:
    """(T, D): each row's outputs, summed in the order of its choices."""
    total = out_TKD[:, 0].clone()
    for k in range(1, out_TKD.shape[1]):
        total += out_TKD[:, k]
    return total


def add(ffn: Expert, places: Places, x_TD: Tensor, step: Step, out: Tensor) -> None:
    """One expert, the plain way."""
    rows, slots, weights = _columns(places)
    _put(ffn(x_TD[rows], step).float() * weights[:, None], rows, slots, step, out)


def add_weighed(ffn: Expert, places: Places, x_TD: Tensor, step: Step, out: Tensor) -> None:
    """One expert whose inputs are weighed."""
    rows, slots, weights = _columns(places)
    x = (x_TD[rows].float() * weights[:, None]).to(x_TD.dtype)
    _put(ffn(x, step).float(), rows, slots, step, out)


def _columns(places: Places) -> tuple[Tensor, Tensor, Tensor]:
    columns = zip(*places, strict=True)
    rows, slots = (torch.tensor(next(columns), dtype=torch.int64, device="cpu") for _ in range(2))
    return rows, slots, torch.tensor(next(columns), dtype=torch.float32, device="cpu")


def _put(y: Tensor, rows: Tensor, slots: Tensor, step: Step, out: Tensor) -> None:
    if step.wide:
        out.index_add_(0, rows, y)
    else:
        out[rows, slots] = y
