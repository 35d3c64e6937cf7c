"""What to do about a cache miss of an expert: read it (exact), or, lossy, drop it if its weight is small, use
a resident one instead, or read a copy at fewer bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from outsize.errors import OptionError
from outsize.storage.stats import IOStats

Scored = Sequence[tuple[int, float]]  # (id, weight)
Instead = Sequence[int | None]  # for each of them: itself, another, ~id for its copy, or none
COPY = "copy"


class MissHandler(Protocol):
    """What a layer's cache misses become."""

    def __call__(
        self, wanted: Scored, resident: Mapping[int, int], uses: Mapping[int, int], experts: int
    ) -> Instead:
        """What is asked for instead. `resident`: the ids in memory (keys); `uses`: how often each was wanted;
        `experts`: of a layer."""
        ...


def count(stats: IOStats, wanted: Sequence[int], instead: Instead) -> None:
    """Count what was dropped or replaced."""
    stats.dropped += sum(i is None for i in instead)
    stats.copied += sum(i is not None and i < 0 for i in instead)
    stats.substituted += sum(i not in (None, w, ~w) for w, i in zip(wanted, instead, strict=True))


def fetch(
    wanted: Scored, resident: Mapping[int, int], uses: Mapping[int, int], experts: int
) -> Instead:
    """All of them, exactly."""
    return [i for i, _ in wanted]


def replacing(least: float, instead: Callable[[int], int | None]) -> MissHandler:
    """Handles missing ones of less weight than `least` of the strongest; the others are read. Lossy."""

    def handle(
        wanted: Scored, resident: Mapping[int, int], uses: Mapping[int, int], experts: int
    ) -> Instead:
        floor = least * max(w for _, w in wanted)
        return [i if i in resident or w >= floor else instead(i) for i, w in wanted]

    return handle


def substitute(
    wanted: Scored, resident: Mapping[int, int], uses: Mapping[int, int], experts: int
) -> Instead:
    """For a missing one, the resident of its layer that is wanted most often, if there is one. Lossy."""
    layer = wanted[0][0] // experts
    taken = {i for i, _ in wanted}
    others = [i for i in range(layer * experts, (layer + 1) * experts) if i in resident]
    spare = sorted((i for i in others if i not in taken), key=lambda i: -uses.get(i, 0))
    return [i if i in resident or not spare else spare.pop(0) for i, _ in wanted]


def copies_of(spec: str) -> str:
    """The encoding of the copies that a spec asks for; "" for none."""
    name, _, rest = spec.partition(":")
    return rest.partition(":")[0] if name == COPY else ""


def make(spec: str) -> MissHandler:
    """'fetch', 'drop:0.3', 'substitute' or 'copy:int4:0.5'. Raises OptionError."""
    name, _, text = spec.partition(":")
    if name == "fetch" and not text:
        return fetch
    if name == "substitute" and not text:
        return substitute
    if name == COPY:
        _, _, text = text.partition(":")
    try:
        if name == COPY and copies_of(spec) and 0 < float(text or "1") <= 1:
            return replacing(float(text or "1"), lambda i: ~i)
        if name == "drop" and 0 < float(text or "0.3") <= 1:
            return replacing(float(text or "0.3"), lambda i: None)
    except ValueError:
        pass
    raise OptionError(
        f"misses {spec!r}: fetch, drop:SHARE (up to 1), substitute or copy:ENCODING[:SHARE] is expected"
    )
