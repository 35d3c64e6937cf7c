"""Where a prompt is cut for a chain of ranks (KV-Runahead, arXiv 2405.05329): later ranks attend to more, and
wait for what comes down the chain, so that earlier ones are given more tokens; where the link is slow, fewer.

Cuts are in units of the model's chunk, so that n ranks give the bits of one. They are predicted (the
simulator plays the chain for each candidate, with costs that were measured), or searched for by measuring,
kept in a table by length, and interpolated between lengths.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from outsize.parallel.des import simulate
from outsize.parallel.programs import Prompt, runahead
from outsize.parallel.slow import Link

Cuts = tuple[int, ...]  # units of each rank, in order of the chain
ROUNDS = 60  # of a bisection


@dataclass(frozen=True)
class Costs:
    """What a chain's times are made of. `speeds`: of each rank, in order of the chain, 1 where `prompt` was
    measured."""

    prompt: Prompt
    link: Link
    speeds: tuple[float, ...]

    def seconds(self, start: int, unit: int, cuts: Cuts) -> float:
        """To the first token, simulated: of a prompt after `start` tokens that are there already."""
        p = self.prompt
        after = replace(p, linear_s=p.linear_s + p.pair_s * start)
        sizes = [unit * c for c in cuts]
        programs = [runahead(after, sizes, r, s) for r, s in enumerate(self.speeds)]
        return max(o.end for o in simulate(programs, self.link))


def even(units: int, ranks: int) -> Cuts:
    """As many each; the first ones have what is left over."""
    return tuple(units // ranks + (r < units % ranks) for r in range(ranks))


def balanced(units: int, unit: int, chain: Costs) -> Cuts:
    """As much work each, whatever the link: n (a + b (s + n / 2)) / speed = const. At least one unit each."""
    a, b = chain.prompt.linear_s, chain.prompt.pair_s * unit

    def parts(work: float) -> list[float]:
        found, start = [], 0.0
        for speed in chain.speeds:
            linear, half = a + b * start, b / 2
            n = work * speed / linear
            if half > 0:
                n = (-linear + (linear**2 + 4 * half * work * speed) ** 0.5) / (2 * half)
            found.append(n)
            start += n
        return found

    low, high = 0.0, units * (a + b * units) / min(chain.speeds)
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(parts(middle)) < units else (low, middle)
    return whole(units, parts(high))


def whole(units: int, shares: Sequence[float]) -> Cuts:
    """Whole units in these proportions, at least one each. `units`: at least as many as shares."""
    ends = [units * x / sum(shares) for x in accumulate(shares)]
    out, at, last = list[int](), 0, len(shares) - 1
    for r, end in enumerate(ends):
        stop = min(max(round(end), at + 1), units - (last - r))
        out.append(stop - at)
        at = stop
    return tuple(out)


def search(first: Cuts, seconds: Callable[[Cuts], float]) -> tuple[Cuts, float]:
    """The best cuts around some, and their seconds: one boundary at a time moves, by many units, then by few
    (hierarchical, coordinate by coordinate). `seconds` is asked once for each candidate."""
    known = {first: seconds(first)}
    best, step = first, max(1, 1 << (sum(first) // 8).bit_length() >> 1)
    while step:
        moved = [
            c for i in range(len(best) - 1) for n in (-step, step) for c in _shifted(best, i, n)
        ]
        known.update({c: seconds(c) for c in moved if c not in known})
        better = min([best, *moved], key=known.__getitem__)
        step = step if better != best else step // 2
        best = better
    return best, known[best]


def _shifted(cuts: Cuts, boundary: int, units: int) -> Sequence[Cuts]:
    """The cuts with one boundary moved; none where a rank would have nothing."""
    made = list(cuts)
    made[boundary] += units
    made[boundary + 1] -= units
    return [tuple(made)] if min(made) > 0 else []


def predict(start: int, units: int, unit: int, chain: Costs) -> Cuts:
    """The cuts that the simulator finds fastest."""
    found, _ = search(balanced(units, unit, chain), lambda c: chain.seconds(start, unit, c))
    return found


@dataclass(frozen=True)
class Table:
    """Shares that were searched for, by length in tokens; of one model, number of ranks and link."""

    shares: Mapping[int, tuple[float, ...]]

    def at(self, tokens: int) -> tuple[float, ...] | None:
        """Interpolated between the two lengths around; None beyond those that are known."""
        lengths = sorted(self.shares)
        after = next((n for n in lengths if n >= tokens), None)
        before = next((n for n in reversed(lengths) if n <= tokens), None)
        if before is None or after is None:
            return None
        part = 0.0 if after == before else (tokens - before) / (after - before)
        pairs = zip(self.shares[before], self.shares[after], strict=True)
        return tuple(a + part * (b - a) for a, b in pairs)


def read_table(file: Path, key: str) -> Table | None:
    """What was found for a key; None where there is nothing, or nothing that is a table."""
    try:
        found = json.loads(file.read_text()).get(key)
        return None if found is None else Table({int(n): tuple(map(float, s)) for n, s in found})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def keep(file: Path, key: str, table: Table) -> None:
    """Put a table beside the others."""
    try:
        known = json.loads(file.read_text())
        known = known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        known = {}
    known[key] = [[n, list(s)] for n, s in sorted(table.shares.items())]
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_suffix(".new")
    written.write_text(json.dumps(known))
    written.replace(file)


class Choice:
    """Which cuts a prompt is given: shares that the user gave, even ones, or the best that is known: a
    table's, or the simulator's prediction."""

    def __init__(
        self, how: str | Sequence[float], chain: Costs, table: Table | None = None
    ) -> None:
        """`how`: "auto", "even", or shares in order of the chain."""
        self._how, self.chain, self._table = how, chain, table
        self._known: dict[tuple[int, int, int], Cuts | None] = {}

    def __call__(self, start: int, units: int, unit: int) -> Cuts | None:
        """For a prompt of so many units after `start` tokens. None: this rank alone is faster."""
        key = start, units, unit
        if key not in self._known:
            self._known[key] = self._chosen(*key)
        return self._known[key]

    def _chosen(self, start: int, units: int, unit: int) -> Cuts | None:
        if self._how == "even":
            return even(units, len(self.chain.speeds))
        if not isinstance(self._how, str):
            return whole(units, self._how)
        shares = None if self._table is None else self._table.at(start + units * unit)
        found = predict(start, units, unit, self.chain) if shares is None else whole(units, shares)
        shared_s = self.chain.seconds(start, unit, found)
        return None if self._alone_s(start, units * unit) < shared_s else found

    def _alone_s(self, start: int, tokens: int) -> float:
        return self.chain.prompt.seconds(start, tokens) / self.chain.speeds[-1]
