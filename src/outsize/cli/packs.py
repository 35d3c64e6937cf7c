"""`outsize pack`, `list` and `rm`: the models that are on this machine, ready to run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outsize.cli.command import only, with_flags
from outsize.cli.flags import DisplayOptions, Flag
from outsize.errors import OptionError, PackError
from outsize.home import home
from outsize.log import say
from outsize.options import DEFAULT_MODEL, LoadOptions

if TYPE_CHECKING:
    from outsize.adapt.repack import Repacked
    from outsize.pack.format import Pack


@dataclass(frozen=True, slots=True)
class BitsFlags:
    """A pack of fewer bits."""

    bits: Annotated[
        float | None,
        Flag("--bits", "Lossy: so many bits a weight of the layers, 2 to 8, as 3.5."),
    ] = None
    calibrate: Annotated[
        Path | None,
        Flag("--calibrate", "A text to fit to, of all kinds that matter; else its own."),
    ] = None
    max_kl: Annotated[
        float | None,
        Flag(
            "--max-kl", "At most so large a divergence, in nats; without --bits, the fewest bits."
        ),
    ] = None
    force: Annotated[bool, Flag("--force", "Fewer bits of a model that has few bits already.")] = (
        False
    )


@with_flags
def pack(
    load: Annotated[LoadOptions, only("encoding", "memory", "threads", "quiet")],
    display: Annotated[DisplayOptions, only("json")],
    few: BitsFlags,
    given: frozenset[str],
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
    refresh: Annotated[
        bool, Flag("--refresh", "Ask the hub for a newer revision of a model packed before.")
    ] = False,
) -> None:
    """Fetch and convert a model, so that it starts at once."""
    from outsize.pack import fetch
    from outsize.plan import decide
    from outsize.plan.probe import set_threads

    is_few = few.bits is not None or few.max_kl is not None
    for name in ("calibrate", "force", "memory"):
        if name in given and not is_few:
            raise OptionError(f"--{name} is of fewer bits; give --bits, or leave it out")
    set_threads(load.threads)
    load = decide.for_model(load, model)
    made = fetch.pack(model, encoding=load.encoding, quiet=load.quiet, refresh=refresh)
    if not is_few:
        _show([made], display.json)
        return
    from outsize.adapt.repack import BitsOptions, repack

    options = BitsOptions(
        few.bits, few.max_kl, few.calibrate, few.force, memory=load.memory, quiet=load.quiet
    )
    _show_few(repack(made, options), made, display.json)


@with_flags
def list_packs(display: Annotated[DisplayOptions, only("json")]) -> None:
    """The packs on this machine."""
    from outsize.pack import leftovers, store

    folder = home() / "packs"
    _show(list(store.packs(folder)), display.json)
    for one in leftovers.leftovers(folder):
        say(
            f"{one.path.name}: {one.size / 1e6:,.0f} MB, left by a run that was ended; the next download "
            f"removes it, or `outsize rm {one.path.name}`"
        )


def rm(names: Annotated[list[str], typer.Argument(metavar="NAME...")]) -> None:
    """Remove packs, by the names that `outsize list` shows."""
    from outsize.pack import store

    for name in names:
        size = store.remove(home() / "packs", name)
        print(f"removed {name} ({size / 1e6:,.0f} MB)")


def _show(packs: Sequence[Pack | PackError], as_json: bool) -> None:
    """A table of packs, or one JSON list."""
    good = [p for p in packs if not isinstance(p, PackError)]
    if as_json:
        print(json.dumps([_describe(p) for p in good]))
        return
    if not packs:
        print(f"no packs in {home() / 'packs'}; `outsize run PROMPT` makes the first")
    for pack in packs:
        if isinstance(pack, PackError):
            say(f"error: {pack}")
        else:
            d = _describe(pack)
            print(f"{d['name']}  {pack.size / 1e6:,.0f} MB  {d['family']}  {d['encodings']}")
            if pack.quality is not None:
                print(f"  {pack.quality}")


def _show_few(done: Repacked, base: Pack, as_json: bool) -> None:
    """The closing table of a pack of few bits."""
    from outsize.adapt.repack import bits_of

    pack, q = done.pack, done.pack.quality
    if as_json:
        print(json.dumps(_describe(pack) | {"minutes": done.minutes}))
        return
    took = "made before" if done.minutes is None else f"{done.minutes:.1f}"
    heads = ("bits", "KL", "top-1", "perplexity", "MB", "minutes")
    assert q is not None
    rows = (
        (
            f"{bits_of(base):.2f}",
            "0",
            "100%",
            f"{q.former_perplexity:.2f}",
            f"{base.size / 1e6:,.1f}",
            "",
        ),
        (
            f"{q.bits:.2f}",
            f"{q.kl:.3f}",
            f"{q.top1:.0%}",
            f"{q.perplexity:.2f}",
            f"{pack.size / 1e6:,.1f}",
            took,
        ),
    )
    names = (base.path.name, pack.path.name)
    wide = max(map(len, names))
    print(" " * wide + "".join(f"{head:>12}" for head in heads))
    for name, row in zip(names, rows, strict=True):
        print(f"{name:<{wide}}" + "".join(f"{cell:>12}" for cell in row))
    print(f"lossy: measured on {q.tokens:,} tokens of {q.text}; run it with -m {pack.path}")


def _describe(pack: Pack) -> dict[str, object]:
    return {
        "name": pack.path.name,
        "path": str(pack.path.resolve()),
        "bytes": pack.size,
        "family": pack.description.family,
        "encodings": ", ".join(pack.encodings),
        "source": pack.source.spec,
        "licence": pack.licence,
        "quality": None if pack.quality is None else asdict(pack.quality),
    }
