"""Expert prefetching: which experts of the next layer to read ahead. A prefetcher is a file in `prefetch/`:
the file name is its name, `prefetcher(amount, experts)` in it makes one, and `EARLY` says whether it uses
the next layer's gate, asked one layer early. It knows integers and the gate's scores only.

Law: whatever it predicts, the answer is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

from outsize import registry
from outsize.caching import prefetch
from outsize.errors import OptionError

Scored = tuple[tuple[int, float], ...]  # (expert, weight), the most wanted first

AHEAD_SHARE, AHEAD_LEAST = 0.25, 2  # of the slots: what may be read ahead and not yet asked for


@dataclass(frozen=True, slots=True)
class Seen:
    """What a prefetcher knows once a layer's experts are chosen. Ids count through the layers."""

    layer: int
    ids: Sequence[int]  # that it asks for
    next_layer: int
    base: int  # the id of that layer's first expert
    early: Scored  # (expert of the next layer, weight), by that layer's gate on this layer's input
    truth: Sequence[int] = ()  # what the next layer will ask for: known in a replay only


class Prefetcher(Protocol):
    """Predicts what the next layer will ask for."""

    def __call__(self, seen: Seen) -> Sequence[int]:
        """Ids to read ahead, the most wanted first."""
        ...


def most_ahead(capacity: int) -> int:
    """Records that may be read ahead and not yet asked for, of a cache with so many slots."""
    return max(AHEAD_LEAST, int(AHEAD_SHARE * capacity))


def reads_early(spec: str) -> bool:
    """Does it use the scores of a layer's gate asked one layer early? Raises UnsupportedError."""
    return bool(_module(spec.partition(":")[0]).EARLY)


def _module(name: str) -> ModuleType:
    return registry.module(prefetch, name, "prefetcher")


def make(spec: str, experts: int) -> Prefetcher:
    """From 'name' or 'name:amount'. Raises UnsupportedError, OptionError."""
    name, _, text = spec.partition(":")
    found = _module(name)
    try:
        amount = float(text) if text else float(found.AMOUNT)
        whole = found.MOST <= 1 or amount.is_integer()  # more than a share: a count
        if not (found.LEAST <= amount <= found.MOST and whole):
            raise ValueError
    except ValueError:
        kind = "number" if found.MOST <= 1 else "whole number"
        raise OptionError(
            f"prefetch {spec!r}: a {kind} from {found.LEAST:g} to {found.MOST:g} is expected after the colon"
        ) from None
    made: Prefetcher = found.prefetcher(amount, experts)
    return made
