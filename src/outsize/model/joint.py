"""Where a sub-layer that several ranks hold parts of is made whole: in between, and at its end.

Shapes: T rows, D model width, F inner activations of all ranks, f of this one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor
from torch.nn.functional import pad

from outsize.model.step import Step
from outsize.model_config import Description
from outsize.parallel.collective import Collective, Place, Point

Whole = Callable[[], Tensor]  # waits for the ranks


class Joint(Protocol):
    """How one sub-layer's parts become the whole."""

    def inner(self, x_Tf: Tensor) -> Tensor:
        """What enters this rank's part of the second map."""
        ...

    def outer(self, y: Tensor) -> Whole:
        """(T, D) of what came out of it, once that is called."""
        ...


class Alone:
    """Of a sub-layer that is whole here."""

    def inner(self, x_Tf: Tensor) -> Tensor:
        return x_Tf

    def outer(self, y: Tensor) -> Whole:
        return lambda: y


class Summed:
    """Each rank has some of the inner activations and a partial sum of all outputs."""

    def __init__(self, ranks: Collective, at: Point) -> None:
        self._ranks, self._at = ranks, at

    def inner(self, x_Tf: Tensor) -> Tensor:
        return x_Tf

    def outer(self, y: Tensor) -> Whole:
        return self._ranks.sum(y, self._at).wait


class Gathered:
    """Each rank has some of the inner activations and, of all of them, some outputs: nothing is rounded
    that one rank would not round."""

    def __init__(self, ranks: Collective, at: Point, d: Description) -> None:
        assert d.shard is not None
        self._ranks, self._at = ranks, at
        self._neurons, self._outputs = d.shard.neuron_widths, d.shard.output_widths

    def inner(self, x_Tf: Tensor) -> Tensor:
        return self._ranks.gather(x_Tf, self._at, self._neurons).wait()

    def outer(self, y: Tensor) -> Whole:
        return self._ranks.gather(y, self._at, self._outputs).wait


class Missing:
    """Of a rank without the others: zeros in place of what they would send. For measuring, and estimating."""

    def __init__(self, d: Description) -> None:
        assert d.shard is not None
        self._inner, self._width = d.shard.inner, d.width

    def inner(self, x_Tf: Tensor) -> Tensor:
        return pad(x_Tf, (0, self._inner - x_Tf.shape[1]))

    def outer(self, y: Tensor) -> Whole:
        return lambda: pad(y, (0, self._width - y.shape[1]))


ALONE: Joint = Alone()


class Ends(NamedTuple):
    """What becomes of a body's output: times `scale`, and how ranks' parts become the whole."""

    scale: float = 1.0
    joint: Joint = ALONE


PLAIN_ENDS = Ends()


def in_flight(
    chunks: Sequence[tuple[Tensor, Step]],
    begin: Callable[[Tensor, Step], Whole],
    end: Callable[[Tensor, Step, Whole], None],
) -> None:
    """Begin a chunk before the one before it ends: while ranks exchange what they made of one, the next one
    is computed. (Attention needs the keys of earlier chunks, not their residual streams.)"""
    last: tuple[Tensor, Step, Whole] | None = None
    for h_TD, step in chunks:
        whole = begin(h_TD, step)
        if last is not None:
            end(*last)
        last = h_TD, step, whole
    if last is not None:
        end(*last)


def joint(d: Description, layer: int, place: Place, ranks: Collective | None) -> Joint:
    """Of a sub-layer of a model, which may be a rank's."""
    if d.shard is None or d.shard.world == 1 or d.shard.cut == "layers":
        return ALONE
    if place == "attention" and d.shard.attention == "whole":
        return ALONE
    if ranks is None:
        return Missing(d)
    at = Point(layer, place)
    return Gathered(ranks, at, d) if d.shard.cut == "gather" else Summed(ranks, at)
