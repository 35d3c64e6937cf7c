"""The laws of nested experts: all pieces are the base model in their order, bit for bit, held or paged; a
narrow width is the pieces that it has, alone; a row's bits do not depend on the rows beside it, nor on what
is in memory; one call for held pieces is the same as one call for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from outsize.adapt.nested.cut import cut
from outsize.encoding.find import encoding
from outsize.errors import OptionError, UnsupportedError
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.home import home as home_folder
from outsize.kernels.find import native_in
from outsize.kernels.plain import PLAIN
from outsize.model.transformer import Transformer
from outsize.model.width import LayerRouter, Point, Width, chosen, narrowest, parse_width
from outsize.pack import fetch
from outsize.pack.format import Pack
from outsize.progress import silent
from outsize.storage.records import Records
from outsize.weights import load as weights
from outsize.weights.open_pack import LoadPlan
from outsize.weights.residency import Share, all_of
from outsize.weights.spec import ExpertOptions
from tests.golden import tiny
from tests.laws.spans import logits

COUNT = 3
ENCODINGS = ["fp32", "bf16", "int8", "q4_0", "q4_1", "q8_0"]


def packed(folder_of: Callable[[str], Path], family: str, encoding: str) -> Pack:
    return fetch.pack(str(folder_of(family)), encoding=encoding, quiet=True)


def natural(pack: Pack) -> Tensor:
    d = pack.description
    return torch.arange(d.ffn_width).expand(d.num_layers, -1)


def shuffled(pack: Pack) -> Tensor:
    d, generator = pack.description, torch.Generator().manual_seed(0)
    rows = [torch.randperm(d.ffn_width, generator=generator) for _ in range(d.num_layers)]
    return torch.stack(rows)


@contextmanager
def opened(
    pack: Pack,
    slots: int | None = None,
    native: bool = True,
    share: Share | None = None,
    experts: ExpertOptions | None = None,
) -> Iterator[Transformer]:
    """With so many slots for pieces, or this share of them."""
    share = share if slots is None else Share((), slots)
    backend = (native_in(home_folder() / "native") if native else None) or PLAIN
    shares = {t.name: all_of(t) for t in pack.tables}
    if share is not None:
        shares |= {t.name: share for t in pack.tables if t.kind == "experts"}
    loaded = weights.load(pack, backend, LoadPlan(shares, experts=experts or ExpertOptions()))
    try:
        yield Transformer(pack.description, loaded, backend)
    finally:
        loaded.close()


def with_routers(model: Transformer, seed: int = 0) -> None:
    """Routers that differ from token to token."""
    d, generator = model.description, torch.Generator().manual_seed(seed)
    model.nested.routers = [
        LayerRouter(torch.randn(COUNT, d.width, generator=generator), torch.zeros(COUNT), (1, 2, 3))
        for _ in range(d.num_layers)
    ]
    model.nested.points = [Point(0.0, 0.34), Point(1.0, 0.9)]


def run(model: Transformer, tokens: Sequence[int], width: Width | None) -> Tensor:
    """Logits of a prompt, then of three single tokens after it."""
    kv, rows = model.new_kv(), []
    (out,) = full(model, [Span(0, tokens, 1, width=width)], [kv])
    rows.append(out.logits_KV)
    for i in range(3):
        (out,) = full(model, [Span(len(tokens) + i, [i + 5], 1, width=width)], [kv])
        rows.append(out.logits_KV)
    return torch.cat(rows)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", ENCODINGS)
def test_all_pieces_are_the_base_model(
    folder_of: Callable[[str], Path], home: Path, family: str, kind: str
) -> None:
    """In its own order no code changes, and logits differ by the rounding of sums alone; held and through
    few slots, with kernels one by one and at once: the same bits."""
    pack = packed(folder_of, family, kind)
    made = cut(pack, COUNT, natural(pack), silent)
    with opened(pack) as model:
        expected = logits(model)
    with opened(made) as model:
        held = logits(model)
    with opened(made, 2 * COUNT) as model:
        assert torch.equal(logits(model), held)
        assert model.loaded.expert_stats.misses > 0
    limit = 1e-5 if kind == "fp32" else 0.02
    assert float((held - expected).norm()) < limit * float(expected.norm())


@pytest.mark.parametrize("kind", ENCODINGS)
def test_codes_are_kept(folder_of: Callable[[str], Path], home: Path, kind: str) -> None:
    """Whatever the order, put together again pieces are the base's numbers; down's too, where no group of it
    is cut, else within what more bits lose."""
    pack = packed(folder_of, "llama", kind)
    for order in (natural(pack), shuffled(pack)):
        made, cuts = cut(pack, COUNT, order, silent), kind in ("fp32", "bf16", "int8")
        exact = cuts or torch.equal(order, natural(pack))
        for layer in range(tiny.LAYERS):
            gate_up, down = _joined(made, layer)
            with Records(pack) as records:
                rows = records.layer(layer, "gate_up")
                columns = records.layer(layer, "down")
            part = order[layer]
            assert torch.equal(gate_up, rows[torch.cat([part, part + tiny.FFN])])
            error = float((down - columns[:, part]).norm() / columns.norm())
            assert error == 0 if exact else 0 < error < 0.04


def _joined(made: Pack, layer: int) -> tuple[Tensor, Tensor]:
    """A layer's gate and up, and down, out of its pieces."""
    gates, ups, downs = [], [], []
    with Records(made) as records:
        table = next(t for t in made.tables if t.kind == "experts")
        for i in range(COUNT):
            read = records.read(table, layer * COUNT + i)
            numbers = {
                n: w[0].encoding.decode(w[0].fields)[: w[0].num_rows] for n, w in read.items()
            }
            gate, up = numbers["gate_up"].chunk(2)
            gates.append(gate), ups.append(up), downs.append(numbers["down"])
    return torch.cat([*gates, *ups]), torch.cat(downs, dim=1)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "q4_1"])
