"""All encodings, by the name a pack gives them."""

from __future__ import annotations

from dataclasses import replace

from outsize.encoding import group, int4, int8, plain
from outsize.encoding.group import Group
from outsize.encoding.int4 import Int4
from outsize.encoding.plain import Encoding
from outsize.errors import PackError
from outsize.kernels.native import Kernels

ENCODINGS: dict[str, Encoding] = {
    e.name: e for e in (*plain.ENCODINGS, *int8.ENCODINGS, *int4.ENCODINGS, *group.ENCODINGS)
}
NATIVE = frozenset(
    n for n, e in ENCODINGS.items() if isinstance(e, Group | Int4)
)  # kernels compute them


def encoding(name: str, kernels: Kernels | None = None) -> Encoding:
    """Raises PackError for a name this version does not have. `kernels` None: the plain twin."""
    if name not in ENCODINGS:
        raise PackError(f"encoding {name!r} is not known; known are {', '.join(ENCODINGS)}")
    found = ENCODINGS[name]
    return replace(found, kernels=kernels) if isinstance(found, Group | Int4) else found
