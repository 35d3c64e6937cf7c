"""Laws of several ranks that run one model: `cut=gather` gives the bits of one rank, `cut=sum` is equal to
rounding, ranks never differ, and what goes over the wire is what the formula says.

Ranks are threads here, each with a backend and shards of its own (tests/parallel/sharded.py); processes are
in tests/parallel/.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from outsize.engine.model import Model
from outsize.errors import OptionError, PackError, UnsupportedError
from outsize.forward.full import full, hidden
from outsize.forward.span import Span
from outsize.model.lora_file import read_adapter
from outsize.model.transformer import Transformer
from outsize.pack.format import Pack, read_header
from outsize.pack.kinds.kind import kinds
from outsize.parallel.points import Points
from outsize.parallel.split import Ranks, Way, parts, split
from outsize.parallel.transport import threads
from outsize.weights.open_pack import LoadPlan
from outsize.weights.residency import Share
from tests.drafts import write_peft
from tests.golden import tiny
from tests.laws.spans import logits
from tests.parallel.sharded import Rank, opened, shards_of

FAMILIES = ("llama+wide", "qwen2+wide", "qwen3+wide", "gemma3+wide", "llama+biases")
TWO, THREE = (2.0, 1.0), (3.0, 1.0, 1.5)
GATHER, SUM, HEADS = Way(), Way("sum"), Way("sum", "heads")


def batch(model: Transformer) -> Tensor:
    """Eight sequences: prompts together, then steps of a few tokens together."""
    kvs = [model.new_kv() for _ in range(8)]
    prompts = [tiny.TOKENS[i : i + 3 + 4 * i] for i in range(8)]
    full(model, [Span(0, p) for p in prompts], kvs)
    rows = []
    for step in range(3):
        at = [len(p) + 2 * step for p in prompts]
        spans = [Span(a, tiny.TOKENS[i : i + 2], 2) for i, a in enumerate(at)]
        rows += [out.logits_KV for out in full(model, spans, kvs)]
    return torch.cat(rows)


def alone(model: Transformer) -> Tensor:
    """The first step of `batch`, sequence by sequence and token by token."""
    rows = []
    for i in range(8):
        kv, prompt = model.new_kv(), tiny.TOKENS[i : i + 3 + 4 * i]
        full(model, [Span(0, prompt)], [kv])
        for at, token in enumerate(tiny.TOKENS[i : i + 2], len(prompt)):
            rows.append(full(model, [Span(at, [token])], [kv])[0].logits_KV)
    return torch.cat(rows)


def script(model: Transformer) -> Tensor:
    """A prompt, single tokens, drafts, and a batch."""
    return torch.cat([logits(model), batch(model)])


def alike(found: Sequence[Tensor]) -> Tensor:
    """L2: every rank has the same bits."""
    for other in found[1:]:
        assert torch.equal(found[0], other)
    return found[0]


def half(pack: Pack) -> LoadPlan:
    """Every second layer is read at each use, and all of the head."""
    shares = {}
    for t in pack.tables:
        count = len(t.keys)
        if kinds()[t.kind].from_front:
            shares[t.name] = Share((), min(2, count))
        elif t.name != "final-0":
            shares[t.name] = Share(tuple(range(0, count, 2)), 1)
    return LoadPlan(shares)


EXACT = [
    *((family, "q4_0", True, speeds) for family in FAMILIES[:4] for speeds in (TWO, THREE)),
    ("llama+biases", "q4_0", True, TWO),
    *(
        ("llama+wide", encoding, True, THREE)
        for encoding in ("int4", "int8", "q5_1", "palette4-fp16")
    ),
    *(("gemma3+wide", encoding, False, THREE) for encoding in ("int4", "int8", "bf16", "fp32")),
]


@pytest.mark.parametrize(("family", "encoding", "native", "speeds"), EXACT)
def test_gathered_ranks_give_the_bits_of_one(
    family: str,
    encoding: str,
    native: bool,
    speeds: Sequence[float],
    open_tiny: Callable[..., Model],
) -> None:
    """L3, L2."""
    one = open_tiny(family, encoding, native)
    packs = shards_of(one.pack, speeds, GATHER)
    with opened(packs, native) as run:
        assert torch.equal(alike(run(lambda rank: script(rank.model))), script(one.transformer))


def test_gathered_ranks_at_half_memory(open_tiny: Callable[..., Model]) -> None:
    """L3 where records are read at each use."""
    one = open_tiny("qwen2+wide", "q4_0")
    with opened(shards_of(one.pack, TWO, GATHER), plan=half) as run:
        assert torch.equal(alike(run(lambda rank: script(rank.model))), script(one.transformer))
        assert all(run(lambda rank: rank.loaded.stats.bytes_read > 2 * rank.pack.size))


@pytest.mark.parametrize("way", [GATHER, SUM, HEADS], ids=str)
@pytest.mark.parametrize("encoding", ["fp32", "q4_0"])
def test_adapters(way: Way, encoding: str, open_tiny: Callable[..., Model], tmp_path: Path) -> None:
    """L3, L4: each rank has its part of the factors."""
    one = open_tiny("llama+wide", encoding)
    folder = write_peft(one, tmp_path / "lora", 3)

    def run_with(model: Transformer, pack: Pack) -> Tensor:
        adapter, kv, rows = read_adapter(pack, "a", folder), model.new_kv(), []
        for at, size in ((0, 30), (30, 1), (31, 4)):
            span = Span(at, tiny.TOKENS[at : at + size], size, adapter=adapter)
            rows.append(full(model, [span], [kv])[0].logits_KV)
        return torch.cat(rows)

    due = run_with(one.transformer, one.pack)
    assert not torch.equal(due[:1], logits(one.transformer)[:1]), "the adapter does something"
    with opened(shards_of(one.pack, TWO, way)) as run:
        found = alike(run(lambda rank: run_with(rank.model, rank.pack)))
    if way == GATHER:
        assert torch.equal(found, due)
    else:
        near(found, due, encoding)


RELAY = Way("layers")


@pytest.mark.parametrize(
    ("family", "encoding", "speeds"),
    [
        ("qwen2+wide", "q4_0", TWO), ("gemma3+wide", "q4_0", THREE), ("llama", "fp32", THREE),
        ("olmoe", "q4_0", TWO), ("gpt_oss", "bf16", TWO), ("deepseek_v3", "bf16", TWO),
    ],
)  # fmt: skip
def test_a_relay_gives_the_bits_of_one(
    family: str, encoding: str, speeds: Sequence[float], open_tiny: Callable[..., Model]
) -> None:
    """L3, L6, of ranks that have layers: any model, experts too."""
    one, transports = open_tiny(family, encoding), threads(len(speeds))
    with opened(shards_of(one.pack, speeds, RELAY), transports=transports) as run:
        assert torch.equal(run(lambda rank: script(rank.model))[0], script(one.transformer))
        before = [(t.wire.sent, t.wire.messages) for t in transports]
        run(lambda rank: full(rank.model, [Span(0, tiny.TOKENS[:7], 2)], [rank.model.new_kv()]))
    after = [(t.wire.sent, t.wire.messages) for t in transports]
    more = [(a[0] - b[0], a[1] - b[1]) for a, b in zip(after, before, strict=True)]
    row = 4 * tiny.WIDTH
    assert more == [(7 * row, 1)] * (len(speeds) - 1) + [(2 * row, 1)], "back: what is wanted"


@pytest.mark.parametrize(("start", "want"), [(0, 1), (0, 40), (20, 0), (0, 90)])
@pytest.mark.parametrize("speeds", [TWO, THREE])
def test_a_relay_of_chunks(
    start: int, want: int, speeds: Sequence[float], open_tiny: Callable[..., Model]
) -> None:
    """L3, L6: chunks follow each other, and rows that are wanted come back from those that have any."""
    one, transports, tokens = open_tiny("qwen2+wide", "q4_0"), threads(len(speeds)), 90

    def run_with(model: Transformer) -> Tensor:
        before, model.chunk = model.chunk, 32
        try:
            kv, ids = model.new_kv(), (tiny.TOKENS * 4)[: start + tokens + 1]
            for span in [Span(0, ids[:start], 0)] if start else []:
                hidden(model, [(span, kv)])
            pairs = [(Span(start, ids[start : start + tokens], want), kv)]
            (h_TD,) = hidden(model, pairs)
            out = full(model, [Span(start + tokens, ids[-1:])], [kv])[0].logits_KV
            return torch.cat([h_TD[tokens - want :].flatten(), out.flatten()])
        finally:
            model.chunk = before

    with torch.inference_mode():
        due = run_with(one.transformer)
    with opened(shards_of(one.pack, speeds, RELAY), transports=transports) as run:
        assert torch.equal(run(lambda rank: run_with(rank.model))[0], due)
    row, chunks = 4 * tiny.WIDTH, -(-(start % 32 + tokens) // 32)
    narrow = 1 + bool(start)
    assert [t.wire.sent for t in transports[:-1]] == [(start + tokens + 1) * row] * (
        len(speeds) - 1
    )
    assert [t.wire.messages for t in transports[:-1]] == [chunks + narrow] * (len(speeds) - 1)
    assert transports[-1].wire.sent == (want + 1) * row


def test_a_relay_at_half_memory(open_tiny: Callable[..., Model]) -> None:
    one = open_tiny("qwen2+wide", "q4_0")
    with opened(shards_of(one.pack, TWO, RELAY), plan=half) as run:
        assert torch.equal(run(lambda rank: script(rank.model))[0], script(one.transformer))


def near(found: Tensor, due: Tensor, encoding: str) -> None:
    """L4: to rounding, of fp32 or of bf16."""
    assert not torch.equal(found, due), "sums in another order round otherwise"
    if encoding == "fp32":
        assert (found - due).abs().max() <= 1e-4 * due.abs().max()
        assert torch.equal(found.argmax(1), due.argmax(1))
    else:
        p, q = torch.log_softmax(due.double(), 1), torch.log_softmax(found.double(), 1)
        assert (p.exp() * (p - q)).sum(1).mean() <= 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("encoding", "way"), [("fp32", SUM), ("q4_0", SUM), ("fp32", HEADS)])
def test_sums_are_equal_to_rounding(
    family: str, encoding: str, way: Way, open_tiny: Callable[..., Model]
) -> None:
    """L4, L2."""
    one = open_tiny(family, encoding)
    speeds = TWO if way == HEADS or family == "llama+biases" else THREE
    with opened(shards_of(one.pack, speeds, way)) as run:
        near(alike(run(lambda rank: script(rank.model))), script(one.transformer), encoding)


@pytest.mark.parametrize(("bits", "most"), [(8, 2e-3), (4, 0.2)])
@pytest.mark.parametrize("way", [SUM, HEADS], ids=str)
def test_sums_in_few_bits(
    way: Way, bits: int, most: float, open_tiny: Callable[..., Model]
) -> None:
    """L2: lossy, and yet the same bits on all ranks; fewer bits go over the wire."""
    one, transports = open_tiny("llama+wide", "q4_0"), threads(2)
    packs = shards_of(one.pack, TWO, way)
    with opened(packs, transports=transports, points=lambda _: Points(rest=bits)) as run:
        found, due = alike(run(lambda rank: script(rank.model))), script(one.transformer)
        p, q = torch.log_softmax(due.double(), 1), torch.log_softmax(found.double(), 1)
        assert 0 < (p.exp() * (p - q)).sum(1).mean() <= most
        before = transports[0].wire.sent
        run(lambda rank: full(rank.model, [Span(0, tiny.TOKENS[:7])], [rank.model.new_kv()]))
    meetings = tiny.LAYERS * (2 if way == HEADS else 1)
    each = tiny.WIDTH * bits // 8 + 2 * (tiny.WIDTH // 64)
    assert transports[0].wire.sent - before == 7 * meetings * each


@pytest.mark.parametrize("way", [SUM, HEADS], ids=str)
def test_rows_of_sums_do_not_see_their_company(way: Way, open_tiny: Callable[..., Model]) -> None:
    """L5."""
    one = open_tiny("qwen2+wide", "q4_0")

    with opened(shards_of(one.pack, TWO, way)) as run:
        together = alike(run(lambda rank: batch(rank.model)))[:16]
        assert torch.equal(together, alike(run(lambda rank: alone(rank.model))))


@pytest.mark.parametrize("way", [GATHER, SUM, HEADS], ids=str)
def test_what_goes_over_the_wire(way: Way, open_tiny: Callable[..., Model]) -> None:
    """L6, and L2 of the residual stream."""
    one = open_tiny("qwen3+wide", "q4_0")
    packs, tokens, world = shards_of(one.pack, TWO, way), 30, 2
    transports = threads(world)
    with opened(packs, transports=transports) as run:
        rows = run(
            lambda rank: hidden(rank.model, [(Span(0, tiny.TOKENS[:tokens]), rank.model.new_kv())])[
                0
            ]
        )
        alike(rows)
    syncs = tiny.LAYERS * {GATHER: 2, SUM: 1, HEADS: 2}[way]
    for transport, pack in zip(transports, packs, strict=True):
        shard = pack.description.shard
        assert shard is not None
        width = 2 * tiny.WIDTH if way == HEADS else tiny.WIDTH
        if way == GATHER:
            width = shard.outer + shard.neurons[1] - shard.neurons[0]
        assert transport.wire.messages == syncs * (world - 1)
        assert transport.wire.sent == 2 * width * tokens * tiny.LAYERS * (world - 1)


@pytest.mark.parametrize("way", [GATHER, SUM, HEADS], ids=str)
def test_one_rank_is_no_ranks(way: Way, open_tiny: Callable[..., Model]) -> None:
    """L7."""
    one = open_tiny("gemma3+wide", "q4_0")
    transports = threads(1)
    with opened(shards_of(one.pack, (1.0,), way), transports=transports) as run:
        assert torch.equal(run(lambda rank: script(rank.model))[0], script(one.transformer))
    assert transports[0].wire.messages == 0


def test_what_is_not_summed_is_seen(open_tiny: Callable[..., Model]) -> None:
    """The laws above can fail: a rank that keeps its own part gives another answer."""
    one = open_tiny("llama+wide", "fp32")
    (pack, _) = shards_of(one.pack, TWO, SUM)
    with opened([pack], transports=threads(1)) as run:

        def own(rank: Rank) -> Tensor:
            return logits(Transformer(rank.pack.description, rank.loaded))

        due = logits(one.transformer)
        assert (run(own)[0] - due).abs().max() > 1e-2 * due.abs().max()


def test_a_shard_is_kept_and_checked(open_tiny: Callable[..., Model]) -> None:
    one = open_tiny("llama+wide", "q4_0")
    first, again = (shards_of(one.pack, TWO, GATHER) for _ in range(2))
    assert [p.path for p in first] == [p.path for p in again]
    assert len({p.source.identity for p in (*first, one.pack)}) == 3
    linked = {t.name for t in one.pack.tables if not t.name.startswith("ffn")}
    for name in linked:
        file = one.pack.table_of(name).file
        assert (first[0].path / file).stat().st_ino == (one.pack.path / file).stat().st_ino
    layers = [sum(t.size for t in p.tables if t.name.startswith("ffn")) for p in first]
    whole = sum(t.size for t in one.pack.tables if t.name.startswith("ffn"))
    assert layers[1] < layers[0] < whole


def test_a_shard_that_lies_is_refused(open_tiny: Callable[..., Model], tmp_path: Path) -> None:
    import json
    import shutil
    import zlib

    one = open_tiny("llama+wide", "q4_0")
    (_, pack) = shards_of(one.pack, TWO, GATHER)
    for name, value, problem in (
        ("rank", 5, "rank 5 of 2"),
        ("neurons", [0, 128], "which are not shared out so"),
        ("cut", "other", "cut by 'other'"),
        ("ffn_width", 640, "which are not shared out so"),
        ("heads", [0, 2], "not those of its ranges"),
        ("orders", [[0, 0]], "orders of its key heads are none"),
    ):
        folder = tmp_path / name
        shutil.copytree(pack.path, folder)
        body = json.loads((folder / "pack.json").read_text())["pack"]
        body["description"]["shard"][name] = value
        text = json.dumps(body, sort_keys=True)
        whole = {"checksum": zlib.crc32(text.encode()), "pack": body}
        (folder / "pack.json").write_text(json.dumps(whole))
        with pytest.raises(PackError, match=problem):
            read_header(folder)


def test_what_cannot_be_cut_is_refused_by_name(open_tiny: Callable[..., Model]) -> None:
    def shards(family: str, way: Way, world: int = 2, encoding: str = "q4_0") -> object:
        pack = open_tiny(family, encoding).pack
        return split("it", pack.description, pack.tables, Ranks((1.0,) * world), way)

    with pytest.raises(UnsupportedError, match="it is a mixture of experts"):
        shards("olmoe", GATHER, encoding="bf16")
    with pytest.raises(UnsupportedError, match="two-matrix feed-forwards, which ranks do not"):
        shards("falcon", GATHER)
    with pytest.raises(UnsupportedError, match=r"norms all query heads as one.*attention=whole"):
        shards("olmo2", HEADS)
    with pytest.raises(UnsupportedError, match="2 key heads, which 3 ranks cannot share"):
        shards("llama+wide", HEADS, 3)
    with pytest.raises(
        UnsupportedError, match=r"neurons are cut in steps of 32.*320.*use fewer ranks"
    ):
        shards("llama+wide", SUM, 11)
    with pytest.raises(OptionError, match="write cut=sum"):
        shards("llama+wide", Way("gather", "heads"))
    with pytest.raises(UnsupportedError, match="3 layers, fewer than 4 ranks"):
        shards("llama", RELAY, 4)
    with pytest.raises(
        UnsupportedError, match="experts in layers 1 to 2, and a rank would have none"
    ):
        shards("deepseek_v3", RELAY, 3, "bf16")
    with pytest.raises(OptionError, match="ranks is 65"):
        shards("llama+wide", GATHER, 65)


def test_layers_follow_speed_then_memory(open_tiny: Callable[..., Model]) -> None:
    """Whatever the head is to the leader: a prompt has nothing to do with it."""
    d = open_tiny("llama", "q4_0").pack.description
    d = replace(d, layers=d.layers * 4)
    assert d.num_layers == 12

    def layers(speeds: Sequence[float], *most: int | None) -> list[tuple[int, int]]:
        return [s.layers for s in split("it", d, (), Ranks(tuple(speeds), most), RELAY)]

    assert layers((1.0, 1.0)) == [(0, 6), (6, 12)]
    assert layers(TWO) == [(0, 8), (8, 12)]
    assert layers((1.0, 1.0), 2, None) == [(0, 2), (2, 12)]
    assert layers((1.0, 1.0), 0, 40) == [(0, 1), (1, 12)], "one at least"
    assert layers((1.0, 1.0, 1.0), 2, None, 3) == [(0, 2), (2, 9), (9, 12)]


def test_parts_follow_speed_then_memory() -> None:
    assert parts(10, (1.0, 1.0), [None, None]) == [5, 5]
    assert parts(14, (2.0, 1.0), [None, None]) == [9, 5]
    assert parts(76, (5.0, 1.0, 1.0), [None, None, None]) == [53, 12, 11]
    assert parts(10, (1.0, 1.0), [3, None]) == [3, 7]
    assert parts(10, (4.0, 1.0, 1.0), [2, None, 5]) == [2, 4, 4]
    assert parts(10, (1.0, 1.0), [3, 4]) == [5, 5], "nobody has room: it is read from disk"
    assert parts(2, (9.0, 0.1), [None, None]) == [1, 1]
