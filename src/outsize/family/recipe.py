"""What a family makes of a checkpoint's config: the description, and what the file calls its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from outsize.model_config import Description


@dataclass(frozen=True, slots=True)
class Strip:
    """Of a foreign tensor under our name `whole`: of each `every` rows, `size` from number `first` on."""

    whole: str
    first: int
    size: int
    every: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """A description, and where a checkpoint keeps what it describes."""

    description: Description
    names: Mapping[str, str]  # our name -> foreign name; {i} is the layer
    interleaved: bool  # foreign query/key rows already rotate in adjacent pairs
    norm_shift: float = 0.0  # added to norm weights (families that store w - 1)
    paired: bool = False  # experts as one stack, transposed, rows of gate and up in turn
    turned: bool = False  # experts as one stack, transposed, gate's rows before up's
    spares: tuple[str, ...] = ()  # patterns of foreign tensors that a text model needs not
    strips: Mapping[str, Strip] = field(
        default_factory=dict
    )  # our names of parts of others' tensors
    # Of a layer, our names of tensors that it has not, and whose it uses in their place.
    instead: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    unused_positions: int = 0  # rows before the first position's in a table of learned positions
