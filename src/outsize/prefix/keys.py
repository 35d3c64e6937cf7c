"""Names of blocks of a prompt: a hash of all tokens up to its end, and of all that its bits depend on.

So two blocks have one name only where the same tokens, in the same places, were computed the same way.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence


def root(parts: Mapping[str, object]) -> bytes:
    """What a chain begins with: everything but tokens that keys and values depend on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()


def chain(start: bytes, tokens: Sequence[int], chunk: int) -> list[bytes]:
    """The name of each whole block of `chunk` tokens, 32 bytes."""
    out, last = [], start
    for at in range(0, len(tokens) // chunk * chunk, chunk):
        last = hashlib.sha256(last + array("q", tokens[at : at + chunk]).tobytes()).digest()
        out.append(last)
    return out
