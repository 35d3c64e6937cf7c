"""All encodings, by the name a pack gives them."""

from __future__ import annotations

from outsize.encoding import int4, int8, plain
from outsize.encoding.plain import Encoding
from outsize.errors import PackError

ENCODINGS: dict[str, Encoding] = {
    e.name: e for e in (*plain.ENCODINGS, *int8.ENCODINGS, *int4.ENCODINGS)
}


def encoding(name: str) -> Encoding:
    """Raises PackError for a name this version does not have."""
    if name not in ENCODINGS:
        raise PackError(f"encoding {name!r} is not known; known are {', '.join(ENCODINGS)}")
    return ENCODINGS[name]
