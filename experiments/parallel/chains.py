"""What a prompt takes by a chain of ranks, by the paper's baseline and by others: a simulation.

    python -m experiments.parallel.chains COSTS.jsonl [--tokens 4096] [-o FILE]

COSTS: rows of `experiments.parallel.prompts`: their chains' costs of a token and of a pair of query and key
were measured; links, messages and waiting are the simulator's (parallel/des.py). A row for each
link and number of ranks: KV-Runahead with the best cuts and with even ones, the paper's baseline (all keys
and values to all in every layer, no overlap), the same with an early and a late share each (zigzag), a
pipeline over layers; ranks alike, and the last one twice as fast as the others.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.runs import arguments, record, recorded
from outsize.parallel.cuts import Costs, even, predict
from outsize.parallel.des import Program, simulate
from outsize.parallel.programs import Prompt, gathered, relay
from outsize.parallel.slow import Link, parse_link

UNIT = 256  # tokens that cuts are multiples of
LINKS = "10Gbit/s,0.05ms", "1Gbit/s,0.1ms", "100Mbit/s,0.1ms", "50Mbit/s,0.1ms", "25Mbit/s,0.1ms"
RANKS = 2, 4, 8


def seconds(programs: Sequence[Program], link: Link) -> float:
    return max(outcome.end for outcome in simulate(programs, link))


def row(prompt: Prompt, text: str, tokens: int, world: int) -> dict[str, Any]:
    """One link and number of ranks."""
    link, units, ranks = parse_link(text), tokens // UNIT, range(world)
    alike = Costs(prompt, link, (1.0,) * world)
    best = predict(0, units, UNIT, alike)
    uneven = Costs(prompt, link, (1.0,) * (world - 1) + (2.0,))
    fitted = predict(0, units, UNIT, uneven)
    all_to_all = [gathered(prompt, tokens, r, world) for r in ranks]
    zigzag = [gathered(prompt, tokens, r, world, True) for r in ranks]
    piped = [relay(prompt.part(1 / world), tokens, r, world) for r in ranks]
    found = {
        "chain_s": alike.seconds(0, UNIT, best), "even_s": alike.seconds(0, UNIT, even(units, world)),
        "gathered_s": seconds(all_to_all, link), "zigzag_s": seconds(zigzag, link),
        "relay_s": seconds(piped, link), "alone_s": prompt.seconds(0, tokens),
        "uneven_s": uneven.seconds(0, UNIT, fitted),
        "uneven_even_s": uneven.seconds(0, UNIT, even(units, world)),
    }  # fmt: skip
    return {
        "simulation": True, "link": text, "ranks": world, "tokens": tokens, "cuts": list(best),
        "uneven_cuts": list(fitted), **{name: round(s, 4) for name, s in found.items()},
    }  # fmt: skip


def main() -> int:
    args = arguments(__doc__, "costs", tokens=4096)
    for one in recorded(Path(args.costs)):
        if "costs" not in one or one["half"] or one["way"] != "predicted":
            continue
        prompt = Prompt(**one["costs"]["prompt"])
        for world in RANKS:
            for link in LINKS:
                found = {"model": one["model"], **row(prompt, link, args.tokens, world)}
                record(found, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
