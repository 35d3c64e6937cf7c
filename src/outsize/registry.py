"""Find a module of a folder by its name, or say what there is: to add a file is to register it."""

from __future__ import annotations

import difflib
import pkgutil
from importlib import import_module
from types import ModuleType

from outsize.errors import UnsupportedError


def names(package: ModuleType) -> list[str]:
    """What a folder offers, by file name."""
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__))


def module(package: ModuleType, name: str, what: str, known: list[str]) -> ModuleType:
    """The module `name` of a folder, one of `known`. Raises UnsupportedError with a suggestion."""
    if name in known:
        return import_module(f"{package.__name__}.{name}")
    close = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UnsupportedError(f"{what} {name!r} is not known; known are {', '.join(known)}{hint}")
