"""Feed-forwards of the token's embedding: a table gives what computing gives, for every token; what is read
from disk is what memory holds, bit for bit, at any number of slots; whatever runs beside."""

from __future__ import annotations

import gzip
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import outsize
from outsize.adapt.memory.rows import RowMaker
from outsize.adapt.memory.tables import TableOptions, make_tables, order
from outsize.caching.policy import Hints, make
from outsize.draft.spec import parse_draft
from outsize.engine import load as loading
from outsize.engine.model import Model
from outsize.errors import DataError, OptionError, PackError, UnsupportedError
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.kernels.rows import Rows
from outsize.model.step import Step, TokenInputs
from outsize.pack import fetch
from outsize.pack.format import Pack
from outsize.pack.kinds.tokens import KIND, layout
from outsize.pack.outline import of_pack
from outsize.plan import cost, fixed, place
from outsize.plan.drafts import with_drafting
from outsize.plan.layers_off import parse_layers
from outsize.plan.machine import Compute, Machine
from outsize.plan.placement import BY_TOKEN, DISK
from outsize.storage.reader import Reader
from outsize.storage.stats import IOStats
from outsize.storage.table import Table
from outsize.system import memory as budget
from outsize.weights.tokens import POLICY, TokenCache, TokenTable
from tests.golden import tiny
from tests.golden.test_golden import logits

TEXT = "the cat sat on the mat; the dog sat on the log. " * 12
# Of few tokens: longer ones are computed as matmuls, and equal to rounding.
PROMPTS = [TEXT[:3], "ab"]
Tabled = Callable[..., Pack]


@pytest.fixture(scope="module")
def tabled(folder_of: Callable[[str], Path], home: Path) -> Tabled:
    """The pack of a tiny model's table."""

    def make(
        family: str = "memoryllm", encoding: str = "q8_0", bits: int = 16, **more: object
    ) -> Pack:
        base = fetch.pack(str(folder_of(family)), encoding=encoding, quiet=True)
        options = TableOptions(bits=bits, quiet=True, **more)  # type: ignore[arg-type]
        return make_tables(base, options).pack

    return make


@pytest.fixture
def least(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Model]]:
    """Open a pack with as little memory as it runs in, and so many slots of its table."""
    monkeypatch.setattr(loading, "runtime_bytes", lambda *_: 0)
    monkeypatch.setattr(budget, "resident", lambda *_: 0)
    monkeypatch.setattr(place, "TOKENIZER_PEAK", 0)
    monkeypatch.setattr(place, "TOKENIZER_FACTOR", 0)
    opened: list[Model] = []

    def make(pack: Pack, slots: int = 2, **options: object) -> Model:
        monkeypatch.setattr("outsize.pack.kinds.tokens.LEAST", slots)
        made: dict[str, Any] = {"context": 256, "quiet": True, "draft": "none", **options}
        spec = parse_draft(made["draft"])
        outline = replace(of_pack(pack), streams=made.get("streams", 1))
        memory = place.least_bytes(with_drafting(spec, outline), 0, 0, 256)
        opened.append(outsize.load(str(pack.path), memory=memory, **made))
        return opened[-1]

    yield make
    for model in opened:
        model.close()


def values(model: Model) -> torch.Tensor:
    """(V, L, D): what each token adds in each layer of a model with a table."""
    t, every = model.transformer, range(tiny.VOCAB)
    assert t.loaded.tokens is not None
    recall = t.loaded.tokens.ask(every)
    step = Step(
        Rows([], False), {}, t.backend, tokens=TokenInputs(None, recall.part(slice(0, tiny.VOCAB)))
    )
    found = [layer.resident.memory(step) for layer in t.paged_layers[1::2]]  # type: ignore[union-attr]
    return torch.stack(found, 1).float()


