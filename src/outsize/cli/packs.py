"""`outsize pack`, `list` and `rm`: the models that are on this machine, ready to run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from outsize.cli.command import only, with_flags
from outsize.cli.flags import DisplayOptions, Flag
from outsize.errors import PackError
from outsize.home import home
from outsize.log import say
from outsize.options import DEFAULT_MODEL, LoadOptions

if TYPE_CHECKING:
    from outsize.pack.format import Pack


@with_flags
def pack(
    load: Annotated[LoadOptions, only("encoding", "quiet")],
    display: Annotated[DisplayOptions, only("json")],
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
    refresh: Annotated[
        bool, Flag("--refresh", "Ask the hub for a newer revision of a model packed before.")
    ] = False,
) -> None:
    """Fetch and convert a model, so that it starts at once."""
    from outsize.pack import fetch
    from outsize.plan import decide

    load = decide.for_model(load, model)
    made = fetch.pack(model, encoding=load.encoding, quiet=load.quiet, refresh=refresh)
    _show([made], display.json)


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


def _describe(pack: Pack) -> dict[str, object]:
    return {
        "name": pack.path.name,
        "path": str(pack.path.resolve()),
        "bytes": pack.size,
        "family": pack.description.family,
        "encodings": ", ".join(pack.encodings),
        "source": pack.source.spec,
        "licence": pack.licence,
    }
