"""The spec of how ranks share a model, as users write it: `tensor:cut=sum,attention=heads,over=sockets`,
`runahead:cuts=0.6/0.4`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from outsize.errors import OptionError
from outsize.parallel.connect import TRANSPORTS
from outsize.parallel.points import AUTO, parse_dropped
from outsize.parallel.slow import Slow, parse_link
from outsize.parallel.split import Way
from outsize.parallel.transport import Transport

KINDS = ("tensor", "relay", "experts", "runahead")
FREE = {
    "link": "RATE[+LATENCY], as 100Mbit/s+0.1ms",
    "drop": "auto, or numbers of layers as 3+7-9",
    "sync": "a file of `outsize adapt sync`",
    "cuts": "auto, even, or a share for each rank, as 0.6/0.4",
}
CUTS = ("auto", "even")
VALUES: dict[str, tuple[str, ...]] = {
    "cut": ("gather", "sum"),
    "attention": ("whole", "heads"),
    "bits": ("16", "8", "6", "5", "4"),
    "over": TRANSPORTS,
}

KNOWN = {
    "tensor": (*VALUES, "link", "drop", "sync"),
    "relay": ("over", "link"),
    "experts": ("over", "link"),
    "runahead": ("cuts", "over", "link"),
}


@dataclass(frozen=True, slots=True)
class ParallelSpec:
    """`over`: what carries bytes between ranks: "torch" (a gloo group of torch.distributed), "sockets" of our
    own, or "auto": short messages by these, long ones by that."""

    way: Way = field(default_factory=Way)
    over: str = "auto"
    bits: int = 16  # of a number in a sum's message; fewer are lossy
    link: str = ""  # as slow as which each connection is made, for trying out; "": as it is
    cuts: str = "auto"  # of a prompt between ranks that have the whole model each
    drop: str = ""  # layers whose attention is not summed: auto (a file's), or as 3+7-9; lossy
    sync: str = ""  # the file; "": that beside the pack

    def __str__(self) -> str:
        return self._words() + (f",link={self.link}" if self.link else "")

    def _words(self) -> str:
        if self.way.cut == "whole":
            return f"runahead:cuts={self.cuts},over={self.over}"
        if self.way.cut in ("layers", "experts"):
            return f"{'relay' if self.way.cut == 'layers' else 'experts'}:over={self.over}"
        words = f"cut={self.way.cut},attention={self.way.attention},over={self.over}"
        words += f",drop={self.drop}" if self.drop else ""
        words += f",bits={self.bits}" if self.drop != AUTO else ""
        return f"tensor:{words}"

    def slowed(self, transport: Transport) -> Transport:
        """With the link that is asked for (slow.py). Raises OptionError."""
        return Slow(transport, parse_link(self.link.replace("+", ","))) if self.link else transport

    @property
    def shares(self) -> tuple[float, ...]:
        """Of a prompt, one each in order of the chain; none where the spec gives none."""
        return () if self.cuts in CUTS else tuple(map(float, self.cuts.split("/")))

    @property
    def lossy(self) -> str:
        """What changes the model's answers; "" for none."""
        drop = f"drop={self.drop}" if self.drop else ""
        words = [f"bits={self.bits}"] * (self.bits < 16) + [drop] * bool(drop)
        return f"parallel {','.join(words)}" if words else ""


def parse_parallel(text: str) -> ParallelSpec:
    """Raises OptionError."""
    kind, colon, rest = text.partition(":")
    if kind not in KINDS:
        raise OptionError(f"parallel is {text!r}: {_unknown(kind, KINDS)}")
    known = KNOWN[kind]
    told: dict[str, str] = {}
    for part in rest.split(",") if colon else ():
        key, _, value = part.partition("=")
        if key not in known:
            raise OptionError(f"parallel is {text!r}: {_unknown(key, known)}")
        good = bool(value) if key in FREE else value in VALUES[key]
        if key in told or not good or (key == "cuts" and not _is_cuts(value)):
            said = FREE[key] if key in FREE else " or ".join(VALUES[key])
            raise OptionError(f"parallel is {text!r}: {key} is given once, as {said}")
        told[key] = value
    parse_link(told.get("link", "1Gbit/s").replace("+", ","))
    if kind in ("relay", "experts"):
        way = Way("layers" if kind == "relay" else "experts")
        return ParallelSpec(way, told.get("over", "auto"), link=told.get("link", ""))
    if kind == "runahead":
        return ParallelSpec(
            Way("whole"),
            told.get("over", "auto"),
            link=told.get("link", ""),
            cuts=told.get("cuts", "auto"),
        )
    return _tensor(text, told)


def _tensor(text: str, told: Mapping[str, str]) -> ParallelSpec:
    drop = told.get("drop", "auto" if "sync" in told else "")
    parse_dropped(drop)
    attention = told.get("attention", "heads" if drop else "whole")
    bits = int(told.get("bits", "16"))
    if drop and attention == "whole":
        raise OptionError(
            f"parallel is {text!r}: drop leaves out sums after attention, and attention=whole has none; "
            "leave one of them out"
        )
    if (drop == AUTO and "bits" in told) or ("sync" in told and drop != AUTO):
        raise OptionError(
            f"parallel is {text!r}: the file of drop=auto says how many bits each sum has, and which layers "
            "have none; leave the others out"
        )
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
    return ParallelSpec(
        way,
        told.get("over", "auto"),
        bits,
        link=told.get("link", ""),
        drop=drop,
        sync=told.get("sync", ""),
    )


def _is_cuts(text: str) -> bool:
    try:
        return text in CUTS or all(0 < float(share) < inf for share in text.split("/"))
    except ValueError:
        return False


def _unknown(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{word!r} is not known; known are {', '.join(known)}{hint}"
