"""A student whose tables learn: the levels and steps of its palettes, and the norms before its sub-layers.
The codes stay, so that what is learned costs nothing when the model runs.

A parameter is what a number grows by, relative to itself (of levels: to the largest); all begin at zero,
where the pack is what it was, bit for bit.
Shapes: J tiles of 16 rows, L levels, G groups (or blocks, where steps are whole numbers), N rows, K inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from outsize.adapt.change import Change
from outsize.adapt.rewrite import vector
from outsize.adapt.statistics import TENSORS
from outsize.adapt.trainable import TrainableModel
from outsize.encoding.levels import MOST
from outsize.errors import UnsupportedError
from outsize.kernels.palettes import FORMS, TILE, row_codes
from outsize.pack.format import Pack
from outsize.pack.tensors import Made
from outsize.storage.records import Records
from outsize.storage.table import Weight

NORMS = ("attn_norm", "ffn_norm")
Key = tuple[int, str]


class _Weights(torch.autograd.Function):
    """(N, K) of codes, levels and steps: level[code] * step."""

    @staticmethod
    def forward(
        ctx: Any, code_JM: Tensor, level_JL: Tensor, step_NG: Tensor, kind: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(code_JM, level_JL, step_NG)
        found = level_JL.gather(1, code_JM.long()).view(*step_NG.shape, -1)
        return (found * step_NG[..., None]).flatten(1).to(kind)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor, None]:
        code_JM, level_JL, step_NG = ctx.saved_tensors
        index, shape = code_JM.long(), step_NG.shape
        grad = grads[0].float().view(*shape, -1)
        found = level_JL.gather(1, index).view(*shape, -1)
        pulled = (grad * step_NG[..., None]).view(index.shape)
        levels = torch.zeros_like(level_JL).scatter_add_(1, index, pulled)
        return None, levels, (grad * found).sum(dim=2), None


class Palettes:
    """One matrix: its codes, and the tables that it begins with."""

    def __init__(self, piece: Weight, device: torch.device) -> None:
        self.name, self.fields = piece.encoding.name, piece.fields
        form = FORMS[self.name]
        tiles, groups, _ = piece.fields["step"].shape
        self.num_rows, self.width = piece.num_rows, groups * form.group
        rows = torch.arange(TILE * tiles, device="cpu")
        codes = row_codes(form.bits, piece.fields["codes"], rows)
        self.code_JM = codes.reshape(tiles, -1).to(torch.uint8).to(device)
        self.level_JL = piece.fields["levels"].float().to(device)
        self.step_NG = _by_row(self._steps()).to(device)
        self._learned = "block" if form.step == "int8" else "step"
        self.shape = piece.fields[self._learned].shape  # of what a step's parameter is of

    def _steps(self) -> Tensor:
        """(J, G, 16) of the groups' steps."""
        step = self.fields["step"].float()
        if "block" not in self.fields:
            return step
        block = self.fields["block"].float()
        return step * block.repeat_interleave(step.shape[1] // block.shape[1], dim=1)

    def weight(self, levels: Tensor, steps: Tensor, kind: torch.dtype) -> Tensor:
        """(N, K) with tables that have grown so much."""
        level_JL = self.level_JL + MOST * levels
        whole = level_JL + (level_JL.round().clamp(-MOST, MOST) - level_JL).detach()
        grown = _by_row(1 + steps)
        step_NG = self.step_NG * grown.repeat_interleave(
            self.step_NG.shape[1] // grown.shape[1], dim=1
        )
        made = torch.as_tensor(_Weights.apply(self.code_JM, whole, step_NG, kind))  # type: ignore[no-untyped-call]
        return made[: self.num_rows]

    def stored(self, levels: Tensor, steps: Tensor) -> Mapping[str, Tensor]:
        """The fields that a pack holds then."""
        level = self.fields["levels"].float() + MOST * levels.detach().float().cpu()
        before = self.fields[self._learned]
        step = (before.float() * (1 + steps.detach().float().cpu())).to(before.dtype)
        changed = {"levels": level.round().clamp(-MOST, MOST).to(torch.int8), self._learned: step}
        return {**self.fields, **changed}


def _by_row(step_JGT: Tensor) -> Tensor:
    """(J, G, 16) -> (N, G)."""
    return step_JGT.transpose(1, 2).flatten(0, 1)


class TableStudent:
    """A `Student`."""

    kind, use = "tables", "-m "

    def __init__(self, model: TrainableModel, pack: Pack, records: Records) -> None:
        """Raises UnsupportedError where there is no table."""
        self.model, self._layers = model, model.description.num_layers
        self.palettes: dict[Key, Palettes] = {}
        for layer in range(self._layers):
            for name in TENSORS:
                pieces = records.weights(layer, name)
                if len(pieces) == 1 and "levels" in pieces[0].fields:
                    self.palettes[layer, name] = Palettes(pieces[0], model.device)
        if not self.palettes:
            raise UnsupportedError(
                f"{pack.path.name} has no palettes with tables of their own; --tables is for what `outsize "
                "pack --bits` makes, and --rank N for any pack that was made from another"
            )
        self.norms = {
            (layer, name): records.weights(layer, name)
            for layer in range(self._layers)
            for name in NORMS
            if model.description.pre_norm
        }
        self.parameters = {name: p.requires_grad_() for name, p in self._new()}

    def _new(self) -> list[tuple[str, Tensor]]:
        zeros = partial(torch.zeros, dtype=torch.float32, device=self.model.device)
        out = list[tuple[str, Tensor]]()
        for (layer, name), p in self.palettes.items():
            out.append((f"{layer}.{name}.levels", zeros(p.level_JL.shape)))
            out.append((f"{layer}.{name}.step", zeros(p.shape)))
        width = self.model.description.width
        return out + [(f"{layer}.{name}", zeros((width,))) for layer, name in self.norms]

    def change(self, step: int | None) -> Change:
        return _Tables(self)

    def about(self) -> dict[str, object]:
        return {}

    def grown(self, key: Key) -> tuple[Tensor, Tensor]:
        """What a matrix's levels and steps have grown by."""
        layer, name = key
        return self.parameters[f"{layer}.{name}.levels"], self.parameters[f"{layer}.{name}.step"]

    def made(self) -> dict[Key, tuple[Made, ...]]:
        """What a pack holds in place of its own."""
        out: dict[Key, tuple[Made, ...]] = {}
        for key, p in self.palettes.items():
            fields = partial(p.stored, *self.grown(key))
            out[key] = (Made(p.name, p.num_rows, p.width, fields),)
        for (layer, name), pieces in self.norms.items():
            now = torch.cat([w.encoding.decode(w.fields).flatten() for w in pieces])
            grown = self.parameters[f"{layer}.{name}"].detach().cpu()
            out[layer, name] = vector(now * (1 + grown))
        return out


class _Tables(Change):
    """The numbers of palettes whose tables have grown."""

    def __init__(self, student: TableStudent) -> None:
        self._student = student

    def weight(self, w: Tensor, x: Tensor, layer: int, name: str) -> Tensor:
        p = self._student.palettes.get((layer, name))
        return w if p is None else p.weight(*self._student.grown((layer, name)), w.dtype)

    def vector(self, v: Tensor, layer: int, name: str) -> Tensor:
        grown = self._student.parameters.get(f"{layer}.{name}")
        return v if grown is None else v * (1 + grown)
