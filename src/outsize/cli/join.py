"""`outsize join`: be a rank of a model that another process leads."""

from __future__ import annotations

from typing import Annotated

import typer

from outsize.cli.command import only, with_flags
from outsize.options import LoadOptions


@with_flags
def join(
    load: Annotated[LoadOptions, only("memory", "threads", "native", "quiet")],
    leader: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Where the leader listens.")],
) -> None:
    """Share a model with `outsize run|chat|serve MODEL --ranks N --listen HOST:PORT` elsewhere."""
    from outsize.engine.ranks import follower

    follower.run(leader, load)
