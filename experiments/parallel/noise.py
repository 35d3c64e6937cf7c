"""A prompt by a chain, and by the baseline that gathers, over a link that others use, too: how much longer
each takes than over one of their own (KV-Runahead, arXiv 2405.05329, claims 12 % and 3 %).

    python -m experiments.parallel.noise COSTS.jsonl [--link 100Mbit/s,0.1ms] [--tokens 4096] [--runs 20]
        [--faster 10] [-o FILE]

COSTS: rows of experiments.parallel.prompts, whose chains say what a token and a pair of query and key were
measured to cost; cuts are predicted ones, or even. Two threads play the programs of both ranks
(parallel/des.py): what they compute is slept, what they send goes through the link model (parallel/slow.py),
whose rate is drawn anew every half second, between a quarter and seven quarters of its own, alike for both
ways in each run. All is so many times `--faster` than real (costs and half second divided, the rate
multiplied), which wants a machine that is not full. A row for each way and link, with all runs' seconds, in
real time.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from experiments.runs import arguments, record, recorded
from outsize.parallel.cuts import Costs, predict
from outsize.parallel.des import Program, play
from outsize.parallel.programs import Prompt, gathered, runahead
from outsize.parallel.slow import Link, Slow, parse_link
from outsize.parallel.transport import threads

UNIT, EACH_S = 16, 0.5  # parts that a prompt is cut at, of all; for how long a rate stays
LEAST, MOST = 0.25, 1.75  # of the link's rate


def noisy(seed: int, faster: float) -> Callable[[], float]:
    """How many times as long a message takes now."""
    start = time.monotonic()

    @cache
    def at(period: int) -> float:
        return 1 / random.Random(1000 * seed + period).uniform(LEAST, MOST)

    return lambda: at(int((time.monotonic() - start) * faster / EACH_S))


def seconds(programs: list[Program], link: Link, noise: Callable[[], float]) -> float:
    """Both ranks', played; until the last has ended."""
    start = time.monotonic()
    with ThreadPoolExecutor(len(programs)) as pool:
        ranks = [Slow(transport, link, noise) for transport in threads(len(programs))]
        running = [
            pool.submit(play, program, rank, False)
            for program, rank in zip(programs, ranks, strict=True)
        ]
        for one in running:
            one.result()
    return time.monotonic() - start


def rows(
    prompt: Prompt, link: str, tokens: int, runs: int, faster: float
) -> Iterator[dict[str, Any]]:
    quick = replace(prompt, linear_s=prompt.linear_s / faster, pair_s=prompt.pair_s / faster)
    real = parse_link(link)
    fast = Link(real.delay_s / faster, real.bytes_per_s * faster)
    unit = tokens // UNIT
    cuts = [unit * n for n in predict(0, UNIT, unit, Costs(prompt, real, (1.0, 1.0)))]
    ways: dict[str, list[Program]] = {
        "gathered": [gathered(quick, tokens, r, 2) for r in (0, 1)],
        "chain": [runahead(quick, cuts, r) for r in (0, 1)],
        "chain, even cuts": [runahead(quick, [tokens // 2] * 2, r) for r in (0, 1)],
    }
    for way, programs in ways.items():
        base = 0.0
        for noise in (False, True):
            found = []
            for run in range(runs):
                factor = noisy(run, faster) if noise else lambda: 1.0
                found.append(faster * seconds(programs, fast, factor))
            median = statistics.median(found)
            base = base if noise else median
            yield {
                "way": way, "noise": noise, "link": link, "tokens": tokens, "cuts": cuts,
                "median_s": round(median, 3), "mean_s": round(statistics.mean(found), 3),
                "longer": round(statistics.mean(found) / base - 1, 4), "runs": [round(s, 3) for s in found],
                "played": "slept, so many times faster than real", "faster": faster,
            }  # fmt: skip


def main() -> int:
    args = arguments(__doc__, "costs", link="100Mbit/s,0.1ms", tokens=4096, runs=20, faster=10.0)
    told = recorded(Path(args.costs), {"tokens": args.tokens})
    one = next(row for row in told if "costs" in row)
    for row in rows(
        Prompt(**one["costs"]["prompt"]), args.link, args.tokens, args.runs, args.faster
    ):
        record({"model": one["model"], **row}, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
