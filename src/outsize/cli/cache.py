"""`outsize cache`: prompts that are kept on disk (--prefix-cache disk)."""

from __future__ import annotations

import json as as_json
from dataclasses import asdict
from typing import Annotated

import typer

from outsize.cli.flags import JSON
from outsize.log import say

app = typer.Typer(
    rich_markup_mode=None, help="Prompts kept on disk (--prefix-cache disk): how much; `clear`."
)


@app.callback(invoke_without_command=True)
def show(context: typer.Context, json: Annotated[bool, JSON.option()] = False) -> None:
    """Prompts kept on disk (--prefix-cache disk): how many bytes, and how many were written today."""
    from outsize.prefix import folder

    if context.invoked_subcommand is not None:
        return
    found = folder.contents()
    if json:
        print(as_json.dumps(asdict(found) | {"folder": str(found.folder)}))
        return
    print(f"folder         {found.folder}")
    print(f"blocks         {found.blocks:,}")
    print(f"size           {found.size / 1e6:,.1f} MB")
    print(f"written today  {found.written_today / 1e6:,.1f} MB")


@app.command()
def clear() -> None:
    """Remove all of them."""
    from outsize.prefix import folder

    before = folder.clear()
    say(
        f"removed {before.blocks:,} blocks of prompts, {before.size / 1e6:,.0f} MB, from {before.folder}"
    )
