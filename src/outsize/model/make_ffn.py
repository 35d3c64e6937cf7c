"""Which feed-forward sub-layer a layer has, and what it is made of beside its own weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from outsize.model.ffn.nested import nested_sublayer
from outsize.model.half import Runnable
from outsize.model.memory_sublayer import memory_sublayer
from outsize.model.sublayer import beside_sublayer, ffn_sublayer, mixture_sublayer
from outsize.model.token_sublayer import layer_end
from outsize.model.width import Nested
from outsize.model_config import Description
from outsize.parallel.collective import Collective
from outsize.storage.table import Weights
from outsize.weights.load import Loaded


def ffn_maker(
    d: Description, layer: int, over: tuple[Loaded, Nested], ranks: Collective | None
) -> Callable[[Weights], Runnable]:
    """What builds a layer's feed-forward over weights in memory."""
    make = _bare(d.of_layer(layer), layer, over, ranks)
    is_mixed = d.mixture is not None and not d.layers[layer].dense  # ends the layer itself
    ends = d.token_width or d.out_scale
    return partial(layer_end, d, layer, make) if ends and not is_mixed else make


def _bare(
    d: Description, layer: int, over: tuple[Loaded, Nested], ranks: Collective | None
) -> Callable[[Weights], Runnable]:
    loaded, nested = over
    bank = next((bank for bank in loaded.banks if bank.layer == layer), None)
    if bank is not None and nested.count:
        return partial(nested_sublayer, d, nested, bank)
    if bank is not None:
        if d.mixture is not None and d.mixture.beside:
            return partial(beside_sublayer, d, bank)
        return partial(mixture_sublayer, d, bank, ranks=ranks)
    if d.memory is not None:
        return partial(memory_sublayer, d, layer, loaded.final_norm)
    return partial(ffn_sublayer, d, layer, ranks=ranks)
