"""A model whose last layers make queries alone, and read the keys and values of earlier ones."""

from __future__ import annotations

from dataclasses import replace

from outsize.errors import OptionError
from outsize.model_config import Description


def share_keys(d: Description, count: int) -> Description:
    """The model whose last `count` layers make queries alone and read the keys and values of the last layer
    before them that turns and sees as they do. Raises OptionError."""
    first = d.num_layers - count
    if d.num_kv_layers < d.num_layers or not 0 < count < d.num_layers:
        raise OptionError(
            f"{count} of {d.num_layers} layers are to share keys and values; from 1 to "
            f"{d.num_layers - 1} can, in a model where none does yet"
        )
    layers = list(d.layers)
    for i in range(first, d.num_layers):
        alike = [j for j in range(first) if d.layers[j] == d.layers[i]]
        if not alike:
            raise OptionError(
                f"layer {i} sees or turns as none of the first {first} layers does, whose keys and values it "
                "would read; let fewer layers share"
            )
        layers[i] = replace(d.layers[i], shares=alike[-1])
    return replace(d, layers=tuple(layers))
