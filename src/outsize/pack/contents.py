"""What the tables of a pack must hold for its description, and whether they do; each kind of table knows its
own (pack/kinds/)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from outsize.model_config import Description
from outsize.pack.kinds.find import groups
from outsize.pack.records import mixed_fault
from outsize.pack.tables import TableHeader

NAME = re.compile(r"[a-z]+(-[0-9]{1,6})?")  # of a table; its file is called so


def fault(d: Description, tables: Sequence[TableHeader]) -> str:
    """What is wrong with the tables of a model of sound description, in a clause; "" if nothing is."""
    due = groups(d)
    found: dict[str, list[TableHeader]] = {group.name: [] for _, group in due}
    seen = set[str]()
    for table in tables:
        name = table.name
        if name in seen or not NAME.fullmatch(name) or name.split("-")[0] not in found:
            return f"a table {name[:80]!r} has no place in it"
        seen.add(name)
        found[name.split("-")[0]].append(table)
    for kind, group in due:
        if problem := kind.fault(d, group, found[group.name]):
            return problem
    return mixed_fault(tables)
