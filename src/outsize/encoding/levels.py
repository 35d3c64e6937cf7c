"""Levels that are fitted to weights: for each tile of 16 rows a table of its own, by one-dimensional k-means.

A group's step is begun as its largest weight, and then the one that loses least with the levels there are.
Weights count as much as their inputs say (`h`: the mean square of each, where it is known).

Shapes: N rows (a multiple of 16), K inputs, J tiles of 16 rows, G groups, L levels, M weights of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from outsize.kernels.palettes import TILE, Form

BINS, REACH = 2048, 1.3  # of the histogram, which is of numbers from -REACH to REACH
ROUNDS = 30  # of Lloyd's rule: the centres hardly move after them
MOST = 127  # the largest level
LEAST = 1e-3  # of the mean `h`, that every input counts


class Fitted(NamedTuple):
    """Steps as they should be, not rounded to what is stored; and levels, in rising order."""

    step_NG: Tensor  # fp32
    levels_JL: Tensor  # int8


def fit(form: Form, w_NK: Tensor, h_K: Tensor | None = None) -> Fitted:
    """Steps and levels for a matrix, fp32."""
    count, (num_rows, width) = 1 << form.bits, w_NK.shape
    groups = w_NK.view(num_rows, -1, form.group)
    h = (
        torch.ones(width, dtype=torch.float32, device="cpu")
        if h_K is None
        else h_K.clamp_min(float(h_K.mean()) * LEAST)
    )
    h_G = (h / h.mean().clamp_min(1e-30)).view(1, -1, form.group)
    step = groups.abs().amax(dim=2).clamp_min(1e-30)
    centres = _centres(groups, step, h_G, count)
    nearest = _nearest(groups / step[..., None], centres)
    over = (nearest * groups * h_G).sum(dim=2)
    under = (nearest.square() * h_G).sum(dim=2)
    step = torch.where(under > 0, over / under.clamp_min(1e-30), step).clamp_min(1e-30)
    centres = _centres(groups, step, h_G, count)
    top = centres.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    levels = (centres * (MOST / top)).round().to(torch.int8)
    step = step * (top / MOST).repeat_interleave(TILE, dim=0)
    return Fitted(step.masked_fill(groups.abs().amax(dim=2) == 0, 0), levels)


def _centres(groups: Tensor, step: Tensor, h_G: Tensor, count: int) -> Tensor:
    tiles = len(groups) // TILE
    x = (groups / step[..., None]).view(tiles, -1)
    weight = (h_G * step[..., None].square()).expand_as(groups).reshape(tiles, -1)
    return kmeans(x, weight / weight.amax(dim=1, keepdim=True).clamp_min(1e-38), count)


def _nearest(scaled: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre to each number."""
    x = scaled.view(len(centres), -1)
    at = torch.searchsorted(between(centres), x)
    return centres.gather(1, at).view_as(scaled)


def between(levels_JL: Tensor) -> Tensor:
    """Where numbers begin to be nearer to the next level, for torch.searchsorted."""
    levels = levels_JL.float()
    return ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()


def kmeans(x_JM: Tensor, weight_JM: Tensor, count: int) -> Tensor:
    """(J, count) centres in rising order for numbers of about -1 to 1: Lloyd's rule on sums over a histogram,
    begun where the cube root of the density puts equally many."""
    num, scale = len(x_JM), (BINS - 1) / (2 * REACH)
    at = ((x_JM.clamp(-REACH, REACH) + REACH) * scale).round_().long()
    zero = torch.zeros(num, BINS, dtype=torch.float32, device="cpu")
    mass = zero.scatter_add(1, at, weight_JM)
    moment = zero.scatter_add(1, at, weight_JM * x_JM)
    mass_to, moment_to = (pad(s.double().cumsum(1), (1, 0)) for s in (mass, moment))
    density = mass.pow(1 / 3).double().cumsum(1)
    quantiles = (
        (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) / count * density[:, -1:]
    )
    first = torch.searchsorted(density, quantiles.contiguous()).clamp_max(BINS - 1)
    grid = torch.linspace(-REACH, REACH, BINS, dtype=torch.float32, device="cpu")
    centres = grid[first]
    ends = torch.full((num, 1), BINS, dtype=torch.int64, device="cpu")
    for _ in range(ROUNDS):
        cut = ((between(centres) + REACH) * scale + 0.5).long().clamp(0, BINS)
        cut = torch.cat([torch.zeros_like(ends), cut, ends], dim=1)
        heavy, pull = (to.gather(1, cut).diff(dim=1) for to in (mass_to, moment_to))
        moved = (pull / heavy.clamp_min(1e-30)).float()
        centres = torch.where(heavy > 0, moved, centres).sort(dim=1).values
    return centres