@pytest.mark.parametrize("native", [True, False])
def test_a_narrow_width_is_its_pieces_alone(
    folder_of: Callable[[str], Path], home: Path, kind: str, native: bool
) -> None:
    """A prefix is a model of its own: one piece, cut out and run as all there is, gives the same bits."""
    pack = packed(folder_of, "llama", kind)
    made = cut(pack, COUNT, natural(pack), silent)
    tokens = [t % tiny.VOCAB for t in tiny.TOKENS]
    with opened(made, native=native) as model:
        for pieces in (1, 2):
            narrow = run(model, tokens, Width(pieces / COUNT, 0.0))
            with opened(made, native=native) as other:
                for layer in other.paged_layers[1::2]:
                    layer.resident._nested = replace(other.nested, count=pieces)  # type: ignore[union-attr]
                assert torch.equal(run(other, tokens, None), narrow)


@pytest.mark.parametrize(
    "kind", ["int8", "q4_1"]
)  # floats' products differ by how many rows there are
@pytest.mark.parametrize("slots", [None, 2 * COUNT])
def test_rows_are_their_own(
    folder_of: Callable[[str], Path], home: Path, kind: str, slots: int | None
) -> None:
    """Each sequence at its own width, alone and in company: the same bits."""
    pack = packed(folder_of, "llama", kind)
    made = cut(pack, COUNT, shuffled(pack), silent)
    shares: list[float | None] = [None, 0.35, 0.6, 0.8, None]
    with opened(made) as model:
        with_routers(model)
        alone = [run(model, [7 * i + 1, 3, 9], _of(model, s)) for i, s in enumerate(shares)]
    with opened(made, slots) as model:
        with_routers(model)
        widths = [_of(model, s) for s in shares]
        kvs = [model.new_kv() for _ in shares]
        spans = [Span(0, [7 * i + 1, 3, 9], 1, width=w) for i, w in enumerate(widths)]
        rows = [[o.logits_KV] for o in full(model, spans, kvs)]
        for at in range(3):
            spans = [Span(3 + at, [at + 5], 1, width=w) for w in widths]
            for row, out in zip(rows, full(model, spans, kvs), strict=True):
                row.append(out.logits_KV)
    for row, expected in zip(rows, alone, strict=True):
        assert torch.equal(torch.cat(row), expected)
    used = {w.used / w.seen for w in widths if w is not None}
    assert all(0 < share < 1 for share in used)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_pieces_that_stay_and_that_pass(
    folder_of: Callable[[str], Path], home: Path, one_by_one: bool
) -> None:
    """The most used in lent scratch, between long spans, the others read ahead, several at once: as if all
    were held; and as if each were computed as it arrives, which who looks on makes them be."""
    pack = packed(folder_of, "llama", "q4_1")
    made = cut(pack, COUNT, shuffled(pack), silent)
    few, many = [7, 3, 9], [t % tiny.VOCAB for t in tiny.TOKENS] * 8
    texts = [few, few, many, few]
    with opened(made) as model:
        with_routers(model)
        expected = [run(model, tokens, model.nested.width(0.6)) for tokens in texts]
    experts = ExpertOptions("static", f"top:{COUNT}", ranked=(3, 0, 6, 4, 1, 7, 5, 2, 8))
    if one_by_one:
        experts = replace(experts, recorder=lambda *_: None)
    share = Share((), 2 * COUNT, lent=2)
    with opened(made, share=share, experts=experts) as model:
        with_routers(model)
        for tokens, due in zip(texts, expected, strict=True):
            assert torch.equal(run(model, tokens, model.nested.width(0.6)), due)
        (cache,) = {bank.cache for bank in model.loaded.banks}
        stats = model.loaded.expert_stats
        assert {3, 0} <= cache.slot_table.slot_of.keys(), "pinned in what is lent"
        assert stats.hits > 0
        assert stats.ready + stats.late > 0
        assert sum(cache.table.bytes_of) == stats.bytes_read
        model.begin(True)
        assert not {8, 9} & cache.slot_table.id_in.keys(), "which goes, before a long span"


