"""From a model whose feed-forwards read the token's embedding to a pack that looks them up: a row for each
token, of all layers together, in 16, 8 or 4 bits, whole or as the numbers of a low rank (arXiv 2602.00398).

Rows are computed as a step of few rows computes them, so that a table of 16 bits gives the same bits where
the pack's products do not depend on who else is in a step.
Shapes: V tokens, D width, R numbers of a layer in a row.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from outsize.adapt.memory.ranks import bases
from outsize.adapt.memory.rows import Bases, RowMaker
from outsize.adapt.memory.text import documents
from outsize.arguments import real
from outsize.encoding.find import encoding
from outsize.engine import open_tokens
from outsize.errors import OptionError, UnsupportedError
from outsize.home import home
from outsize.kernels.backend import Backend
from outsize.model.transformer import Transformer
from outsize.model_config import Description, Memory
from outsize.options import LoadOptions
from outsize.pack import derive
from outsize.pack.derive import Stored
from outsize.pack.format import Pack
from outsize.pack.kinds.layers import BESIDE, FINAL, ORDER, basis, tables_of
from outsize.pack.kinds.tokens import ENCODINGS, header
from outsize.pack.records import FLOATS, HALF
from outsize.pack.source import derived
from outsize.pack.tables import TableHeader
from outsize.pack.tensors import Made, Record, TablePlan
from outsize.plan.decide import compiled
from outsize.progress import Progress, bars, steps
from outsize.storage.records import Records
from outsize.weights import load as weights

METHOD = 1  # raise it where the same options would give other numbers
BITS = tuple(ENCODINGS)
EVEN, ODD = 16, 64  # numbers that a rank is a multiple of: in 16 bits, in groups


@dataclass(frozen=True, slots=True)
class TableOptions:
    """What to make: bits of a number; of a low rank, its share of the width, and whether layers share it out;
    texts whose tokens' counts order the rows."""

    bits: int = 16
    rank: float | None = None
    by_layer: bool = False
    data: tuple[Path, ...] = ()
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise OptionError(
                f"bits is {self.bits}; a table is of {', '.join(map(str, BITS))} bits a number"
            )
        if self.rank is not None:
            real("rank", self.rank, 0.0, 1.0)
            if not 0 < self.rank < 1:
                raise OptionError(
                    f"rank is {self.rank:g}; give a share of the width between 0 and 1, or leave it out for "
                    "whole rows"
                )
        elif self.by_layer:
            raise OptionError("by_layer shares out a rank, and none is given; give --rank, as .5")

    @property
    def name(self) -> str:
        """As the pack's name ends."""
        rank = "" if self.rank is None else f"-r{self.rank:g}{'-layers' if self.by_layer else ''}"
        return f"tables{self.bits}{rank}"

    @property
    def step(self) -> int:
        return EVEN if self.bits == 16 else ODD


@dataclass(frozen=True, slots=True)
class Tabled:
    """The pack, and how long making it took; no time where it was there before."""

    pack: Pack
    minutes: float | None


def make_tables(base: Pack, options: TableOptions) -> Tabled:
    """Raises OptionError, UnsupportedError, DataError, PackError, DiskFullError."""
    begin, d = time.monotonic(), base.description
    _check(base, options)
    tokens = order(base, options.data)
    source = derived(base.source, options.name, _recipe(options, tokens))
    folder = home() / "packs"
    if (found := derive.made_before(base, source, folder)) is not None:
        return Tabled(found, None)
    native = compiled(LoadOptions(quiet=options.quiet))
    with bars(options.quiet) as progress:
        loaded = weights.load(base, native, None, progress)
    try:
        maker = RowMaker(_model(base, loaded, native), tokens)
        with steps(options.quiet) as draw, Records(base) as records:
            bases_L = None if options.rank is None else _bases(maker, d, options, draw)
            maker = maker.with_bases(bases_L)
            new = replace(d, memory=_memory(d, bases_L))
            table = maker.plan(header(new, ENCODINGS[options.bits]))
            stored = partial(fields_of, records)
            tables = [*kept_tables(base, stored), final_table(base, stored, tokens, bases_L), table]
            made = derive.derive(replace(base, description=new), source, tables, None, folder, draw)
    finally:
        loaded.close()
    return Tabled(made, (time.monotonic() - begin) / 60)


def _model(base: Pack, loaded: weights.Loaded, native: Backend) -> Transformer:
    return Transformer(base.description, loaded, native)


