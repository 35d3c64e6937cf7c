"""Low ranks of tables: which directions of a layer are kept, alike in all layers or where they count.

Shapes: D width, R numbers that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def bases(moments: Sequence[Tensor], share: float, step: int, by_layer: bool) -> list[Tensor]:
    """(D, R) of each layer, orthonormal: the first directions of its values' second moment (D, D). R is a
    multiple of `step`; in all a `share` of the width, and `by_layer`: more where more is lost."""
    found = [torch.linalg.eigh(m.double()) for m in moments]
    energies = [values.flip(0).clamp_min(0) for values, _ in found]
    width = len(energies[0])
    whole = max(1, round(share * width / step))
    counts = _by_energy(energies, whole, step) if by_layer else [whole] * len(found)
    return [
        vectors.flip(1)[:, : count * step].float().contiguous()
        for (_, vectors), count in zip(found, counts, strict=True)
    ]


def _by_energy(energies: Sequence[Tensor], whole: int, step: int) -> list[int]:
    """Blocks of directions of each layer, at least one: those of most energy of all layers' together."""
    blocks = [
        (float(energy[at : at + step].sum()), layer)
        for layer, energy in enumerate(energies)
        for at in range(step, len(energy) // step * step, step)
    ]
    counts = [1] * len(energies)
    for _, layer in sorted(blocks, reverse=True)[: (whole - 1) * len(energies)]:
        counts[layer] += 1
    return counts
