"""The plug-in registry: a policy, a family, a table kind is a file of a folder, found by its name."""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Collection
from importlib import import_module
from types import ModuleType

from outsize.errors import UnsupportedError


def names(package: ModuleType) -> list[str]:
    """What a folder offers, by file name."""
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__))


def module(
    package: ModuleType, name: str, what: str, known: Collection[str] | None = None
) -> ModuleType:
    """The module `name` of a folder, one of `known` or of all. Raises UnsupportedError with a suggestion."""
    known = names(package) if known is None else known
    if name in known:
        return import_module(f"{package.__name__}.{name}")
    close = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UnsupportedError(f"{what} {name!r} is not known; known are {', '.join(known)}{hint}")
