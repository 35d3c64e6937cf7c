"""Reads a LoRA adapter's file for a model, and checks its factors against the model's shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from outsize.checkpoint import lora as files
from outsize.checkpoint.lora import AdapterFile, Factors
from outsize.checkpoint.lora_base import are_other
from outsize.log import warn
from outsize.model.lora import Adapter, OfLayers, Sliced, check_shapes
from outsize.model_config import Description
from outsize.pack.format import Pack
from outsize.pack.outline import Outline, of_pack

MTP = "masks"  # what the header of a multi-token prediction drafter says it is


def read_adapter(pack: Pack, name: str, path: Path) -> Adapter:
    """A LoRA adapter for a dense model, for which `plan.beside` has found room. Raises AdapterError."""
    file = files.load(path)
    base, ours = file.about.get("base_name"), (pack.source.spec, pack.source.files[0][0])
    if isinstance(base, str) and are_other(base, ours):
        warn(
            f"{path} says that it was trained on {base}, and this model is {pack.source.spec}: its "
            "shapes fit, but over another base an adapter may do anything; use its own"
        )
    return additions(name, file, of_pack(pack))


def additions(name: str, file: AdapterFile, model: Outline, coarse: bool = False) -> Adapter:
    """A file's low-rank factors, if they are finite and this model's (its base's hash is compared where it is
    known). `coarse`: of a drafter, whose tokens are verified: kept in eight bits, and trained for this model
    or for the one whose numbers this one's were made from. Raises AdapterError."""
    d, sha256, kin = model.description, model.sha256, model.kin
    if d.shard is not None:  # its numbers are the model's
        sha256, kin = kin[0], kin[1:]
    if sha256:
        files.same_base(file, sha256, model.name, kin if coarse else ())
    factors = Factors(file, d.head_dim)
    check_shapes(name, d, factors.shapes)
    files.finite(file, [f"{name}.{factor}" for name in factors for factor in "AB"])
    return Adapter(name, d, _own(factors, d), file.scale, coarse)


def _own(factors: Factors, d: Description) -> Mapping[str, tuple[Tensor, Tensor]]:
    """A rank's part of them."""
    if d.shard is None:
        return factors
    if d.shard.cut == "layers":
        return OfLayers(factors, range(*d.shard.layers))
    return Sliced(factors, d.shard, d.head_dim)
