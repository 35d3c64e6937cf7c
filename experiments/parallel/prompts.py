"""A long prompt by two ranks, with a core each: KV-Runahead's chain beside its paper's baseline, over links
that are modelled.

    python -m experiments.parallel.prompts MODEL.gguf -o FILE [--tokens 4096] [--chunk 256] [--repeats 3]
        [--links "none;100Mbit/s,0.1ms"] [--ways "alone;gathered;even;predicted;searched"] [--half]

Two processes, each with the whole model and pinned to a core of its own where there are two; connections are
TCP sockets, as slow as slow.py models. Seconds are those from the leader's first message to its logits, the
least of some repeats. `alone`: the leader computes all of it; `gathered`: gathered.py; `even`, `predicted`,
`searched`: a chain with such cuts. `--half`: the first rank of the chain is stopped every second millisecond,
as a machine of half the speed. Beside each chain what the simulator foretells for its cuts: with the costs
that the engine measures (`simulated_s`), with those of whole passes on both ranks (`simulated_usual_s`), and,
of a rank that is stopped, in windows (`simulated_stops_s`). Rows that FILE has are not measured again.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiments.parallel import gathered
from experiments.parallel.passes import passed
from experiments.parallel.quiet import Quiet
from experiments.parallel.stopped import halved, seen
from experiments.runs import arguments, record, recorded
from outsize.bench.speed import TEXT
from outsize.engine import open_tokens
from outsize.forward import chain_costs, runahead, words
from outsize.forward.full import full
from outsize.forward.runahead import Chain
from outsize.forward.span import Span
from outsize.kernels.find import find
from outsize.model.transformer import Transformer
from outsize.pack import fetch
from outsize.parallel.cuts import Costs, Cuts, even, predict, search
from outsize.parallel.des import Stops, simulate
from outsize.parallel.meeting import Hello, Meeting, join
from outsize.parallel.programs import Prompt, relay
from outsize.parallel.programs import gathered as all_to_all
from outsize.parallel.programs import runahead as runahead_program
from outsize.parallel.slow import Link, Slow, parse_link
from outsize.parallel.sockets import Sockets
from outsize.parallel.transport import Transport
from outsize.weights import load as weights

HERE = "127.0.0.1"
BUSY, TRIES = 0.1, 2
STOP, CHAIN, GATHERED, USUAL = range(4)
NO_STOPS = Stops(0.0, 0.0)
PICO = 1e12


@dataclass(frozen=True)
class Setting:
    """What both ranks know."""

    model: str
    links: tuple[str, ...]
    tokens: int
    chunk: int


class Rank:
    """One of both, open."""

    def __init__(self, setting: Setting, transport: Transport) -> None:
        self.pack = fetch.pack(setting.model, quiet=True)
        backend = find()
        self._loaded = weights.load(self.pack, backend)
        self.model = Transformer(self.pack.description, self._loaded, backend)
        self.model.chunk = setting.chunk
        text = open_tokens.tokens(self.pack).encode(TEXT, start=False)
        self.ids = [text[i % len(text)] for i in range(setting.tokens)]
        self.raw = transport
        self.slow = [Slow(transport, parse_link(x)) if x else transport for x in setting.links]


def follow(setting: Setting, transport: Transport) -> None:
    """Rank 1: does what the leader says until that ends."""
    rank = Rank(setting, transport)
    while (told := words.receive(transport, 0))[0] != STOP:
        slow = rank.slow[told[1]]
        if told[0] == CHAIN:
            runahead.follow(rank.model, slow)
        elif told[0] == USUAL:
            own = passed(rank.model, told[3])
            found = *astuple(seen() if told[2] else NO_STOPS), own.linear_s, own.pair_s
            words.send(transport, [0], [round(PICO * s) for s in found])
        else:
            gathered.run(rank.model, slow, rank.ids)


class Leader:
    """Rank 0."""

    def __init__(self, setting: Setting, transport: Transport, repeats: int) -> None:
        self.setting, self.repeats, self.half = setting, repeats, False
        self.rank = Rank(setting, transport)
        self.alone_s, self.wanted = self.alone()

    def least(self, run: Callable[[], Any]) -> tuple[float, float]:
        """Seconds of the fastest of some runs, and cores that others had meanwhile. Runs beside which others
        had a tenth of a core are made again, up to TRIES times as many."""
        found = list[tuple[float, float]]()
        for _ in range(TRIES * self.repeats):
            quiet, start = Quiet(), time.perf_counter()
            run()
            found.append((time.perf_counter() - start, quiet.others))
            if sum(others < BUSY for _, others in found) >= self.repeats:
                break
        return min(found, key=lambda one: (one[1] >= BUSY, one[0]))

    def alone(self) -> tuple[tuple[float, float], torch.Tensor]:
        found: list[torch.Tensor] = []

        def run() -> None:
            kv = self.rank.model.new_kv(len(self.rank.ids))
            (out,) = full(self.rank.model, [Span(0, self.rank.ids, 1)], [kv])
            found.append(out.logits_KV)

        return self.least(run), found[0]

    def gathered(self, link: int) -> dict[str, Any]:
        slow, sent = self.rank.slow[link], self.rank.slow[link].wire.sent

        def run() -> None:
            words.send(self.rank.raw, [1], [GATHERED, link])
            assert gathered.run(self.rank.model, slow, self.rank.ids) is not None

        run()
        sent, link_of = slow.wire.sent - sent, self.setting.links[link]
        row = {**timed(self.least(run)), "sent": sent}
        if not link_of:
            return row
        tokens = len(self.rank.ids)
        _, both = self.usual(-(-tokens // 2))  # each computes its half at once
        programs = [all_to_all(p, tokens, r, 2) for r, p in enumerate(both)]
        foretold = max(o.end for o in simulate(programs, parse_link(link_of)))
        return {
            **row,
            "usual": [[p.linear_s, p.pair_s] for p in both],
            "simulated_usual_s": foretold,
        }

    def chains(
        self, link: int, ways: Sequence[str], keep: Callable[[str, dict[str, Any]], None]
    ) -> None:
        """Rows of a chain over one link."""
        stops, both = self.usual()
        words.send(self.rank.raw, [1], [CHAIN, link])
        slow, model = self.rank.slow[link], self.rank.model
        costs = chain_costs.hear(model, slow)
        if self.setting.links[link]:
            costs = replace(costs, link=parse_link(self.setting.links[link]))
        chain, unit = Chain(slow, lambda *_: None), self.setting.chunk
        units, known = -(-len(self.rank.ids) // unit), dict[Cuts, tuple[float, float]]()

        def seconds(cuts: Cuts) -> float:
            if cuts not in known:
                chain.choose = lambda *_: cuts
                known[cuts] = self.least(lambda: self._prompt(chain))
            return known[cuts][0]

        predicted = predict(0, units, unit, costs)
        cuts = {"even": even(units, 2), "predicted": predicted}
        try:
            if "searched" in ways:
                cuts["searched"] = search(predicted, seconds)[0]
            for name in (n for n in ways if n in cuts):
                seconds(cuts[name])
                took, foretold = known[cuts[name]], costs.seconds(0, unit, cuts[name])
                row = {**timed(took), "cuts": list(cuts[name]), "simulated_s": foretold}
                sizes = [unit * c for c in cuts[name]]
                row |= usual_foretold(both, sizes, costs.link, stops)
                keep(name, row | {"costs": asdict(costs), **others_foretold(costs, unit * units)})
        finally:
            chain.end()

    def usual(self, chunk: int = 0) -> tuple[Stops, tuple[Prompt, Prompt]]:
        """How long the other rank goes and stands, as it says, and what a prompt usually costs either rank
        while the other computes, too: first of the chain's first. `chunk`: as `passed` has it."""
        words.send(self.rank.raw, [1], [USUAL, 0, self.half, chunk])
        own = passed(self.rank.model, chunk)
        going, standing, linear, pair = (n / PICO for n in words.receive(self.rank.raw, 1))
        return Stops(going, standing), (replace(own, linear_s=linear, pair_s=pair), own)

    def _prompt(self, chain: Chain) -> None:
        model = self.rank.model
        kv = model.new_kv(len(self.rank.ids))
        (out,) = chain(model, [Span(0, self.rank.ids, 1)], [kv])
        assert torch.equal(out.logits_KV, self.wanted), "the chain has the bits of one rank"


