"""`outsize bench parallel`: a model by several ranks on this machine, over links as slow as they are named.

The links are a model in user space (parallel/slow.py): each message is stamped with the time at which it
would have arrived, and taken no sooner. Ranks share this machine's cores (one each, where there are as many),
so the measure is of one way against another over the same link, never against one process that has all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

from outsize.arguments import whole
from outsize.bench.pinned import pinned
from outsize.bench.speed import measure, prompt
from outsize.engine import load as loading
from outsize.engine.model import Model
from outsize.engine.ranks.leader import CUTS_FILE, table_key
from outsize.errors import OptionError
from outsize.forward.runahead import Chain
from outsize.forward.span import Span
from outsize.home import home
from outsize.log import say
from outsize.options import LoadOptions
from outsize.pack import fetch
from outsize.parallel.cuts import Cuts, Table, even, keep, read_table, search
from outsize.parallel.slow import parse_link
from outsize.parallel.spec import parse_parallel
from outsize.plan.probe import processor

WAYS = "tensor;tensor:cut=sum;tensor:cut=sum,bits=4;tensor:cut=sum,attention=heads;relay;runahead"
MODEL_OF_A_LINK = "link model in user space (parallel/slow.py)"
BAR = 32  # characters of the longest bar
Counts = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ParallelOptions:
    """What to measure."""

    ways: str = WAYS  # of --parallel, with ; between
    links: str = "100Mbit/s,0.1ms"  # likewise; "none": as it is
    prompt_tokens: int = 512
    new_tokens: int = 32
    repeats: int = 3
    search: str = ""  # lengths of prompts for which cuts of a chain are searched for, with commas

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "repeats"):
            whole(name, getattr(self, name), 1, 1 << 20)
        for link in self.all_links:
            if link:
                parse_link(link)
        for way in self.all_ways:
            parse_parallel(way)
        self.lengths  # noqa: B018  # raises

    @property
    def all_links(self) -> list[str]:
        return ["" if link.strip() == "none" else link.strip() for link in self.links.split(";")]

    @property
    def all_ways(self) -> list[str]:
        return [way.strip() for way in self.ways.split(";")]

    @property
    def lengths(self) -> list[int]:
        try:
            return [whole("search", int(n), 1, 1 << 24) for n in self.search.split(",") if n]
        except ValueError:
            raise OptionError(
                f"search is {self.search!r}; lengths in tokens are expected, as in 1024,2048"
            ) from None


@dataclass(frozen=True, slots=True)
class Row:
    """One way over one link. `messages`, `sent`: of the leader, a token decoded, as `waited_s`, what of its
    time it stood still for others."""

    way: str
    link: str
    prompt_s: float
    token_s: float
    messages: float
    sent: float
    prompt_sent: int
    how: str
    waited_s: float = 0.0
    pinned: bool = False  # had each rank a core of its own?

    def to_json(self) -> dict[str, object]:
        return {
            "way": self.way, "link": self.link, "how": self.how, "prompt_s": round(self.prompt_s, 5),
            "token_s": round(self.token_s, 6), "messages_a_token": round(self.messages, 2),
            "sent_bytes_a_token": round(self.sent, 1), "prompt_bytes": self.prompt_sent,
            "waited_s": round(self.waited_s, 6), "pinned": self.pinned,
        }  # fmt: skip


def measured(
    model: str, options: ParallelOptions, load: LoadOptions
) -> Iterator[Row | dict[str, object]]:
    """A row for each way and link, and what was found of a chain's cuts before it. Raises OptionError, and
    what opening a model raises."""
    if load.ranks < 2:
        raise OptionError("ranks is 1, and there is nothing to share; give --ranks 2 or more")
    for link in options.all_links:
        for way in options.all_ways:
            with _opened(model, load, way, link) as opened, pinned(load.ranks) as apart:
                chain = opened.scheduler.forward
                if options.lengths and isinstance(chain, Chain):
                    found = [_searched(opened, chain, n, options.repeats) for n in options.lengths]
                    _keep(opened, found, load.ranks, link)
                    yield from found
                yield replace(_row(opened, way, link, options), pinned=apart)


def show(model: str, options: ParallelOptions, load: LoadOptions, as_json: bool) -> None:
    """Print the rows. Raises as `measured`."""
    rows, found = list[Row](), list[dict[str, object]]()
    for one in measured(model, options, load):
        if isinstance(one, dict):
            found.append(one)
            continue
        rows.append(one)
        if not load.quiet:
            say(f"{one.way} over {one.link}: {1e3 * one.token_s:.2f} ms a token")
    if as_json:
        print(json.dumps({"ranks": load.ranks, "rows": [r.to_json() for r in rows], "cuts": found}))
        return
    print(
        f"{model} by {load.ranks} ranks on {processor()}; prompts of {options.prompt_tokens} tokens"
    )
    print("\n".join([*_lines(rows), *map(_cuts_line, found)]))


def _opened(model: str, load: LoadOptions, way: str, link: str) -> Model:
    slow = f"{',' if ':' in way else ':'}link={link.replace(',', '+')}" if link else ""
    how = replace(load, parallel=way + slow, draft="none", prefix_cache="off", quiet=True)
    return loading.open_model(fetch.named(model), how)


def _row(model: Model, way: str, link: str, o: ParallelOptions) -> Row:
    measure(model, o.prompt_tokens, 2, 1)
    runs, prompts, tokens = [], list[Counts](), list[Counts]()
    for _ in range(o.repeats):
        seen = [_wire(model)]
        runs.append(
            measure(
                model,
                o.prompt_tokens,
                o.new_tokens,
                1,
                lambda seen=seen: seen.append(_wire(model)),  # type: ignore[misc]
            )
        )
        prompts.append(_less(seen[1], seen[0]))
        tokens.append(_less(_wire(model), seen[1]))
    messages, sent, _, waited = (median(c[i] for c in tokens) / o.new_tokens for i in range(4))
    prefill, decode = (median(r[i] for r in runs) for i in (0, 1))
    how = MODEL_OF_A_LINK if link else "as it is"
    return Row(
        way, link or "loopback", o.prompt_tokens / prefill, 1 / decode, messages, sent,
        round(median(c[2] for c in prompts)), how, waited,
    )  # fmt: skip


def _wire(model: Model) -> Counts:
    """Messages and bytes sent, bytes sent and received, and seconds waited, of the leader."""
    forward, leader = model.scheduler.forward, model.transformer.leader
    wire = forward.wire if isinstance(forward, Chain) else None if leader is None else leader.wire
    if wire is None:
        return 0, 0, 0, 0.0
    return wire.messages, wire.sent, wire.sent + wire.received, wire.waited_s


def _less(a: Counts, b: Counts) -> Counts:
    return tuple(x - y for x, y in zip(a, b, strict=True))


def _searched(model: Model, chain: Chain, tokens: int, repeats: int) -> dict[str, object]:
    """The fastest cuts of a prompt, as measured, beside those predicted and even ones."""
    transformer, choice, costs = model.transformer, chain.choose, chain.costs
    assert costs is not None
    chunk, world = transformer.chunk, len(costs.speeds)
    units = -(-tokens // chunk)
    if units < world:
        raise OptionError(
            f"search: a prompt of {tokens} tokens has {units} chunks of {chunk}, fewer than {world} ranks; "
            "give a longer one, or --chunk"
        )
    known: dict[Cuts, float] = {}

    def seconds(cuts: Cuts) -> float:
        if cuts not in known:
            chain.choose = lambda *_: cuts
            known[cuts] = min(_prompt_s(model, chain, tokens) for _ in range(repeats))
        return known[cuts]

    predicted = choice(0, units, chunk) or even(units, world)
    try:
        best, best_s = search(predicted, seconds)
        rows = {"predicted": predicted, "searched": best, "even": even(units, world)}
        took = {name: seconds(cuts) for name, cuts in rows.items()}
    finally:
        chain.choose = choice
    shares = [c / units for c in best]
    return {
        "tokens": tokens, "shares": shares, "searched_s": round(best_s, 4),
        **{f"{name}_cuts": list(cuts) for name, cuts in rows.items()},
        **{f"{name}_s": round(s, 4) for name, s in took.items()},
        "simulated_s": round(costs.seconds(0, chunk, best), 4),
        "costs": asdict(costs),
    }  # fmt: skip


def _prompt_s(model: Model, chain: Chain, tokens: int) -> float:
    kv = model.transformer.new_kv(tokens)
    span = Span(0, prompt(model, tokens, 0))
    began = time.perf_counter()
    chain(model.transformer, [span], [kv])
    return time.perf_counter() - began


def _keep(model: Model, found: Sequence[dict[str, object]], world: int, link: str) -> None:
    """For runs over the link that there is; a table is of one link."""
    if link:
        return
    file, key = home() / CUTS_FILE, table_key(model.pack, world)
    known = read_table(file, key)
    shares = {} if known is None else dict(known.shares)
    shares |= {int(f["tokens"]): tuple(f["shares"]) for f in found}  # type: ignore[call-overload,arg-type]
    keep(file, key, Table(shares))


def _lines(rows: Sequence[Row]) -> Iterator[str]:
    """A table, and bars of tokens/s."""
    widest = max(len(r.way) for r in rows)
    fastest = max(1 / r.token_s for r in rows)
    for link in dict.fromkeys((r.link, r.how) for r in rows):
        yield f"\n{link[0]}, {link[1]}"
        yield (
            f"{'way':<{widest}}{'prompt s':>10}{'ms a token':>12}{'messages':>10}{'bytes':>10}"
            f"{'prompt MB':>11}  tokens/s"
        )
        for r in rows:
            if r.link == link[0]:
                bar = "#" * max(1, round(BAR / r.token_s / fastest))
                yield (
                    f"{r.way:<{widest}}{r.prompt_s:>10.3f}{1e3 * r.token_s:>12.2f}{r.messages:>10.1f}"
                    f"{r.sent:>10,.0f}{r.prompt_sent / 1e6:>11.3f}  {bar} {1 / r.token_s:.1f}"
                )


def _cuts_line(found: dict[str, object]) -> str:
    return (
        f"a prompt of {found['tokens']}: searched {found['searched_cuts']} {found['searched_s']} s, "
        f"predicted {found['predicted_cuts']} {found['predicted_s']} s, even {found['even_cuts']} "
        f"{found['even_s']} s"
    )
