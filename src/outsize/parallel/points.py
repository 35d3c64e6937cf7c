"""What becomes of each sum between ranks: left out, or in so many bits. Layers as users write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from outsize.errors import OptionError
from outsize.kernels.backend import Backend
from outsize.kernels.turned import turner
from outsize.parallel.collective import Collective, Point
from outsize.parallel.dropped import NO_DROP, Drop
from outsize.parallel.exact import Exact
from outsize.parallel.lowbit import LowBit, Turned

AUTO = "auto"
ONE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


@dataclass(frozen=True)
class Points:
    """Of one rank. `bits`: of a number of a message, by layer and place, as 3.ffn; `rest`: of all others."""

    drop: Drop = NO_DROP
    bits: Mapping[str, int] = field(default_factory=dict)
    rest: int = 16

    def at(self, point: Point) -> int:
        return self.bits.get(f"{point.layer}.{point.place}", self.rest)

    def collective(self, exact: Exact, backend: Backend) -> Collective:
        """Sums as they say, over exact ones."""
        exact.drop = self.drop
        used = {self.rest, *self.bits.values()} - {16}
        if not used:
            return exact
        codecs = {bits: Turned(turner(bits, backend)) for bits in used}
        return LowBit(exact, lambda point: codecs.get(self.at(point)))


def parse_dropped(text: str) -> tuple[int, ...]:
    """Numbers of layers, from 0 on: `3+7-9`; none of "" and of "auto". Raises OptionError."""
    found = set[int]()
    for word in text.split("+") if text not in ("", AUTO) else ():
        match = ONE.fullmatch(word.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise OptionError(
                f"drop is {text!r}; auto, or numbers of layers from 0 on are expected, as in 3+7-9"
            )
        found |= set(range(first, last + 1))
    return tuple(sorted(found))