def timed(found: tuple[float, float]) -> dict[str, float]:
    return {"seconds": found[0], "others_cores": found[1]}


def usual_foretold(
    both: tuple[Prompt, Prompt], sizes: Sequence[int], link: Link, stops: Stops
) -> dict[str, Any]:
    """Seconds of a chain by the simulator, with what a prompt usually costs either rank; if the first one
    stands again and again, also with the other's costs in windows."""
    programs = [runahead_program(p, sizes, r) for r, p in enumerate(both)]
    found: dict[str, Any] = {"usual": [[p.linear_s, p.pair_s] for p in both]}
    found["simulated_usual_s"] = simulate(programs, link)[1].end
    if stops != NO_STOPS:
        programs = [runahead_program(both[1], sizes, r) for r in (0, 1)]
        found["simulated_stops_s"] = simulate(programs, link, stops={0: stops})[1].end
        found["stops"] = astuple(stops)
    return found


def others_foretold(costs: Costs, tokens: int) -> dict[str, float]:
    """Of ways that are not chains, seconds by the simulator, with a chain's costs."""
    programs = {
        "gathered": [all_to_all(costs.prompt, tokens, r, 2) for r in (0, 1)],
        "zigzag": [all_to_all(costs.prompt, tokens, r, 2, True) for r in (0, 1)],
        "pipeline": [relay(costs.prompt.part(1 / 2), tokens, r, 2) for r in (0, 1)],
    }
    return {
        f"simulated_{name}_s": max(o.end for o in simulate(made, costs.link))
        for name, made in programs.items()
    }


