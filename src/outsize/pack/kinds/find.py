"""All kinds of tables, by the name that a pack's header gives them: the file's."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import outsize.pack.kinds as package
from outsize import registry
from outsize.model_config import Description
from outsize.pack.kinds.kind import Group, Kind

NOT_KINDS = ("find", "kind")


@cache
def kinds() -> Mapping[str, Kind]:
    """Every kind of table."""
    known = [name for name in registry.names(package) if name not in NOT_KINDS]
    return {name: registry.module(package, name, "table kind", known).KIND for name in known}


def groups(d: Description) -> list[tuple[Kind, Group]]:
    """The groups of tables that a model's pack has, in the order of its tables."""
    found = [(kind, group) for kind in kinds().values() for group in kind.groups(d)]
    return sorted(found, key=lambda pair: pair[1].place)
