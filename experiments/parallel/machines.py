"""Two ranks as measured, and what the simulator (parallel/des.py) says of them; and what 4 and 8 machines
would do: a simulation.

    python -m experiments.parallel.machines TOKENS.gguf PROMPTS.gguf -o FILE [--links "100Mbit/s,0.1ms"]
        [--ways "tensor:cut=sum;..."] [--prompt 64] [--tokens 48] [--repeats 3] [--long 4096]

Both ranks run the engine (traced.py). A row for each way and link of TOKENS, tensor parallelism with sums:
the simulator is given what each rank did of its own between its messages, token by token (both ranks, so that
each waits for the slower one where it did), or on average (`even_s`: as if every token were the same), what
sending or receiving costs a rank beside the wire, as measured before each case, and the messages that the
program of the way says; links and waiting are its own. With more ranks a rank's own time is a + b / ranks,
where one rank's time and two ranks' say a and b; what was measured of the one that follows, begun at another
token, stands for all that do.

A row for each chunk of PROMPTS, a pipeline (`relay`): its costs are seconds a token and a pair of query and
key of each rank's own layers, measured before the prompt. Rows that FILE has are not measured again, and
those beside which others had a tenth of a core are not kept.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.parallel.traced import Case, Gaps, Measured, cases
from experiments.runs import arguments, fresh, good, record, recorded
from outsize.kernels.turned import row_bytes
from outsize.model_config import Description
from outsize.pack import fetch
from outsize.parallel.des import Compute, Op, Program, Send, simulate
from outsize.parallel.points import parse_dropped
from outsize.parallel.programs import Layer, Tensor, relay
from outsize.parallel.slow import parse_link
from outsize.parallel.spec import parse_parallel

WAYS = (
    "tensor:cut=sum;tensor:cut=sum,bits=6;tensor:cut=sum,bits=5;tensor:cut=sum,bits=4;"
    "tensor:cut=sum,attention=heads;tensor:cut=sum,attention=heads,bits=4;tensor:drop=4-23"
)
LINKS, WORLDS, BUSY = "100Mbit/s,0.1ms;100Mbit/s,0.5ms", (4, 8), 0.1
ABOUT = "model", "way", "link", "prompt", "tokens", "chunk"


def size_of(way: str, d: Description) -> int:
    """Bytes of a token's message."""
    bits = parse_parallel(way).bits
    return 2 * d.width if bits == 16 else row_bytes(d.width, bits)


def program_of(way: str, d: Description, rank: int, world: int) -> Program:
    """Of a token; its computing has no times yet."""
    spec = parse_parallel(way)
    whole, dropped = spec.way.attention == "whole", parse_dropped(spec.drop)
    tensor = Tensor(d.num_layers, Layer(0.0, 0.0), size_of(way, d), whole, dropped)
    return tensor.token(rank, world)


def filled(program: Sequence[Op], gaps: Gaps) -> list[Op]:
    """With what the rank did before each meeting, and after the last."""
    found, left, computed = list[Op](), iter(gaps), False
    for op in [Compute(0.0), *program]:
        if isinstance(op, Compute):
            if not computed:
                found.append(Compute(next(left)))
        else:
            found.append(op)
        computed = isinstance(op, Compute)
    assert not [*left], "as many gaps as the program has meetings"
    return found


def token_s(way: str, link: str, d: Description, gaps: Sequence[Gaps], call_s: float) -> float:
    """Of the leader, a token, simulated. `gaps`: of each rank, of some tokens in a row."""
    world, programs = len(gaps), list[Program]()
    meetings = meetings_of(program_of(way, d, 0, world))
    count = (len(gaps[0]) - 1) // meetings
    for rank, own in enumerate(gaps):
        programs.append(filled([*program_of(way, d, rank, world)] * count, own))
    return simulate(programs, parse_link(link), call_s)[0].end / count


def meetings_of(program: Program) -> int:
    """Messages to all, and exchanges."""
    sends = 0
    for before, op in zip([Compute(0.0), *program], program, strict=False):
        sends += isinstance(op, Send) and not isinstance(before, Send)
    return sends


def average(gaps: Gaps, meetings: int) -> Gaps:
    """Every token alike: the mean of each of its gaps."""
    count, inner = (len(gaps) - 1) // meetings, gaps[1:-1]
    of_token = [statistics.fmean(inner[i::meetings]) for i in range(meetings)]
    means = [*of_token[:-1]]
    between = of_token[-1] if count > 1 else 0.0
    return [gaps[0], *[*means, between] * (count - 1), *means, gaps[-1]]


def scaled(gaps: Gaps, meetings: int, by: float, heads: bool) -> Gaps:
    """Of a rank that has another share of the layers; what comes after the last message of a token is the
    head, if it `heads`, and stays."""
    return [g if heads and i % meetings == 0 else g * by for i, g in enumerate(gaps)]


