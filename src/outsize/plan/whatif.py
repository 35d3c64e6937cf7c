"""`outsize plan --what-if`: the outline of a model as it would be with fewer bits, narrower feed-forwards, an
adapter, keys and values in 8 bits, or layers that share them. From headers alone: nothing is made.

Shapes in names of sizes: N rows, K inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from outsize.encoding.find import SIZES, encoding_like, encoding_of
from outsize.errors import OptionError, UnsupportedError
from outsize.family.sharing import share_keys
from outsize.model.lora import stack_bytes, widths
from outsize.model_config import Description
from outsize.pack.derive import OF_LAYERS
from outsize.pack.kinds.kind import groups
from outsize.pack.kinds.layers import layers_of, tables_of
from outsize.pack.outline import Outline
from outsize.pack.records import TensorSpec
from outsize.pack.tables import Matrix, TableHeader
from outsize.pack.tensors import Made, Record

KEYS = ("bits", "width", "rank", "kv", "share-kv")
EXAMPLE = "bits=3.5,width=.5,rank=8,kv=int8,share-kv=11"
STEP = 64  # a width is a multiple of it, as palettes need
BITS, MOST_RANK = (2.0, 8.0), 1024
ADAPTER = "what-if"
CODED = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True, slots=True)
class Wish:
    """What would be otherwise. `bits`: of a weight of the layers' matrices, everything counted; `width`: the
    share of each feed-forward's neurons that stay; `rank`: of an adapter on every map; `share_keys`: of the
    last layers, so many that read others' keys and values."""

    bits: float | None = None
    width: float | None = None
    rank: int | None = None
    kv: str | None = None
    share_keys: int | None = None

    @property
    def changes_layers(self) -> bool:
        return any(v is not None for v in (self.bits, self.width, self.rank, self.share_keys))


def parse(text: str) -> Wish:
    """Raises OptionError."""
    told: dict[str, str] = {}
    for word in text.split(","):
        key, equals, value = word.strip().partition("=")
        if key not in KEYS or not equals or key in told:
            why = (
                "is given twice"
                if key in told
                else "is not known"
                if key not in KEYS
                else "has no value"
            )
            raise OptionError(
                f"what-if is {text!r}: {key!r} {why}; known are {', '.join(KEYS)}, as in {EXAMPLE}"
            )
        told[key] = value
    bits, width = _number(text, told, "bits", *BITS), _number(text, told, "width", 0.0, 1.0)
    rank, count = (
        _number(text, told, "rank", 1, MOST_RANK),
        _number(text, told, "share-kv", 1, 1 << 20),
    )
    if (kv := told.get("kv")) not in (None, "int8", "auto"):
        raise OptionError(f"what-if is {text!r}: kv={kv}; int8 or auto is expected")
    return Wish(bits, width, _whole(text, "rank", rank), kv, _whole(text, "share-kv", count))


def _number(text: str, told: Mapping[str, str], key: str, low: float, high: float) -> float | None:
    if key not in told:
        return None
    try:
        value = float(told[key])
    except ValueError:
        value = float("nan")
    if not low <= value <= high or value == 0:
        raise OptionError(
            f"what-if is {text!r}: {key}={told[key]}; a number "
            f"{'above 0 and up to 1' if key == 'width' else f'from {low:g} to {high:g}'} is expected"
        )
    return value


def _whole(text: str, key: str, value: float | None) -> int | None:
    if value is not None and value != int(value):
        raise OptionError(f"what-if is {text!r}: {key}={value:g}; a whole number is expected")
    return None if value is None else int(value)


def changed(o: Outline, wish: Wish) -> Outline:
    """The outline of the model as it would be. Raises OptionError, UnsupportedError."""
    if wish.kv is not None:
        o = replace(o, kv=wish.kv)
    if not wish.changes_layers:
        return o
    if not o.description.is_usual:
        raise UnsupportedError(
            f"{o.name} is a {o.description.family} model; bits, width, rank and share-kv are for dense "
            "models without sinks, and kv is for all"
        )
    d = o.description
    if wish.share_keys is not None:
        d = share_keys(d, wish.share_keys)
    if wish.width is not None:
        d = replace(d, ffn_width=narrowed(d.ffn_width, wish.width))
    tables = _tables(o, d, wish.bits)
    o = replace(o, description=d, tables=tables, quality=None, is_packed=False)
    return o if wish.rank is None else _with_adapter(o, wish.rank)


def narrowed(width: int, share: float) -> int:
    """Neurons that stay of so many: a multiple of what palettes need, where there are as many."""
    step = STEP if width >= STEP else 1
    return min(width, max(step, round(width * share / step) * step))