def _of(model: Transformer, share: float | None) -> Width | None:
    return None if share is None else model.nested.width(share)


def test_more_is_used_at_higher_thresholds() -> None:
    z_TM = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    before = chosen(z_TM, 0.0)
    assert int(before.max()) == 0
    for threshold in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        now = chosen(z_TM, threshold)
        assert bool((now >= before).all())
        assert bool((now > before).any())
        before = now
    assert int(chosen(z_TM, 2.0).min()) == 3


def test_one_token_is_chosen_as_many_are() -> None:
    z_TM = 3 * torch.randn(2000, 4, generator=torch.Generator().manual_seed(1))
    for threshold in (0.0, 0.2, 0.5, 0.77, 0.99, 1.5):
        expected = chosen(z_TM, threshold).tolist()
        assert [narrowest(z, threshold) for z in z_TM.tolist()] == expected
    assert narrowest([1e4, -1e4, 0.0, -1e5], 0.5) == 0


@pytest.mark.parametrize("given", ["wide", "0", 0, 1.5, "nan", -1, True, None])
def test_widths_that_are_none(given: object) -> None:
    with pytest.raises(OptionError, match="share above 0 and up to 1"):
        parse_width(given)  # type: ignore[arg-type]


def test_what_cannot_be_cut(folder_of: Callable[[str], Path], home: Path) -> None:
    pack = packed(folder_of, "llama", "q4_1")
    with pytest.raises(UnsupportedError, match="with N one of 3"):
        cut(pack, 2, natural(pack), silent)
    mixture = packed(folder_of, "olmoe", "bf16")
    with pytest.raises(UnsupportedError, match="is a mixture of experts"):
        cut(mixture, 2, natural(mixture), silent)
    made = cut(pack, COUNT, natural(pack), silent)
    with pytest.raises(UnsupportedError, match="already"):
        cut(made, COUNT, natural(pack), silent)
    assert encoding("q5_1").name == "q5_1"
