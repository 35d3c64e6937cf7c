"""Progress bars on stderr, only where a person looks at it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Progress = Callable[[str, int, int], None]  # what, how much is done, how much there is in all


def silent(what: str, done: int, total: int) -> None:
    """No bar."""


_listeners: list[Progress] = []


@contextmanager
def heard(by: Progress) -> Iterator[None]:
    """Call a function, too, for whatever work is reported meanwhile, in any thread."""
    _listeners.append(by)
    try:
        yield
    finally:
        _listeners.remove(by)


def _tell(what: str, done: int, total: int) -> None:
    for listener in tuple(_listeners):
        listener(what, done, total)


def is_watched() -> bool:
    """Does a person look at stderr? There is none without a console, and a log in its place need not know."""
    ask = getattr(sys.stderr, "isatty", None)
    return ask is not None and bool(ask())


def bars(quiet: bool = False) -> AbstractContextManager[Progress]:
    """Opens a function that draws bytes: a bar for each kind of work, with rate and time left."""
    return _drawn(quiet, in_bytes=True)


def steps(quiet: bool = False) -> AbstractContextManager[Progress]:
    """Likewise for work that is counted: one bar, how many of how many, and the time left."""
    return _drawn(quiet, in_bytes=False)


@contextmanager
def _drawn(quiet: bool, in_bytes: bool) -> Iterator[Progress]:
    if quiet or not is_watched():
        yield _tell
        return
    from rich import progress as rich
    from rich.console import Console

    amount = (
        (rich.DownloadColumn(), rich.TransferSpeedColumn())
        if in_bytes
        else (rich.MofNCompleteColumn(),)
    )
    text = rich.TextColumn("{task.description:>10}" if in_bytes else "{task.description}")
    columns = (text, rich.BarColumn(), *amount, rich.TimeRemainingColumn())
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        tasks = {} if in_bytes else {"": shown.add_task("", total=None)}

        def draw(what: str, done: int, total: int) -> None:
            key = what if in_bytes else ""
            if key not in tasks:
                tasks[key] = shown.add_task(what, total=total)
            shown.update(tasks[key], description=what, completed=done, total=total)
            _tell(what, done, total)

        yield draw
