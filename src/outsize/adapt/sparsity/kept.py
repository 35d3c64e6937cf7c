"""What `outsize adapt sparsity` has done so far, in a file: each layer as it was fitted, and what they were
fitted by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from outsize.adapt import checkpoints
from outsize.adapt.sparsity.layer import Layer
from outsize.arguments import real
from outsize.checkpoint.lora import raw
from outsize.errors import AdapterError, OutsizeError
from outsize.model.predictors.choose import Rule
from outsize.pack.neuron_file import FIRING, MOST_GAP
from outsize.pack.tables import Matrix


def save(path: Path, layers: list[Layer], gap: float, about: Mapping[str, object]) -> None:
    """`gap`: what beginning a read was measured to cost, which the layers were fitted by."""
    tensors: dict[str, Tensor] = {}
    said = []
    for i, layer in enumerate(layers):
        tensors |= {f"{i}|{n}": t for n, t in {**layer.tensors, **layer.vectors}.items()}
        tensors[f"{i}|{FIRING}"] = layer.firing_N
        matrices = {n: [m.encoding, m.num_rows, m.width] for n, m in layer.matrices.items()}
        rule = layer.rule.threshold, layer.rule.gap, layer.rule.exact, layer.runs
        said.append([*rule, layer.missed, layer.kept, matrices, sorted(layer.vectors)])
    checkpoints.save(path, tensors, {**about, "gap": gap, "layers": said})


def resumed(path: Path, about: Mapping[str, object]) -> tuple[list[Layer], float]:
    """The layers that are done, and the gap. Raises AdapterError for a checkpoint of something else."""
    tensors, said = raw(path)
    wrong = [k for k, v in about.items() if said.get(k) != v]
    if wrong:
        raise AdapterError(
            f"{path} is a checkpoint of another run ({', '.join(wrong)} differ); give the flags and files it "
            "was started with, or remove it to begin anew"
        )
    try:
        layers: Any = said["layers"]
        return [_layer(tensors, i, told) for i, told in enumerate(layers)], real(
            "gap", said["gap"], 0, MOST_GAP
        )
    except (KeyError, TypeError, ValueError, OutsizeError) as e:
        raise AdapterError(f"{path} is not a checkpoint of this recipe ({e}); remove it") from None


def _layer(tensors: Mapping[str, Tensor], i: int, told: tuple[Any, ...]) -> Layer:
    """One layer as the checkpoint has it."""
    threshold, gap, exact, runs, missed, kept, matrices, vectors = told
    made = {n: Matrix(kind, rows, width, 0) for n, (kind, rows, width) in matrices.items()}
    names = [f"{n}.{f}" for n, m in made.items() for f in m.specs]
    return Layer(
        made, {n: tensors[f"{i}|{n}"] for n in names}, {n: tensors[f"{i}|{n}"] for n in vectors},
        Rule(float(threshold), None if gap is None else float(gap), bool(exact)), float(runs),
        tensors[f"{i}|{FIRING}"], float(missed), float(kept),
    )  # fmt: skip
