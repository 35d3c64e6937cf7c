"""A model of the paper's 1B shape with random weights, as two packs: `python -m
experiments.memoryllm.full_size FOLDER TOKENS.gguf TEXT -o PACKS.json [--bits 4]`.

24 layers of width 2,048 with feed-forwards of 5,440 (the paper's 5,464, cut to blocks of 64), 32 heads and
128,256 tokens, all matrices in 4.5 bits: once with computed feed-forwards, and once with a table of random
rows in their place (computing it would take an hour), ordered by the use of TOKENS.gguf's tokens in the first
65,536 of TEXT.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from experiments.runs import arguments
from outsize.adapt.memory.tables import fields_of, final_table, kept_tables
from outsize.bench.synthetic.folder import write_folder
from outsize.bench.synthetic.shapes import Size
from outsize.checkpoint import tokenizer as tokenizers
from outsize.checkpoint.bounded import text_lines
from outsize.checkpoint.opening import open_checkpoint
from outsize.errors import DataError
from outsize.home import home
from outsize.pack import derive, fetch
from outsize.pack.format import Pack
from outsize.pack.kinds.tokens import ENCODINGS, header
from outsize.pack.source import derived
from outsize.pack.tables import TableHeader
from outsize.pack.tensors import Made, TablePlan
from outsize.progress import steps
from outsize.storage.records import Records
from outsize.text.prompt_file import read

SIZE = Size(24, 2048, 5440, 32, 32, 128_256)
ORDERED = 1 << 16  # tokens of a text whose counts order the rows
SCALE = 0.01


def stream(model: Path, text: Path, most: int) -> list[int]:
    """The first tokens of a text, but for those that the vocabulary has not."""
    tokens, found = tokenizers.build(open_checkpoint(model).tokenizer), list[int]()
    lines = (
        (f"{line.prompt}\n{line.answer or ''}" for line in read([text]))
        if ".jsonl" in text.suffixes
        else text_lines(text, DataError)
    )
    for line in lines:
        ids = tokens.encode(line + "\n", add_special_tokens=False).ids
        found += [i for i in ids if i < SIZE.vocab]
        if len(found) >= most:
            break
    return found[:most]


def by_use(ids: Sequence[int]) -> list[int]:
    """All tokens, those that are used most first."""
    counts = Counter(ids)
    return sorted(range(SIZE.vocab), key=lambda token: (-counts[token], token))


def _random(generator: np.random.Generator, header: TableHeader) -> Mapping[str, torch.Tensor]:
    """A record's fields: random codes, scales alike."""
    (matrix,) = header.tensors["rows"]
    out = {}
    for name, spec in matrix.specs.items():
        if name == "scale":
            out[name] = torch.full(spec.shape, SCALE, dtype=spec.dtype, device="cpu")
        else:
            drawn = generator.integers(0, 256, spec.shape, np.uint8)
            out[name] = torch.from_numpy(drawn).view(spec.dtype)
    return out


def with_table(base: Pack, bits: int, order: Sequence[int]) -> Pack:
    """The pack with random rows in place of its feed-forwards."""
    assert base.description.memory is not None
    new = replace(base.description, memory=replace(base.description.memory, is_table=True))
    made = header(new, ENCODINGS[bits])
    (matrix,) = made.tensors["rows"]
    fields = partial(_random, np.random.default_rng(0), made)
    one = Made(matrix.encoding, matrix.num_rows, matrix.width, fields)
    table = TablePlan(made, ({"rows": (one,)},) * len(made.keys))
    source = derived(base.source, f"random{bits}", {"bits": bits})
    with Records(base) as records, steps(False) as draw:
        stored = partial(fields_of, records)
        tables = [*kept_tables(base, stored), final_table(base, stored, order, None), table]
        whole = replace(base, description=new)
        return derive.derive(whole, source, tables, None, home() / "packs", draw)


def main() -> None:
    told = arguments(__doc__, "folder", "tokens", "text", bits=4)
    folder = Path(told.folder)
    if not folder.exists():
        write_folder(folder, "memoryllm", SIZE, 0)
    base = fetch.pack(str(folder), encoding="q4_0")
    table = with_table(base, told.bits, by_use(stream(Path(told.tokens), Path(told.text), ORDERED)))
    told.output.write_text(json.dumps({"computed": str(base.path), "table": str(table.path)}))


if __name__ == "__main__":
    main()
