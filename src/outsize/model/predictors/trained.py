"""The paper's predictor, low-rank and trained, with one logit for each bundle instead of each neuron (LLM
in a flash, section 3.1): a balanced cross-entropy over those that are worth computing; `trained:64` of
rank 64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, linear, relu

from outsize.model.predictors.predictor import Fitted, Maps, Sample, whole_size

RANK, LEAST, MOST = 64, 16, 4096
STEPS, BATCH, RATE = 500, 512, 2e-2
MOST_SEEN = 1 << 22  # energies that the floor is taken from


def check(size: str) -> None:
    """Raises OptionError for a size that is none."""
    whole_size("trained", size, RANK, LEAST, MOST)


def fit(sample: Sample, size: str) -> Fitted:
    """The same sample gives the same matrices."""
    rank = whole_size("trained", size, RANK, LEAST, MOST)
    scale = float(sample.x_TD.square().sum(1).mean().sqrt().clamp_min(1e-12))
    x_TD, bundles = sample.x_TD / scale, sample.energy_TN.shape[1]
    floor = torch.quantile(sample.energy_TN.flatten()[:MOST_SEEN], 1 - sample.share)
    is_due = (sample.energy_TN > floor).float()
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad():
        a_RD, b_NR = (
            torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")
            for shape in ((rank, x_TD.shape[1]), (bundles, rank))
        )
        b_NR /= rank**0.5
        _descend(x_TD.clone(), is_due.clone(), (a_RD, b_NR), sample.share)
    return Fitted({"a": ("int8", a_RD.detach() / scale), "b": ("int8", b_NR.detach())}, {})


def _descend(x_TD: Tensor, is_due_TN: Tensor, factors: tuple[Tensor, Tensor], share: float) -> None:
    """Changes the factors."""
    a_RD, b_NR = (f.requires_grad_() for f in factors)
    generator = torch.Generator().manual_seed(1)
    # What is due and what is not count alike.
    weight = torch.tensor((1 - share) / max(share, 1e-3), dtype=torch.float32, device="cpu")
    optimizer = torch.optim.Adam([a_RD, b_NR], lr=RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        rows = torch.randint(
            len(x_TD), (BATCH,), generator=generator, dtype=torch.int64, device="cpu"
        )
        logits = linear(relu(linear(x_TD[rows], a_RD)), b_NR)
        loss = binary_cross_entropy_with_logits(logits, is_due_TN[rows], pos_weight=weight)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def scores(maps: Maps, x_TD: Tensor) -> Tensor:
    inner = maps.matrices["a"](x_TD, False)
    return maps.matrices["b"](relu(inner), False).float()