def _with_adapter(o: Outline, rank: int) -> Outline:
    """An adapter of this rank on every map of every layer."""
    d = o.description
    known = widths(d)
    if rank > (most := min(min(pair) for pair in known.values())):
        raise OptionError(
            f"what-if: rank={rank}; the narrowest map has {most:,} rows or inputs: give fewer"
        )
    shapes = {
        f"{layer}.{name}": ((rank, inputs), (outputs, rank))
        for layer in range(d.num_layers)
        for name, (outputs, inputs) in known.items()
        if name not in "kv" or d.layers[layer].shares is None
    }
    return replace(o, adapters={**o.adapters, ADAPTER: sum(stack_bytes(d, shapes))})


def _tables(o: Outline, d: Description, bits: float | None) -> tuple[TableHeader, ...]:
    """Those of the model as it would be."""
    out = list[TableHeader]()
    plain = {name: _records(o, d, name) for name in _of_layers(d)}
    if bits is not None:
        plain = _coded(plain, bits)
    for _, group in groups(d):
        if group.name in plain:
            layers = layers_of(d, group.name)
            made = tables_of(group.name, "layers", plain[group.name], layers=layers)
            out += [plan.header for plan in made]
        else:
            out += [t for t in o.tables if t.name.split("-")[0] == group.name]
    return tuple(out)


def _of_layers(d: Description) -> list[str]:
    return [group.name for _, group in groups(d) if group.name in OF_LAYERS]


def _records(o: Outline, d: Description, name: str) -> list[Record]:
    """Each layer's, its matrices in the sizes that `d` has, in the encodings that they have now where those
    hold such sizes."""
    specs = next(group.specs for _, group in groups(d) if group.name == name)
    tables = [t for t in o.tables if t.name.split("-")[0] == OF_LAYERS[name]]
    by_layer = {layer: t for t in tables for layer in t.keys}
    narrower = name == "ffn" and d.ffn_width != o.description.ffn_width

    def learned(layer: int) -> bool:
        return narrower or d.layers[layer] != o.description.layers[layer]

    return [
        {
            tensor: _sized(by_layer[layer].tensors[tensor], spec, learned(layer))
            for tensor, spec in specs.items()
        }
        for layer in layers_of(d, name)
    ]


def _sized(pieces: Sequence[Matrix], spec: TensorSpec, learned: bool) -> tuple[Made, ...]:
    """A tensor of other sizes: rows are left out at its end; rows of another width, and what is learned, are
    encoded anew."""
    rows, width = spec.rows, spec.width
    if not width:
        return (_made(pieces[0].encoding, 1, rows),)
    if learned or pieces[0].width != width or sum(p.num_rows for p in pieces) < rows:
        return (_made(encoding_like(pieces[0].encoding, width), rows, width),)
    out, left = list[Made](), rows
    for piece in pieces:
        if left > 0:
            out.append(_made(piece.encoding, min(left, piece.num_rows), width))
            left -= piece.num_rows
    return tuple(out)


def _made(encoding: str, rows: int, width: int) -> Made:
    return Made(encoding, rows, width, dict)


def _coded(plain: Mapping[str, list[Record]], bits: float) -> dict[str, list[Record]]:
    """Matrices as palettes of so many bits a weight in all: codes of one size in the first layers, one bit
    more in as many others as there is room for. Raises OptionError."""
    sized = {s: {name: [_palettes(r, s) for r in rs] for name, rs in plain.items()} for s in SIZES}
    size = {s: sum(_bytes(r) for rs in sized[s].values() for r in rs) for s in SIZES}
    weights = sum(m.num_rows * m.width for rs in plain.values() for r in rs for m in _matrices(r))
    room = bits * weights / 8
    if size[SIZES[0]] > room:
        least = 8 * size[SIZES[0]] / weights
        raise OptionError(
            f"what-if: bits={bits:g}; the smallest palettes take {least:.2f} a weight"
        )
    small = max(s for s in SIZES if size[s] <= room)
    large = min(small + 1, SIZES[-1])
    left, out = room - size[small], dict[str, list[Record]]()
    for name, records in sized[small].items():
        out[name] = []
        for number, record in enumerate(records):
            other = sized[large][name][number]
            more = _bytes(other) - _bytes(record)
            out[name].append(other if more <= left else record)
            left -= more if more <= left else 0
    return out


def _palettes(record: Record, size: int) -> Record:
    out: Record = {}
    for name, pieces in record.items():
        rows, width = sum(p.num_rows for p in pieces), pieces[0].width
        coded = name in CODED
        out[name] = (_made(encoding_of(size, width), rows, width),) if coded else pieces
    return out


def _matrices(record: Record) -> list[Matrix]:
    return [
        Matrix(p.encoding, p.num_rows, p.width, 0)
        for name, pieces in record.items()
        for p in pieces
        if name in CODED
    ]


def _bytes(record: Record) -> int:
    return sum(m.size for m in _matrices(record))