def _check(base: Pack, options: TableOptions) -> None:
    d, name = base.description, base.path.name
    if d.memory is None:
        raise UnsupportedError(
            f"{name} is a {d.family} model, whose feed-forwards read more than the token's embedding; tables "
            "are made of models that `outsize adapt memory --config` trains"
        )
    if d.memory.is_table:
        raise OptionError(f"{name} has its table already; name the model that it was made of")
    if options.bits < 16 and d.width % ODD:
        raise OptionError(
            f"bits is {options.bits}, and the width of {name} is {d.width:,}: rows of 8 and 4 bits have "
            f"multiples of {ODD} numbers; give --bits 16"
        )
    if options.rank is not None and options.step >= d.width:
        raise OptionError(
            f"rank is {options.rank:g}, and the width of {name} is {d.width:,}: ranks in {options.bits} bits "
            f"are multiples of {options.step}; leave --rank out"
        )


def order(base: Pack, data: Sequence[Path]) -> list[int]:
    """All tokens, those that are used most in some texts first; others by their numbers, as a tokenizer's
    merges came. Raises DataError."""
    counts = Counter[int]()
    if data:
        tokens = open_tokens.tokens(base)
        for text in documents(data):
            for line in text:
                counts.update(tokens.encode(line, start=False))
    return sorted(range(base.description.vocab_size), key=lambda token: (-counts[token], token))


def _recipe(options: TableOptions, tokens: Sequence[int]) -> Mapping[str, object]:
    """All that decides the result."""
    digest = hashlib.sha256(repr(list(tokens)).encode()).hexdigest()
    return {
        "made": "tables", "method": METHOD, "bits": options.bits, "rank": options.rank,
        "by_layer": options.by_layer, "order": digest,
    }  # fmt: skip


def _bases(maker: RowMaker, d: Description, o: TableOptions, draw: Progress) -> list[Tensor]:
    assert o.rank is not None
    count = d.vocab_size
    moments = maker.moments(count, lambda done: draw("measuring ranks", done, count))
    return bases(moments, o.rank, o.step, o.by_layer)


def _memory(d: Description, bases_L: Bases) -> Memory:
    assert d.memory is not None
    ranks = () if bases_L is None else tuple(b_DR.shape[1] for b_DR in bases_L)
    return replace(d.memory, is_table=True, ranks=ranks)


def fields_of(
    records: Records, table: TableHeader, number: int
) -> dict[str, list[Mapping[str, Tensor]]]:
    """A record's stored fields."""
    read = records.read(table, number)
    return {name: [w.fields for w in pieces] for name, pieces in read.items()}


def kept_tables(base: Pack, stored: Stored) -> Iterator[TablePlan]:
    """Embedding, head and attention as they are; of feed-forwards, the dense ones beside."""
    memory, dense = base.description.memory, list[tuple[int, Record]]()
    for table in base.tables:
        if table.name.startswith(FINAL):
            continue
        if not table.name.startswith("ffn"):
            yield derive.kept(table, stored)
            continue
        for number, layer in enumerate(table.keys):
            whole = derive.record_of(table, number, stored)
            dense.append((layer, {k: v for k, v in whole.items() if k.startswith(BESIDE)}))
    if memory is not None and memory.dense:
        yield from tables_of("ffn", "layers", [record for _, record in sorted(dense)])


def final_table(base: Pack, stored: Stored, tokens: Sequence[int], bases_L: Bases) -> TablePlan:
    """The last norm, and what is always in memory of the table."""
    old = derive.record_of(base.table_of(f"{FINAL}-0"), 0, stored)
    row_V = torch.empty(len(tokens), dtype=torch.float32, device="cpu")
    row_V[torch.tensor(tokens, dtype=torch.int64, device="cpu")] = torch.arange(
        len(tokens), dtype=torch.float32, device="cpu"
    )
    record = old | {ORDER: (_matrix(FLOATS, row_V[None]),)}
    is_fp32 = base.table_of("attn-0").tensors["o"][0].encoding == FLOATS
    for i, b_DR in enumerate(bases_L or ()):
        record[basis(i)] = (_matrix(FLOATS if is_fp32 else HALF, b_DR),)
    (made,) = tables_of(FINAL, "layers", [record], layers=(0,))
    return made


def _matrix(kind: str, numbers: Tensor) -> Made:
    rows, width = numbers.shape
    return Made(kind, rows, width, partial(encoding(kind).encode, numbers))
