"""What a pack is made of: which parts another pack may share.

A pack's identity is all that decides an answer: the weights, and beside them config, tokenizer, templates and
generation settings. Its layout is what its records are made of, and how. Packs that differ in identity, but
not in weights and layout, share their records.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from outsize.checkpoint.bounded import read_regular
from outsize.checkpoint.read_json import MAX_JSON
from outsize.pack.tensors import Record, TablePlan


def identity(weights: str, beside: Iterable[Path]) -> str:
    """Of weights with this hash and the files beside them."""
    digest, files = hashlib.sha256(weights.encode()), list(beside)
    for path in files:
        content = read_regular(path, MAX_JSON)
        digest.update(b"\n%b %d\n" % (os.fsencode(path.name), len(content)) + content)
    return digest.hexdigest() if files else weights


def layout(tables: Sequence[TablePlan]) -> str:
    """A hash of what goes into which record, in which encoding."""
    digest = hashlib.sha256()
    for table in tables:
        header = table.header
        digest.update(repr((header.name, header.kind, header.keys, header.stride)).encode())
        for record in table.records:
            digest.update(repr([*_contents(record)]).encode())
    return digest.hexdigest()


def _contents(record: Record) -> Iterable[object]:
    for name, pieces in record.items():
        for piece in pieces:
            parts = [
                (p.tensor.name, p.tensor.kind.name, p.tensor.shape, p.tensor.offset, p.head_dim, p.shift,
                 p.transposed, p.first, p.step)
                for p in piece.parts
            ]  # fmt: skip
            yield name, piece.encoding, parts
