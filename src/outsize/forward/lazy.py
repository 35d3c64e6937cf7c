"""Lazy prefill: tokens of a prompt that its last ones hardly attend to skip the later layers (LazyLLM,
arXiv 2407.14057). Lossy; spans that ask for nothing run beside, in full.

As the full pass (full.py), it runs one sub-layer after another over all rows, so that weights are fetched
once a step. At some layers the rows that go on are chosen anew: those that the last rows attend to most go
on, at their own positions, and the others' hidden states stay behind. While decoding, a token that the newest
one attends to may be revived: it is computed from where it stopped, and its keys and values are sorted in. So
each (token, layer) pair is computed once at most.

Laws: where nothing is pruned, the bits of `full`; each span's answer is its own, whatever runs beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from outsize.errors import OptionError
from outsize.forward.full import full, outs
from outsize.forward.groups import added
from outsize.forward.part import Group, Part, Watch
from outsize.forward.span import Out, Span, widths
from outsize.kv.kv import KV
from outsize.model.step import Step
from outsize.model.transformer import Transformer

Owned = tuple[Part, Group]


@torch.inference_mode()
def lazy(model: Transformer, spans: Sequence[Span], kvs: Sequence[KV]) -> list[Out]:
    """The `Forward` that heeds `Span.prune`; without one it is `full`. Appends to the caches."""
    if not any(span.is_lazy for span in spans):
        return full(model, spans, kvs)
    if model.leader is not None:
        raise OptionError("lazy prompts are not run by several ranks; use prefill full")
    parts = [Part(model, span, kv) for span, kv in zip(spans, kvs, strict=True)]
    model.begin(True)
    points = {at for part in parts for at in part.points}
    stage = _Stage(model, parts)
    for start, end in pairwise(sorted({0, model.description.num_layers, *points})):
        changed = [part.begin(start) for part in parts]
        if any(changed):
            stage = _Stage(model, parts)
        stage.run(start, end)
        for part in parts:
            part.end(end)
    model.memory.end_pass()
    for part in parts:
        part.finish()
    return outs(model, spans, [part.rows_TD for part in parts])


class _Stage:
    """Layers that the same rows go through."""

    def __init__(self, model: Transformer, parts: Sequence[Part]) -> None:
        groups = [(part, group) for part in parts for group in part.groups()]
        self._model = model
        self._chunks = [(g.pieces[0], _step(model, [(p, g)])) for p, g in groups if g.own_step]
        self._pieces = [piece for _, g in groups if not g.own_step for piece in g.pieces]
        self._h_TD = torch.cat(self._pieces) if self._pieces else None
        if self._h_TD is not None:
            shared = [(p, g) for p, g in groups if not g.own_step]
            self._chunks.append((self._h_TD, _step(model, shared)))
        self._is_long = any(step.wide for _, step in self._chunks)

    def run(self, start: int, end: int) -> None:
        """Through layers `start` to `end` - 1. Changes the parts' hidden states."""
        for layer in self._model.paged_layers[2 * start : 2 * end]:
            layer(self._chunks)
            if self._is_long:
                self._model.memory.trim()
        if self._h_TD is not None:
            sizes = [len(piece) for piece in self._pieces]
            for piece, h in zip(self._pieces, self._h_TD.split(sizes), strict=True):
                piece.copy_(h)


def _step(model: Transformer, groups: Sequence[Owned]) -> Step:
    """A step of these rows, with those watched that choose."""
    segments, spans = [g.segment for _, g in groups], [part.span for part, _ in groups]
    watches, at = list[Watch](), 0
    for part, g in groups:
        if part.scoring and g.watched.start < g.watched.stop:
            rows = slice(at + g.watched.start, at + g.watched.stop)
            watches.append(Watch(part, rows, g.segment.positions[g.watched]))
        at += g.segment.length
    wide = any(g.wide for _, g in groups)
    made = model.step(segments, wide, list(added(segments, spans)), watches)
    return replace(made, widths=list(widths(segments, spans)))
