"""One span on its way through the layers of a lazy step: which of its tokens go on, which earlier ones are
revived, and what the last ones attend to.

Shapes: N tokens of the sequence, T rows, D model width.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outsize.forward.groups import chunks
from outsize.forward.inputs import embedded
from outsize.forward.prune import Prune
from outsize.forward.span import NARROW, Span
from outsize.kernels.attended import attended
from outsize.kernels.backend import AttentionSpec
from outsize.kernels.rows import Segment
from outsize.kv.kv import KV
from outsize.kv.pruned import Pruned
from outsize.model.transformer import Transformer
from outsize.model_config import Description

COLUMNS = 64  # of hidden states that are put in another order at once
# Tokens at most that a step of few rows revives at each prune point: beyond, it takes twice as long. One with
# a long span revives a chunk of them, for whose rows there is memory.
REVIVED = 7
LATER = 1e-12  # how much better the later of two tokens is that are attended to alike


class Group(NamedTuple):
    """Rows that run together: their hidden states, in pieces; whether as matmuls (wide), or row by row; and
    which of them choose (`watched`)."""

    pieces: list[Tensor]
    segment: Segment
    wide: bool
    watched: slice
    own_step: bool  # else they may share one with other sequences' rows


class Watch:
    """Tells a part what some rows of a step attend to."""

    def __init__(self, part: Part, rows: slice, positions: Sequence[int]) -> None:
        self.rows, self._part, self._positions = rows, part, positions

    def is_for(self, layer: int) -> bool:
        return layer in self._part.scoring

    def see(self, spec: AttentionSpec, qkv_RN: Tensor, cos_sin: Tensor) -> None:
        kv, layer = self._part.kv, spec.layer
        entries = kv.view(layer), kv.positions[layer]
        shares_S = attended(spec, qkv_RN, cos_sin, self._positions, entries)
        self._part.add(layer, shares_S)


class Part:
    """A span's rows: its own tokens (the fresh ones), those that go on at the front; and earlier ones that
    are revived."""

    def __init__(self, model: Transformer, span: Span, kv: KV) -> None:
        """The cache forgets what is at the span's positions."""
        kv.truncate(span.start)
        d, n = model.description, span.positions.stop
        self.span, self.kv, self._num_layers, self._chunk = span, kv, d.num_layers, model.chunk
        self._prune = span.prune if span.is_lazy and span.prune is not None else Prune()
        self.points = self._prune.points(d.num_layers) if span.is_lazy else {}
        by_point = {at: _scoring(d, at, self._prune.layers) for at in self.points}
        self._by_point, self.scoring = by_point, {i for found in by_point.values() for i in found}
        self._scores: dict[int, Tensor] = {}
        self._h_TD, self._count = embedded(model, [span]), len(span.tokens)
        self._tokens = np.arange(span.start, n)  # of each row; those that go on rise
        self._depth = np.zeros(len(span.tokens), dtype=np.int64)
        self._revives = span.is_lazy and self._prune.mode == "revive"
        self._first = 0 if self._revives else span.start  # of those that are chosen among
        self._alive_N = torch.ones(n, dtype=torch.bool, device="cpu")
        self._stopped_N = self._depths() if self._revives else self._alive_N[:0]
        self._revived: list[tuple[Pruned, NDArray[np.int64]]] = []
        self._revived_TD, self._revived_at = self._h_TD[:0], list[int]()
        kv.torn = kv.torn or span.is_lazy

    @property
    def rows_TD(self) -> Tensor:
        """The residual streams of tokens that went through, and of masks."""
        return self._h_TD[: self._count + self.span.num_masks]

    def begin(self, layer: int) -> bool:
        """So many layers are done; do other rows go on than did before?"""
        if layer not in self.points:
            return False
        self._choose(layer)
        fewer = False if self.span.is_narrow else self._drop_rows()
        return self._revive(layer) or fewer

    def end(self, layer: int) -> None:
        """The rows have been through so many layers."""
        self._depth[: self._count] = layer
        at = 0
        for pruned, rows in self._revived:
            assert pruned.states_PD is not None
            pruned.states_PD[torch.from_numpy(rows)] = self._revived_TD[at : at + len(rows)]
            pruned.depth[rows] = layer
            self._stopped_N[torch.from_numpy(pruned.tokens[rows])] = layer
            at += len(rows)

    def finish(self) -> None:
        """The step has ended: what later ones need to know is kept with the sequence."""
        short = self._depth < self._num_layers
        if short.any():
            states_TD = self._h_TD if self._revives else None
            chosen = slice(None) if self._revives else short
            self.kv.pruned.append(Pruned(self._tokens[chosen], self._depth[chosen], states_TD))
        if self._prune.mode == "drop" and self.points and not self.span.is_narrow:
            self._forget()
        self.kv.torn = False

    def _forget(self) -> None:
        """Of this span, no layer keeps what did not go through all."""
        gone = set(self._tokens[self._depth < self._num_layers].tolist())
        for layer, kept in enumerate(self.kv.positions):
            indices = [i for i, position in enumerate(kept) if position not in gone]
            if len(indices) < len(kept):
                self.kv.keep(layer, indices)

    def groups(self) -> Iterator[Group]:
        """Rows in the order in which they run. Earlier positions go first: later ones attend to them."""
        narrow, revived = self.span.is_narrow, self._revived_at
        together = narrow and len(revived) + self._count <= NARROW
        if not together:
            for some in _pieces(len(revived), self._chunk):
                yield self._group([self._revived_TD[some]], revived[some], own_step=True)
        if narrow:
            early = revived if together else []
            pieces = [self._revived_TD, self._h_TD] if early else [self._h_TD]
            yield self._group(pieces, [*early, *self.span.positions], own_step=False)
            return
        for some in self._cuts():
            rows = self._tokens[some].tolist()
            yield self._group([self._h_TD[some]], rows, own_step=True)

    def _cuts(self) -> list[slice]:
        """The rows in chunks: of a whole span, as a full step cuts it."""
        if self._count < len(self._tokens):
            return _pieces(self._count, self._chunk)
        start = self.span.start
        found = chunks(self.span.positions, self._chunk)
        return [slice(c.start - start, c.stop - start) for c in found]

    def _group(self, pieces: list[Tensor], positions: Sequence[int], own_step: bool) -> Group:
        last = self.span.positions.stop
        first = max(self.span.start, last - self._prune.window)
        watched = slice(bisect_left(positions, first), len(positions))
        masks = self.span.masks
        segment = (
            Segment(self.kv, positions)
            if masks is None
            else Segment(self.kv, positions, masks.anchors, len(masks.rows_KD))
        )
        return Group(pieces, segment, len(positions) > NARROW, watched, own_step)

    def add(self, layer: int, shares_S: Tensor) -> None:
        """What was seen in a layer, by entry."""
        if layer not in self._scores:
            size = len(self._alive_N)
            self._scores[layer] = torch.zeros(size, dtype=torch.float32, device="cpu")
        kept = torch.tensor(self.kv.positions[layer], dtype=torch.int64, device="cpu")
        self._scores[layer][kept] += shares_S

    def _choose(self, layer: int) -> None:
        """Who goes on: of those that still do, the ones that are attended to most, and what chooses."""
        first, n, share = self._first, len(self._alive_N), self.points[layer]
        score_N = torch.stack([self._scores[i] for i in self._by_point[layer]]).sum(0)[first:]
        score_N = score_N.masked_fill(~self._alive_N[first:], -1.0)
        forced = n - first - max(self._prune.window, self.span.want)
        if self.span.is_narrow:
            forced = self.span.start - first
        score_N[max(0, forced) :] += len(self._alive_N)  # more than anything is attended to
        score_N += torch.arange(n - first, dtype=torch.float32, device="cpu") * LATER
        if self._prune.mass is None:
            count = math.ceil(share * (n - first) - 1e-9)
        else:
            count = _holding(score_N, share, max(0, forced))
        count = min(max(1, count, n - first - max(0, forced)), int(self._alive_N[first:].sum()))
        order = first + score_N.topk(count).indices
        self._alive_N[:] = False
        self._alive_N[order] = True
        if self._revives:
            most = REVIVED if self.span.is_narrow else self._chunk
            self._alive_N[order[self._stopped_N[order] == layer][most:]] = False

    def _depths(self) -> Tensor:
        """(N,): layers that each earlier token has been through."""
        out = torch.full((len(self._alive_N),), self._num_layers, dtype=torch.int64, device="cpu")
        for pruned in self.kv.pruned:
            out[torch.from_numpy(pruned.tokens)] = torch.from_numpy(pruned.depth)
        return out

    def _drop_rows(self) -> bool:
        """Rows that go on come to the front; False: all do."""
        goes = self._alive_N.numpy()[self._tokens[: self._count]]
        kept, gone = np.flatnonzero(goes), np.flatnonzero(~goes)
        if not len(gone):
            return False
        order = np.concatenate([kept, gone])
        self._tokens[: self._count] = self._tokens[order]
        self._depth[: self._count] = self._depth[order]
        rows = torch.from_numpy(order if self._revives else kept)
        for column in range(0, self._h_TD.shape[1], COLUMNS):  # little is copied meanwhile
            some = self._h_TD[:, column : column + COLUMNS]
            some[: len(rows)] = some[rows]
        self._count = len(kept)
        return True

    def _revive(self, layer: int) -> bool:
        """Earlier tokens that go on, and were not computed beyond here, are."""
        before, self._revived = len(self._revived_at), []
        if self._revives:
            alive = self._alive_N.numpy()
            for pruned in self.kv.pruned:
                rows = np.flatnonzero((pruned.depth == layer) & alive[pruned.tokens])
                if len(rows):
                    self._revived.append((pruned, rows[np.argsort(pruned.tokens[rows])]))
        self._revived_at = [
            p for pruned, rows in self._revived for p in pruned.tokens[rows].tolist()
        ]
        states = [
            pruned.states_PD[torch.from_numpy(rows)]
            for pruned, rows in self._revived
            if pruned.states_PD is not None
        ]
        self._revived_TD = torch.cat(states) if states else self._h_TD[:0]
        return bool(before or self._revived_at)


def _scoring(d: Description, at: int, count: int) -> list[int]:
    """The layers whose attention chooses who goes on after `at` layers: the last ones, of those that see
    all of a sequence if there are any."""
    seeing = [i for i in range(at) if d.layers[i].window is None]
    return (seeing or list(range(at)))[-count:]


def _holding(score_N: Tensor, share: float, forced: int) -> int:
    """How many tokens hold this share of what is attended to; those from `forced` on do not count."""
    share_N = score_N[:forced].clamp(min=0).sort(descending=True).values.cumsum(0)
    if not len(share_N):
        return len(score_N)
    count = int(torch.searchsorted(share_N, share * share_N[-1])) + 1
    return min(count, forced) + len(score_N) - forced


def _pieces(count: int, most: int) -> list[slice]:
    """So many rows in pieces alike, if possible of a multiple of 64 rows."""
    if not count:
        return []
    size = min(most, math.ceil(count / math.ceil(count / most) / 64) * 64)
    return [slice(at, min(count, at + size)) for at in range(0, count, size)]