@pytest.mark.parametrize("family", ["memoryllm", "memoryllm+dense"])
@torch.inference_mode()
def test_a_table_gives_the_bits_of_computing(
    family: str, tabled: Tabled, open_tiny: Callable[..., Model]
) -> None:
    """Over the whole vocabulary: in groups of 8 bits a row's product is its own."""
    pack = tabled(family)
    computed = RowMaker(open_tiny(family, "q8_0").transformer, ()).values(range(tiny.VOCAB))
    with outsize.load(str(pack.path), quiet=True) as model:
        assert torch.equal(values(model), computed)
        lengths = [1] * 40
        want = logits(open_tiny(family, "q8_0"), lengths)
        np.testing.assert_array_equal(logits(model, lengths), want)
        ours = [
            model.generate(p, max_tokens=24, ignore_eos=True, raw=True)[0].text
            for p in (TEXT[:90], "ab")
        ]
    theirs = open_tiny(family, "q8_0")
    assert ours == [
        theirs.generate(p, max_tokens=24, ignore_eos=True, raw=True)[0].text
        for p in (TEXT[:90], "ab")
    ]


@torch.inference_mode()
def test_a_float_model_is_equal_to_rounding(
    tabled: Tabled, open_tiny: Callable[..., Model]
) -> None:
    pack = tabled(encoding="fp32")
    computed = RowMaker(open_tiny("memoryllm", "fp32").transformer, ()).values(range(tiny.VOCAB))
    with outsize.load(str(pack.path), quiet=True) as model:
        torch.testing.assert_close(values(model), computed, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.01), (4, 0.12)])
@torch.inference_mode()
def test_fewer_bits_and_ranks_are_near(bits: int, most: float, tabled: Tabled) -> None:
    with outsize.load(str(tabled().path), quiet=True) as model:
        whole = values(model)
    with outsize.load(str(tabled(bits=bits).path), quiet=True) as model:
        error = (values(model) - whole).norm() / whole.norm()
        assert 0 < error < most
        assert model.pack.size < tabled().size


@torch.inference_mode()
def test_ranks(tabled: Tabled) -> None:
    """More numbers are nearer; shared out between layers, no farther than alike."""
    with outsize.load(str(tabled().path), quiet=True) as model:
        whole = values(model)
    errors = []
    for more in ({"rank": 0.25}, {"rank": 0.75}, {"rank": 0.75, "by_layer": True}):
        pack = tabled(**more)
        assert pack.description.memory is not None
        ranks = pack.description.memory.ranks
        assert sum(ranks) == round(float(str(more["rank"])) * 64) * tiny.LAYERS
        with outsize.load(str(pack.path), quiet=True) as model:
            errors.append(float((values(model) - whole).norm() / whole.norm()))
    assert errors[1] < errors[0] / 1.5
    assert errors[2] <= errors[1] * 1.01


@pytest.mark.parametrize("slots", [1, 2, 9, 29])
def test_disk_equals_memory_bit_for_bit(
    slots: int, tabled: Tabled, least: Callable[..., Model]
) -> None:
    """At any number of slots."""
    pack = tabled("memoryllm+dense")
    prompts = [TEXT, TEXT[5:40], "another one"]
    with outsize.load(str(pack.path), quiet=True, context=256, draft="none") as model:
        want = [model.generate(p[:200], max_tokens=20, ignore_eos=True)[0].text for p in prompts]
        all_logits = logits(model, [25, 1, 1, 13])
    paged = least(pack, slots)
    table = paged.transformer.loaded.tokens
    assert table is not None
    assert (table.cache.slots, len(table.cache.table)) == (slots, 29)
    np.testing.assert_array_equal(logits(paged, [25, 1, 1, 13]), all_logits)
    for p, text in zip(prompts, want, strict=True):
        assert paged.generate(p[:200], max_tokens=20, ignore_eos=True)[0].text == text
    assert (paged.counts().experts.misses > 0) == (slots < 29)


def steps_through(pack: Pack, slots: int, steps: list[list[int]]) -> list[torch.Tensor]:
    """All layers' numbers of each step's tokens (layers, T, W), through so many slots, cold."""
    (header,) = [t for t in pack.tables if t.kind == "tokens"]
    stored, out = Table(pack.path, header, IOStats(), "first"), []
    with Reader() as reader:
        cache = TokenCache(stored, reader, partial(make, POLICY, slots, Hints()), slots)
        table = TokenTable(cache, torch.arange(tiny.VOCAB))
        for tokens in steps:
            recalled = table.ask(tokens).part(slice(0, len(tokens)))
            out.append(torch.stack([recalled.numbers(layer) for layer in range(tiny.LAYERS)]))
            cache.slot_table.begin_pass()
    stored.close()
    return out


