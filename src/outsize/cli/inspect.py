"""`outsize inspect`: what tokens' memories say, in a model whose feed-forwards read the token's embedding."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outsize.arguments import whole
from outsize.cli.command import only, with_flags
from outsize.cli.flags import DisplayOptions, Flag
from outsize.errors import OptionError
from outsize.log import say
from outsize.options import LoadOptions

if TYPE_CHECKING:
    from outsize.adapt.memory.inspect import Reader, Seen


@dataclass(frozen=True, slots=True)
class InspectFlags:
    """How much to show."""

    keys: Annotated[int, Flag("--keys", "Of each layer, the strongest.")] = 3
    near: Annotated[int, Flag("--near", "Tokens with the nearest memories.")] = 8
    layer: Annotated[
        int | None, Flag("--layer", "With --html: whose clusters; by default the last.")
    ] = None
    clusters: Annotated[int, Flag("--clusters", "With --html: of the vocabulary.")] = 24
    html: Annotated[
        Path | None,
        Flag("--html", "Draw the vocabulary's clusters as one page, with a search box."),
    ] = None


@with_flags
def inspect(
    own: InspectFlags,
    load: Annotated[LoadOptions, only("threads", "quiet")],
    display: Annotated[DisplayOptions, only("json")],
    model: Annotated[str, typer.Argument()],
    given: frozenset[str],
    tokens: Annotated[list[str] | None, typer.Argument(metavar="TOKEN...")] = None,
) -> None:
    """What tokens' memories say (of a model of `outsize adapt memory --config`): the strongest keys of each
    layer, and what their values speak for; tokens with the nearest memories."""
    from outsize.adapt.memory.inspect import Reader, look, token_ids
    from outsize.pack import fetch
    from outsize.plan.probe import set_threads
    from outsize.progress import steps
    from outsize.storage.records import Records

    _check(own, tokens or [], given)
    set_threads(load.threads)
    pack = fetch.pack(model, quiet=load.quiet)
    with Records(pack) as records, steps(load.quiet) as draw:
        reader, count = Reader(pack, records), pack.description.num_layers
        seen = [
            look(reader, i, own.keys, own.near, lambda n: draw("comparing", n, count))
            for i in token_ids(reader, tokens or [])
        ]
        if display.json:
            print(json.dumps([one.to_json() for one in seen]))
        else:
            print("\n".join(line for one in seen for line in _lines(one)))
        if own.html is not None:
            _draw(own, reader, pack.path.name)
            say(f"wrote {own.html}")


def _check(own: InspectFlags, tokens: list[str], given: frozenset[str]) -> None:
    if not tokens and own.html is None:
        raise OptionError("no token is named; name some, or draw all with --html FILE")
    for name, most in (("keys", 1000), ("near", 1000), ("clusters", 1000)):
        whole(name, getattr(own, name), 1, most)
    for name in ("layer", "clusters"):
        if name in given and own.html is None:
            raise OptionError(f"--{name} is of --html FILE; give that, or leave --{name} out")


def _lines(seen: Seen) -> list[str]:
    out = [f"token {seen.token}: {seen.text!r}"]
    for key in seen.keys:
        said = " ".join(map(repr, key.says))
        out.append(f"  layer {key.layer:>3}  key {key.key:>5}  {key.coefficient:>8.3f}  {said}")
    near = ", ".join(f"{text!r} {cosine:.2f}" for text, cosine in seen.nearest)
    return [*out, f"  nearest: {near}"]


def _draw(own: InspectFlags, reader: Reader, name: str) -> None:
    from outsize.adapt.memory.inspect import clusters, plane
    from outsize.report.memory_page import page

    d = reader.description
    layer = (
        d.num_layers - 1 if own.layer is None else whole("layer", own.layer, 0, d.num_layers - 1)
    )
    x_VP = reader.projected(layer)
    labels = clusters(x_VP, min(own.clusters, d.vocab_size)).tolist()
    places = [(x, y) for x, y in plane(x_VP).tolist()]
    text = page(name, layer, [reader.text(i) for i in range(d.vocab_size)], labels, places)
    assert own.html is not None
    try:
        own.html.write_text(text, encoding="utf-8")
    except OSError as e:
        raise OptionError(
            f"{own.html} cannot be written: {e.strerror}; name another file"
        ) from None
