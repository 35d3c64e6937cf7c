"""The spec of how ranks share a model, as users write it: `tensor:cut=sum,attention=heads,over=sockets`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

from outsize.errors import OptionError
from outsize.parallel.connect import TRANSPORTS
from outsize.parallel.split import Way

KINDS = ("tensor", "relay")
VALUES: dict[str, tuple[str, ...]] = {
    "cut": ("gather", "sum"),
    "attention": ("whole", "heads"),
    "bits": ("16", "8", "6", "5", "4"),
    "over": TRANSPORTS,
}


@dataclass(frozen=True, slots=True)
class ParallelSpec:
    """`over`: what carries bytes between ranks: "torch" (a gloo group of torch.distributed), "sockets" of our
    own, or "auto": short messages by these, long ones by that."""

    way: Way = field(default_factory=Way)
    over: str = "auto"
    bits: int = 16  # of a number in a sum's message; fewer are lossy

    def __str__(self) -> str:
        if self.way.cut == "layers":
            return f"relay:over={self.over}"
        words = (
            f"cut={self.way.cut},attention={self.way.attention},bits={self.bits},over={self.over}"
        )
        return f"tensor:{words}"

    @property
    def lossy(self) -> str:
        """What changes the model's answers; "" for none."""
        return f"parallel bits={self.bits}" if self.bits < 16 else ""


def parse_parallel(text: str) -> ParallelSpec:
    """Raises OptionError."""
    kind, colon, rest = text.partition(":")
    if kind not in KINDS:
        raise OptionError(f"parallel is {text!r}: {_unknown(kind, KINDS)}")
    known = ("over",) if kind == "relay" else tuple(VALUES)
    told: dict[str, str] = {}
    for part in rest.split(",") if colon else ():
        key, _, value = part.partition("=")
        if key not in known:
            raise OptionError(f"parallel is {text!r}: {_unknown(key, known)}")
        if value not in VALUES[key] or key in told:
            raise OptionError(
                f"parallel is {text!r}: {key} is given once, as {' or '.join(VALUES[key])}"
            )
        told[key] = value
    if kind == "relay":
        return ParallelSpec(Way("layers"), told.get("over", "auto"))
    attention, bits = told.get("attention", "whole"), int(told.get("bits", "16"))
    is_sum = attention == "heads" or bits < 16
    way = Way(told.get("cut", "sum" if is_sum else "gather"), attention)
    if way == Way("gather", "heads"):
        raise OptionError(
            f"parallel is {text!r}: attention=heads gives each rank a part of a sum; write cut=sum, or leave "
            "cut out"
        )
    if bits < 16 and way.cut == "gather":
        raise OptionError(
            f"parallel is {text!r}: cut=gather gives the bits of one rank, and bits={bits} is for sums; "
            "write cut=sum, or leave bits out"
        )
    return ParallelSpec(way, told.get("over", "auto"), bits)


def _unknown(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{word!r} is not known; known are {', '.join(known)}{hint}"
