"""A student with low-rank factors beside its maps: an ordinary LoRA adapter, for the pack as it is.

Factors may begin in closed form: of the error that a pack's codes leave in a map, W - Wq, the part of rank r
that matters most for the map's inputs, as their second moment H = L L^T says: with the best r singular
vectors of (W - Wq) L = U S V^T, B A = U S V^T L^-1.
Shapes: N rows, K inputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from outsize.adapt.change import Change
from outsize.adapt.deltas import Deltas
from outsize.adapt.statistics import Inputs
from outsize.adapt.trainable import TrainableModel
from outsize.errors import DataError, OptionError
from outsize.model.lora import STACKS, widths
from outsize.model_config import Description
from outsize.progress import Progress
from outsize.storage.records import Records

DAMPING = 0.01  # of the mean square input, added to each
Factors = dict[str, Tensor]  # "{layer}.{projection}.A" (R, K) and ".B" (N, R), fp32


class LoraStudent:
    """A `Student`. `kind`: what the file will say it is."""

    use = "--adapter NAME="

    def __init__(self, model: TrainableModel, factors: Mapping[str, Tensor], kind: str) -> None:
        self.model, self.kind = model, kind
        made = {name: f.to(model.device, torch.float32).clone() for name, f in factors.items()}
        self.parameters = {name: f.requires_grad_() for name, f in made.items()}

    def change(self, step: int | None) -> Change:
        """As it will be written, in bf16, where there is no step."""
        p = self.parameters
        used = p if step is not None else {k: v.detach().bfloat16().float() for k, v in p.items()}
        names = [name[:-2] for name in used if name.endswith(".A")]
        return Deltas({n: (used[f"{n}.A"], used[f"{n}.B"]) for n in names}, 1.0)

    def about(self) -> dict[str, object]:
        return {"rows": "adjacent", "scale": 1.0}


def check_rank(d: Description, rank: int) -> None:
    """Raises OptionError for more than a map has."""
    most = min(min(pair) for pair in widths(d).values())
    if not 0 < rank <= most:
        raise OptionError(
            f"rank is {rank}; from 1 to {most:,} is expected, what the narrowest map has"
        )


def nothing(d: Description, rank: int, seed: int) -> Factors:
    """Factors that add nothing yet."""
    generator, out = torch.Generator().manual_seed(seed), Factors()
    for layer in range(d.num_layers):
        for name, (num_rows, width) in widths(d).items():
            a = torch.empty(rank, width)
            out[f"{layer}.{name}.A"] = a.normal_(0, 1 / math.sqrt(width), generator=generator)
            out[f"{layer}.{name}.B"] = torch.zeros(num_rows, rank)
    return out


def closed_form(
    inputs: Inputs, records: tuple[Records, Records], d: Description, rank: int, progress: Progress
) -> Factors:
    """What adds back most of what the codes lost. `inputs`: of the model that factors are added to;
    `records`: of what it was made from, and its own. Raises DataError."""
    source, own = records
    known, out = widths(d), Factors()
    for layer in range(d.num_layers):
        progress("factors in closed form", layer, d.num_layers)
        for stack, moment_KK in inputs.next().items():
            lower = _lower(moment_KK)
            lost = (source.layer(layer, stack) - own.layer(layer, stack)).to(lower.device)
            sizes = [known[name][0] for name in STACKS[stack]]
            for name, lost_NK in zip(STACKS[stack], lost.split(sizes), strict=True):
                a, b = best(lost_NK, lower, rank)
                out[f"{layer}.{name}.A"], out[f"{layer}.{name}.B"] = a, b
    return out


def _lower(moment_KK: Tensor) -> Tensor:
    damped = moment_KK.clone()
    damped.diagonal().add_(DAMPING * float(moment_KK.diagonal().mean()) + 1e-12)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed != 0 or not bool(torch.isfinite(lower).all()):
        raise DataError(
            "the text gives this model inputs that are no finite numbers; give another one"
        )
    return torch.as_tensor(lower)


def best(lost_NK: Tensor, lower_KK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (R, K) and B (N, R) whose product is nearest to a matrix, for inputs of that second moment."""
    seen_NK = lost_NK @ lower_KK
    if len(seen_NK) <= seen_NK.shape[1]:
        u_NR = _largest(seen_NK @ seen_NK.T, rank)
        right_RK = u_NR.T @ seen_NK
    else:
        v_KR = _largest(seen_NK.T @ seen_NK, rank)
        u_NR, right_RK = seen_NK @ v_KR, v_KR.T
    left, right = u_NR.norm(dim=0), right_RK.norm(dim=1)
    size = (left * right).sqrt()
    b_NR = u_NR * (size / left.clamp_min(1e-30))
    scaled = right_RK * (size / right.clamp_min(1e-30))[:, None]
    a_RK = torch.linalg.solve_triangular(lower_KK, scaled, upper=False, left=False)
    return a_RK.contiguous(), b_NR.contiguous()


def _largest(square: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, side by side."""
    found: Tensor = torch.linalg.eigh(square.double()).eigenvectors[:, -rank:]
    return found.float()
