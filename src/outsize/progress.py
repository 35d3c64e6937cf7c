"""Progress bars on stderr, only where a person looks at it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]  # what, bytes done, bytes in all


def silent(what: str, done: int, total: int) -> None:
    """No bar."""


def is_watched() -> bool:
    """Does a person look at stderr? There is none without a console, and a log in its place need not know."""
    ask = getattr(sys.stderr, "isatty", None)
    return ask is not None and bool(ask())


@contextmanager
def bars(quiet: bool = False) -> Iterator[Progress]:
    """A function that draws: one bar for each kind of work, with rate and time left."""
    if quiet or not is_watched():
        yield silent
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import (
        Progress as Bars,
    )

    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as shown:
        tasks = {}

        def draw(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done)

        yield draw


@contextmanager
def steps(quiet: bool = False) -> Iterator[Progress]:
    """Likewise for work that is counted: how many of how many, and the time left."""
    if quiet or not is_watched():
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=None)

        def draw(what: str, done: int, total: int) -> None:
            shown.update(task, description=what, completed=done, total=total)

        yield draw
