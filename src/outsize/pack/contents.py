"""What the tables of a pack must hold for its description, and whether they do: every tensor, its exact
shape, and where it lies in its record.

Compiled kernels and torch's views take shapes, offsets and strides at their word. A checksum tells that a
header is whole, not that it is honest: packs travel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from outsize.encoding.find import ENCODINGS
from outsize.errors import UnsupportedError
from outsize.model_config import Description
from outsize.pack.tables import ALIGN, PAGE, Matrix, TableHeader, aligned

Shape = tuple[int, int]  # rows and width; a vector, which is kept in fp32, has no rows
FLOATS = "fp32"
KINDS = {"embed": "rows", "head": "rows", "attn": "layers", "ffn": "layers", "experts": "experts",
         "final": "layers"}  # fmt: skip
NAME = re.compile(r"[a-z]+(-[0-9]{1,6})?")  # of a table; its file is called so
FIXED = {"router": FLOATS}  # matrices that are read in one encoding only


def fault(d: Description, tables: Sequence[TableHeader]) -> str:
    """What is wrong with the tables of a model of sound description, in a clause; "" if nothing is."""
    parts, seen = _parts(d), set[str]()
    for name in (t.name for t in tables):
        if name in seen or not NAME.fullmatch(name) or name.split("-")[0] not in parts:
            return f"a table {name[:80]!r} has no place in it"
        seen.add(name)
    for part in parts:
        if problem := _part_fault(d, part, [t for t in tables if t.name.split("-")[0] == part]):
            return problem
    return _mixed_fault(tables)


def _parts(d: Description) -> dict[str, dict[str, Shape]]:
    """The tensors of a record, by the part of the model that a table belongs to."""
    rows = {"embed": {"embed": (d.vocab_size, d.width)}, "head": {"head": (d.vocab_size, d.width)}}
    if d.tied:
        del rows["head"]
    parts = rows | {
        "attn": _attention(d),
        "ffn": _feed_forward(d),
        "final": {"final_norm": (0, d.width)},
    }
    return parts if d.mixture is None else parts | {"experts": _matrices(d, d.mixture.bias)}


def _attention(d: Description) -> dict[str, Shape]:
    heads = d.num_heads * d.head_dim
    out: dict[str, Shape] = {
        "attn_norm": (0, d.width),
        "qkv": (d.qkv_rows, d.width),
        "o": (d.width, heads),
    }
    if d.qk_norm_whole:
        out |= {"q_norm": (0, heads), "k_norm": (0, d.num_kv_heads * d.head_dim)}
    if d.qk_norm:
        out |= {"q_norm": (0, d.head_dim), "k_norm": (0, d.head_dim)}
    optional = {
        "qkv_bias": (d.qkv_bias, d.qkv_rows), "o_bias": (d.o_bias, d.width),
        "sinks": (d.sinks, d.num_heads), "attn_post_norm": (d.post_norm, d.width),
    }  # fmt: skip
    return out | {name: (0, size) for name, (is_there, size) in optional.items() if is_there}


def _feed_forward(d: Description) -> dict[str, Shape]:
    norm: dict[str, Shape] = {"ffn_norm": (0, d.width)}
    if d.mixture is not None:
        bias: dict[str, Shape] = {"router_bias": (0, d.mixture.count)} if d.mixture.bias else {}
        return norm | bias | {"router": (d.mixture.count, d.width)}
    return (
        norm | _matrices(d, d.mlp_bias) | ({"ffn_post_norm": (0, d.width)} if d.post_norm else {})
    )


def _matrices(d: Description, bias: bool) -> dict[str, Shape]:
    """Gate and up as one, and down."""
    inner = d.ffn_width
    biases: dict[str, Shape] = (
        {"gate_up_bias": (0, 2 * inner), "down_bias": (0, d.width)} if bias else {}
    )
    return {"gate_up": (2 * inner, d.width), "down": (d.width, inner)} | biases


def _part_fault(d: Description, part: str, tables: Sequence[TableHeader]) -> str:
    if part in ("embed", "head"):
        return _rows_fault(d, part, tables)
    for table in tables:
        if table.kind != KINDS[part] or table.num_rows:
            return f"table {table.name} is of kind {table.kind[:80]!r}, {KINDS[part]!r} is due"
        if problem := _record_fault(table, _parts(d)[part]):
            return f"table {table.name}: {problem}"
    return _keys_fault(d, part, tables)


def _keys_fault(d: Description, part: str, tables: Sequence[TableHeader]) -> str:
    """Every layer is in one table, with all its experts in order."""
    each = d.mixture.count if part == "experts" and d.mixture is not None else 1
    layers = [k // each for table in tables for k in table.keys[::each]]
    whole = all(
        table.keys[at : at + each] == tuple(range(table.keys[at], table.keys[at] + each))
        and table.keys[at] % each == 0
        for table in tables
        for at in range(0, len(table.keys), each)
    )
    if part == "final":
        named = [t.name for t in tables] == ["final-0"]
        return (
            "" if named and layers == [0] else "the final norm is not one record of table final-0"
        )
    if not whole or sorted(layers) != list(range(d.num_layers)):
        return f"the tables of {part!r} do not hold each of {d.num_layers:,} layers once"
    if part == "attn" and "attn-0" not in (t.name for t in tables):
        return "there is no table attn-0"
    return ""


def _rows_fault(d: Description, part: str, tables: Sequence[TableHeader]) -> str:
    """Blocks of rows, in order and as many as the vocabulary needs."""
    if [t.name for t in tables] != [part]:
        return f"there is no table {part}"
    (table,) = tables
    found = table.tensors.get(part, ())
    if table.kind != "rows" or list(table.tensors) != [part] or len(found) != 1:
        return f"table {part} does not hold one matrix of rows"
    block = found[0].num_rows
    if not 0 < block <= aligned(d.vocab_size, 64) or block % 64 or table.num_rows != d.vocab_size:
        return (
            f"table {part} holds {table.num_rows:,} rows in blocks of {block:,}, blocks of a multiple of 64 "
            f"and {d.vocab_size:,} in all are due"
        )
    if table.keys != tuple(range(0, d.vocab_size, block)):
        return f"the blocks of table {part} are not the model's {d.vocab_size:,} rows in order"
    problem = _record_fault(table, {part: (block, d.width)})
    return f"table {part}: {problem}" if problem else ""


def _record_fault(table: TableHeader, due: Mapping[str, Shape]) -> str:
    if not table.keys:
        return "it has no records"
    if set(table.tensors) != set(due):
        wrong = min(set(table.tensors) ^ set(due))
        return f"tensor {wrong[:80]!r} is {'missing' if wrong in due else 'not one of its own'}"
    for name, shape in due.items():
        if problem := _tensor_fault(name, shape, table.tensors[name]):
            return problem
    return _layout_fault(table)


def _tensor_fault(name: str, shape: Shape, pieces: Sequence[Matrix]) -> str:
    """Are these pieces, one below the other (of a vector: end to end), a tensor of this shape?"""
    rows, width = shape
    if not pieces or any(m.num_rows <= 0 or m.width <= 0 for m in pieces):
        return f"tensor {name!r} has pieces without rows, or none"
    if rows:
        found, due = (sum(m.num_rows for m in pieces), {m.width for m in pieces}), (rows, {width})
        is_right = found == due
    else:
        is_right = sum(m.width for m in pieces) == width and {m.num_rows for m in pieces} == {1}
    if not is_right:
        shapes = ", ".join(f"{m.num_rows:,} x {m.width:,}" for m in pieces[:8])
        return f"tensor {name!r} has {shapes} numbers, {rows or 1:,} x {width:,} are due"
    fixed = FIXED.get(name) if rows else FLOATS
    if fixed is not None and (
        any(m.encoding != fixed for m in pieces) or (rows and len(pieces) > 1)
    ):
        return f"tensor {name!r} is not in {fixed}, or in pieces"
    return next((p for m in pieces if (p := _encoding_fault(name, m))), "")


def _encoding_fault(name: str, matrix: Matrix) -> str:
    if matrix.encoding not in ENCODINGS:
        known = ", ".join(ENCODINGS)
        return f"tensor {name!r}: encoding {matrix.encoding[:80]!r} is not known; known are {known}"
    try:
        assert matrix.specs
    except UnsupportedError as e:
        return f"tensor {name!r}: {e}"
    return ""


def _layout_fault(table: TableHeader) -> str:
    """Matrices follow each other without holes, as they were written, so that none lies over another or
    beyond the record."""
    at = 0
    for matrix in sorted(_all(table), key=lambda m: m.offset):
        if matrix.offset != at or at % ALIGN:
            return f"a matrix begins at byte {matrix.offset:,} of its record, {at:,} is due"
        at += matrix.size
    if table.stride != aligned(at, PAGE):
        return f"its records have {table.stride:,} bytes, {aligned(at, PAGE):,} are due"
    return ""


def _mixed_fault(tables: Sequence[TableHeader]) -> str:
    """Activations are in fp32 where all matrices are, else in bf16."""
    kinds = {
        m.encoding == FLOATS
        for table in tables
        for name, pieces in table.tensors.items()
        for m in pieces
        if m.num_rows > 1 and name not in FIXED
    }
    return "some of its matrices are in fp32, others are not" if len(kinds) > 1 else ""


def _all(table: TableHeader) -> Iterable[Matrix]:
    return (m for pieces in table.tensors.values() for m in pieces)