@torch.inference_mode()
def test_any_steps_at_every_number_of_slots(tabled: Tabled) -> None:
    """Of one token, of few, and of more than there are slots; tokens in them twice."""
    pack, drawn = tabled(bits=8), random.Random(0)
    (header,) = [t for t in pack.tables if t.kind == "tokens"]
    sizes = [drawn.choice((1, 1, 1, 5, 90)) for _ in range(40)]
    steps = [[drawn.randrange(tiny.VOCAB) for _ in range(size)] for size in sizes]
    with outsize.load(str(pack.path), quiet=True) as model:
        want_VLW = values(model)
    for slots in range(1, len(header.keys) + 1):
        for tokens, got_LTW in zip(steps, steps_through(pack, slots, steps), strict=True):
            assert torch.equal(got_LTW.transpose(0, 1), want_VLW[tokens])


def test_drafts_and_batches_are_exact(tabled: Tabled, least: Callable[..., Model]) -> None:
    pack = tabled(bits=8)
    plain, drafting = least(pack, 5), least(pack, 5, draft="ngram:k=4", streams=3)
    want = [plain.generate(TEXT[i : i + 60], max_tokens=20, ignore_eos=True)[0] for i in range(3)]
    got = drafting.generate([TEXT[i : i + 60] for i in range(3)], max_tokens=20, ignore_eos=True)
    assert [r.text for r in got] == [r.text for r in want]
    assert sum(r.drafted for r in got) > 0