def shifted(gaps: Gaps, meetings: int, tokens: int) -> Gaps:
    """As if other tokens had come first."""
    at = tokens * meetings % (len(gaps) - 1)
    return [gaps[0], *gaps[1 + at :], *gaps[1 : 1 + at]]


def own_s(gaps: Gaps, meetings: int) -> float:
    """Of a token, without what comes after its last message."""
    tokens = (len(gaps) - 1) // meetings
    return sum(g for i, g in enumerate(gaps) if i % meetings) / tokens


def of_tokens(case: Case, found: Measured, alone_s: float) -> dict[str, Any]:
    """A row. `alone_s`: a token's time of one rank."""
    meetings, way, link = meetings_of(program_of(case.way, found.d, 0, 2)), case.way, case.link

    def mean(of: Any) -> float:
        return statistics.fmean(of(both) for both in found.gaps)

    measured = statistics.fmean(found.token_s)
    head_s = mean(lambda both: statistics.median(both[0][meetings:-1:meetings]))
    own = [mean(lambda both, r=r: own_s(both[r], meetings)) for r in (0, 1)]
    row = {
        "token_s": measured, "own_s": own[0], "other_own_s": own[1], "head_s": head_s,
        "call_s": found.call_s, "alone_s": alone_s,
        "ranks_2_s": mean(lambda both: token_s(way, link, found.d, both, found.call_s)),
        "even_s": mean(
            lambda both: token_s(way, link, found.d, [average(g, meetings) for g in both], found.call_s)
        ),
    }  # fmt: skip
    row["error"] = row["ranks_2_s"] / measured - 1
    part, own_mean = 2 * (alone_s - head_s - statistics.fmean(own)), statistics.fmean(own)
    for world in WORLDS:
        by = (alone_s - head_s - part + part / world) / own_mean

        def ranks(both: tuple[Gaps, Gaps], world: int = world, by: float = by) -> float:
            all_gaps = [
                scaled(shifted(both[r > 0], meetings, max(0, r - 1)), meetings, by, r == 0)
                for r in range(world)
            ]
            return token_s(way, link, found.d, all_gaps, found.call_s)

        row[f"ranks_{world}_s"] = mean(ranks)
    return row


def of_prompts(case: Case, found: Measured) -> dict[str, Any]:
    """A row of a pipeline."""
    programs = [relay(found.prompts[r], case.prompt, r, 2, case.chunk) for r in (0, 1)]
    foretold = simulate(programs, parse_link(case.link), found.call_s)
    measured = min(found.prompt_s)
    return {
        "prompt_s": measured, "all_s": [round(s, 4) for s in found.prompt_s], "sent": found.sent,
        "simulated_s": foretold[0].end, "simulated_sent": [o.sent for o in foretold],
        "error": foretold[0].end / measured - 1, "call_s": found.call_s,
        "costs": [[p.linear_s, p.pair_s] for p in found.prompts],
    }  # fmt: skip


def wanted(args: Any) -> Iterator[Case]:
    """In an order in which shards are opened once."""
    fetched = fetch.pack(args.tokens_of, quiet=True)
    sizes = args.prompt, args.tokens, args.repeats, 512
    for way in args.ways.split(";") if args.ways else ():
        for link in args.links.split(";"):
            size = size_of(way, fetched.description)
            yield Case(args.tokens_of, way, link, *sizes, size)
    for chunk in map(int, filter(None, args.chunks.split(","))):
        link = args.links.split(";")[0]
        yield Case(args.prompts_of, "relay", link, args.long, 0, args.long_repeats, chunk, 2304)


def main() -> int:
    args = arguments(
        __doc__, "tokens_of", "prompts_of", ways=WAYS, links=LINKS, prompt=64, tokens=48, repeats=3,
        long=4096, long_repeats=1, chunks="256,512",
    )  # fmt: skip
    known = {tuple(row.get(k) for k in ABOUT) for row in recorded(args.output)}
    left = [c for c in wanted(args) if tuple(about(c).values()) not in known]
    alone_s, start = 0.0, time.monotonic()

    def keep(case: Case, found: Measured, others: float) -> None:
        row = of_tokens(case, found, alone_s) if case.tokens else of_prompts(case, found)
        row = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
        more = {"others_cores": round(others, 3), "spent_s": round(time.monotonic() - start, 1)}
        row = {**about(case), "simulation": True, **row, **more}
        record(row, args.output if others < BUSY else None)

    if any(c.tokens for c in left):
        sizes = [f"--{name}={getattr(args, name)}" for name in ("prompt", "tokens", "repeats")]
        alone = "-m", "experiments.parallel.ways", args.tokens_of, "--ways=alone", "--links=none"
        alone_s = good(fresh(*alone, *sizes))["token_s"]
    if left:
        cases(left, keep)
    return 0


def about(case: Case) -> dict[str, Any]:
    return {
        "model": Path(case.model).stem, "way": case.way, "link": case.link, "prompt": case.prompt,
        "tokens": case.tokens, "chunk": case.chunk,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