def pinned(core: int) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) > 1:
        os.sched_setaffinity(0, {allowed[core % len(allowed)]})


def lead(setting: Setting, transport: Transport, args: Any, child: int) -> None:
    leader, start = Leader(setting, transport, args.repeats), time.monotonic()
    about = {
        "model": Path(args.model).stem, "tokens": args.tokens, "chunk": args.chunk, "half": args.half,
        "repeats": args.repeats,
    }  # fmt: skip
    known = {(row["link"], row["way"]) for row in recorded(args.output, about)}
    ways = args.ways.split(";")

    def keep(way: str, link: str, row: dict[str, Any]) -> None:
        found = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        cores = len(os.sched_getaffinity(child) | os.sched_getaffinity(0))
        more = {"cores": cores, "spent_s": round(time.monotonic() - start, 1)}
        record({**about, "link": link or "as it is", "way": way, **found, **more}, args.output)

    if "alone" in ways and ("as it is", "alone") not in known:
        keep("alone", "", timed(leader.alone_s))
    leader.half = args.half
    with halved(child) if args.half else nullcontext():
        for number, link in enumerate(setting.links):
            left = [w for w in ways if w != "alone" and (link or "as it is", w) not in known]
            if "gathered" in left:
                keep("gathered", link, leader.gathered(number))
            for name in left:
                if name != "gathered":  # each with costs as they are just then
                    leader.chains(number, [name], lambda way, row, link=link: keep(way, link, row))
    words.send(transport, [1], [STOP])


def main() -> int:
    args = arguments(
        __doc__, "model", tokens=4096, chunk=256, repeats=3, links="none;100Mbit/s,0.1ms", half=False,
        ways="alone;gathered;even;predicted;searched",
    )  # fmt: skip
    links = tuple("" if x == "none" else x for x in args.links.split(";"))
    setting = Setting(args.model, links, args.tokens, args.chunk)
    torch.set_num_threads(1)
    meeting, hello = Meeting(HERE, 0), Hello(world=2)
    if not (child := os.fork()):
        meeting.close()
        pinned(1)
        try:
            mesh = join(HERE, meeting.port, replace(hello, rank=1), 60)
            follow(setting, Sockets(mesh))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(0)
    pinned(0)
    mesh = meeting.gather(hello, 60)
    try:
        lead(setting, Sockets(mesh), args, child)
    finally:
        mesh.close()
        with suppress(ProcessLookupError, ChildProcessError):
            os.waitpid(child, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