def test_a_prompt_reads_each_row_once_and_in_order(
    tabled: Tabled, least: Callable[..., Model]
) -> None:
    model = least(tabled(bits=16), 3)
    table = model.transformer.loaded.tokens
    assert table is not None
    order = list(range(tiny.VOCAB))
    before, reads = table.cache.table.bytes_of.tolist(), []
    submit = table.cache.ask
    table.cache.ask = lambda ids: reads.append(list(ids)) or submit(ids)  # type: ignore[method-assign,func-returns-value]
    tokens = [tokens * 7 % 200 for tokens in range(120)] * 2
    full(model.transformer, [Span(0, tokens)], [model.transformer.new_kv()])
    stride = table.cache.table.header.stride
    read = [
        (a - b) // stride for a, b in zip(table.cache.table.bytes_of.tolist(), before, strict=True)
    ]
    assert max(read) == 1
    assert sum(read) >= len({order[t] // 10 for t in tokens}) - 3
    asked = [i for wave in reads for i in wave]
    assert asked == sorted(set(asked))


def test_rows_are_in_the_order_of_their_use(
    tabled: Tabled, tmp_path: Path, open_tiny: Callable[..., Model]
) -> None:
    base = open_tiny("memoryllm", "q8_0").pack
    text = tmp_path / "text.txt"
    text.write_text("zzzzz yyy x")
    first = order(base, [text])
    counts = [open_tiny("memoryllm", "q8_0").tokens.encode(c, start=False)[0] for c in "zy"]
    assert first[:2] == counts
    assert sorted(first) == list(range(tiny.VOCAB))
    assert order(base, ())[:3] == [0, 1, 2]
    lines, objects = tmp_path / "lines.txt", tmp_path / "objects.jsonl"
    lines.write_text("x\n\n\n")  # ends of lines are tokens, too
    objects.write_text('{"prompt": "yyyyy", "answer": "z"}\n')  # what is said, not keys
    (end,) = open_tiny("memoryllm", "q8_0").tokens.encode("\n", start=False)
    assert order(base, [lines])[0] == end
    assert order(base, [objects])[0] == counts[1]
    paths = str(tabled(data=(text,)).path), str(tabled().path)
    with outsize.load(paths[0], quiet=True) as one, outsize.load(paths[1], quiet=True) as two:
        assert torch.equal(values(one), values(two))


def test_layers_off(tabled: Tabled, open_tiny: Callable[..., Model]) -> None:
    pack = tabled("memoryllm+dense")
    with outsize.load(str(pack.path), quiet=True) as model:
        whole = logits(model, [40])
    with outsize.load(str(pack.path), quiet=True, layers_off="0,2") as model:
        some = logits(model, [40])
        (reply,) = model.generate("a", max_tokens=2)
    assert not np.allclose(whole, some)
    assert reply.lossy
    assert reply.options["layers_off"] == "0, 2"
    with outsize.load(
        str(open_tiny("memoryllm+dense", "q8_0").pack.path), layers_off="0,2", quiet=True
    ) as m:
        np.testing.assert_allclose(logits(m, [1] * 40), some, atol=0.3)


def test_what_layers_off_says() -> None:
    assert parse_layers("3,7-9, 1") == (1, 3, 7, 8, 9)
    for text in ("a", "3-1", "1,,2", "-1"):
        with pytest.raises(OptionError, match="layers_off is"):
            parse_layers(text)


def test_what_cannot_be_is_refused_in_a_sentence(
    tabled: Tabled, folder_of: Callable[[str], Path]
) -> None:
    for bad, match in (
        ({"bits": 5}, "bits is 5; a table is of 16, 8, 4 bits"),
        ({"rank": 1.0}, "rank is 1; give a share"),
        ({"rank": 0.0}, "rank is 0; give a share"),
        ({"by_layer": True}, "none is given; give --rank"),
    ):
        with pytest.raises(OptionError, match=match):
            TableOptions(**bad)  # type: ignore[arg-type]
    llama = fetch.pack(str(folder_of("llama")), quiet=True)
    with pytest.raises(UnsupportedError, match="read more than the token's embedding"):
        make_tables(llama, TableOptions(quiet=True))
    with pytest.raises(OptionError, match="has its table already"):
        make_tables(tabled(), TableOptions(quiet=True))
    with pytest.raises(OptionError, match="multiples of 64; leave --rank out"):
        tabled(bits=4, rank=0.5)
    with pytest.raises(DataError, match="nowhere"):
        tabled(data=(Path("nowhere.txt"),))
    for options, match in (
        ({"layers_off": "9"}, "has layers 0 to 2; name some"),
        ({"prefill": "lazy"}, "use prefill=full"),
    ):
        with pytest.raises(OptionError, match=match):
            outsize.load(str(tabled().path), quiet=True, **options)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="leave --ranks out"):
        outsize.load(str(tabled().path), quiet=True, ranks=2)
    with pytest.raises(OptionError, match="none can be left out"):
        outsize.load(str(llama.path), quiet=True, layers_off="1")


def test_damage_and_anothers_table_are_typed_errors(
    tabled: Tabled, tmp_path: Path, own_home: Path
) -> None:
    pack = tabled(bits=8)
    for name in ("flipped", "swapped", "tokenizer", "short"):
        shutil.copytree(pack.path, tmp_path / name)
    file = tmp_path / "flipped" / "memory-0.records"
    raw = bytearray(file.read_bytes())
    raw[5] ^= 1
    file.write_bytes(raw)
    other = tabled(encoding="fp32", bits=8)  # as long, and another model's
    shutil.copy(other.path / "memory-0.records", tmp_path / "swapped")
    for name in ("flipped", "swapped"):
        with pytest.raises(PackError, match=r"of memory-0\.records does not match its checksum"):
            outsize.load(str(tmp_path / name), quiet=True)
    text = gzip.decompress((pack.path / "tokenizer.json.gz").read_bytes())
    (tmp_path / "tokenizer" / "tokenizer.json.gz").write_bytes(gzip.compress(text + b" "))
    with pytest.raises(PackError, match="its tokenizer does not match its checksum"):
        outsize.load(str(tmp_path / "tokenizer"), quiet=True)
    (tmp_path / "short" / "memory-0.records").write_bytes(raw[:-4096])
    with pytest.raises(PackError, match="bytes of"):
        outsize.load(str(tmp_path / "short"), quiet=True)


def test_a_damaged_row_that_is_read_later_is_a_typed_error(
    tabled: Tabled, least: Callable[..., Model], tmp_path: Path
) -> None:
    """Rows that are not held are checked when they are read; replies that need others go on."""
    whole, pack = least(tabled(bits=8), 2), replace(tabled(bits=8), path=tmp_path / "damaged")
    (header,) = [t for t in pack.tables if t.kind == "tokens"]
    good, each = whole.tokens.encode("ab", start=False), header.keys[1]
    pieces = {i: whole.tokens.decode([i]) for i in range(tiny.VOCAB)}
    alone = [i for i, piece in pieces.items() if whole.tokens.encode(piece, start=False) == [i]]
    bad = next(i for i in alone[::-1] if i // each not in {token // each for token in good})
    shutil.copytree(tabled(bits=8).path, pack.path)
    raw = bytearray((pack.path / header.file).read_bytes())
    raw[bad // each * header.stride] ^= 1
    (pack.path / header.file).write_bytes(raw)
    model = least(pack, 2)
    for _ in range(2):
        want = whole.generate("ab", max_tokens=1, ignore_eos=True, raw=True)[0].text
        assert model.generate("ab", max_tokens=1, ignore_eos=True, raw=True)[0].text == want
        with pytest.raises(PackError, match=r"of memory-0\.records does not match its checksum"):
            model.generate(pieces[bad], max_tokens=1, raw=True)


def test_a_table_of_another_layout_has_a_fault(tabled: Tabled) -> None:
    pack = tabled(bits=8)
    d, (table,) = pack.description, [t for t in pack.tables if t.kind == "tokens"]
    group = KIND.groups(d)[0]
    assert KIND.fault(d, group, [table]) == ""
    for wrong in (
        replace(table, stride=2 * table.stride),
        replace(table, keys=table.keys[::-1]),
        replace(table, num_rows=table.num_rows + 1),
        replace(table, kind="rows"),
        replace(table, tensors={}),
    ):
        assert KIND.fault(d, group, [wrong])
    assert KIND.fault(d, group, [])


def test_records_are_pages(tabled: Tabled) -> None:
    """Rows that are small share a page; a large one is one run of its own."""
    _, stride, rows = layout([2048] * 24, "group4")
    assert (rows, stride) == (1, 28_672)  # 4.5 bits a number
    _, stride, rows = layout([64] * 3, "group4")
    assert stride == 4096
    assert rows * 3 * 36 > 3500


def test_the_plan_names_the_tier(tabled: Tabled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outsize.pack.kinds.tokens.LEAST", 2)
    pack = tabled(bits=4)
    assert fetch.find(str(pack.path)) is not None
    outline = of_pack(pack)
    low = place.least_bytes(outline, 0, 0, 256)
    placed = place.place(outline, low, 0, 0, 256)
    tiers = {group: tier for group, tier, _ in placed.groups if tier != "memory"}
    assert tiers.get("memory-0") == BY_TOKEN
    assert any("group4" in note for note in placed.notes)
    assert placed.planned <= low


def test_a_prediction_waits_for_one_row_a_token(
    tabled: Tabled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where layers are on disk, too: the rows of other tokens are no records that a token waits for."""
    monkeypatch.setattr("outsize.pack.kinds.tokens.LEAST", 2)
    monkeypatch.setattr(Machine, "disk_bytes_per_s", 1e9)
    outline = of_pack(tabled(bits=4))
    placed = place.place(outline, place.least_bytes(outline, 0, 0, 256), 0, 0, 256)
    placed = replace(placed, groups=(*placed.groups, ("attn-0", DISK, 1_000_000)))
    compute = Compute({"attn-0": 1e-3, "head": 1e-3, "embed": 1e-3}, {}, 32)
    found = cost.predict(outline, Machine("", (), {}), placed, compute, 32)
    streamed = [t for t in outline.tables if t.kind != "tokens"]
    waits = sum(len(t.keys) - len(placed.shares[t.name].pinned) for t in streamed)
    assert placed.streamed >= 1_000_000
    most = (waits + 1) * cost.MISS_S
    assert 0 <= found.compute_s - cost.step_s(outline, compute) <= most * (1 + 1e-9)


def test_slots_of_small_rows_are_counted(tabled: Tabled) -> None:
    """With what remembers them, and never more than the budget."""
    outline = of_pack(tabled(bits=4))
    least = place.least_bytes(outline, 0, 0, 256)
    for more in range(0, 200_000, 9_000):
        placed = place.place(outline, least + more, 0, 0, 256)
        assert placed.planned <= least + more
        share = placed.shares["memory-0"]
        known = len(outline.table("memory-0").keys) * fixed.ROW_BYTES
        slots = (len(share.pinned) + share.ring) * fixed.ROW_SLOT_BYTES
        assert placed.fixed["cache policy"] == known + slots
