"""All encodings, by the name a pack gives them."""

from __future__ import annotations

from dataclasses import replace

from outsize.encoding import group, int4, int8, plain
from outsize.encoding.group import Group
from outsize.encoding.int4 import Int4
from outsize.encoding.plain import Encoding
from outsize.errors import PackError
from outsize.kernels.backend import Backend
from outsize.kernels.plain import PLAIN

ENCODINGS: dict[str, Encoding] = {
    e.name: e for e in (*plain.ENCODINGS, *int8.ENCODINGS, *int4.ENCODINGS, *group.ENCODINGS)
}
NATIVE = frozenset(
    n for n, e in ENCODINGS.items() if isinstance(e, Group | Int4)
)  # a compiled backend computes them


def encoding(name: str, backend: Backend = PLAIN) -> Encoding:
    """The encoding of that name, computed by `backend`. Raises PackError for a name this version does not
    have."""
    if name not in ENCODINGS:
        raise PackError(f"encoding {name!r} is not known; known are {', '.join(ENCODINGS)}")
    found = ENCODINGS[name]
    return replace(found, backend=backend) if isinstance(found, Group | Int4) else found
