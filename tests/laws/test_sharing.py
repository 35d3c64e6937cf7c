"""Layers that share keys and values store none; a prompt's other tokens stop before them; and every way of
running them agrees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import outsize
from outsize.adapt import rewrite
from outsize.adapt.share_keys import queries
from outsize.engine.model import Model
from outsize.errors import OptionError, UnsupportedError
from outsize.family import bounds
from outsize.family.sharing import share_keys
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.kv.kv import KV
from outsize.model_config import Description
from outsize.pack import fetch
from outsize.pack.format import Pack
from outsize.pack.outline import of_pack
from outsize.pack.source import derived
from outsize.parallel.split import Way, check
from outsize.plan.fixed import stored_bytes
from outsize.progress import silent
from outsize.storage.records import Records

TOKENS = [(7 * i * i + 3 * i) % 280 for i in range(40)]
NEXT = [(31 * i + 5) % 280 for i in range(6)]


@pytest.fixture(scope="module")
def pack_of(folder_of: Callable[[str], Path], home: Path) -> Callable[..., Pack]:
    """A family's tiny model whose last layer shares keys and values."""

    def make(family: str, encoding: str) -> Pack:
        base = fetch.pack(str(folder_of(family)), encoding=encoding, quiet=True)
        d = share_keys(base.description, 1)
        source = derived(base.source, "shared", {"made": "shared"})
        with Records(base) as records:
            new = queries(records, d)
            return rewrite.write(base, records, new, d, rewrite.Identity(source), silent)

    return make


@pytest.fixture(scope="module")
def open_shared(pack_of: Callable[..., Pack]) -> Iterator[Callable[..., Model]]:
    opened: list[Model] = []

    def make(family: str, encoding: str, native: bool = True, kv: str = "auto") -> Model:
        path = str(pack_of(family, encoding).path)
        opened.append(outsize.load(path, native=native, kv=kv, quiet=True))
        return opened[-1]

    yield make
    for model in opened:
        model.close()


def step(model: Model, kv: KV, start: int, tokens: list[int]) -> torch.Tensor:
    """(T, V) of some tokens, whose logits are all wanted."""
    return full(model.transformer, [Span(start, tokens, len(tokens))], [kv])[0].logits_KV


WAYS = [("llama", "q8_0"), ("qwen2", "q8_0"), ("qwen3", "int8"), ("gemma3", "q4_0")]


@pytest.mark.parametrize(("family", "encoding"), WAYS)
@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_rows_and_backends_agree(
    family: str, encoding: str, kv: str, open_shared: Callable[..., Model]
) -> None:
    """Alone, five at once and beside others a row has the same bits; the backends agree; and no entry is
    stored for a layer that shares."""
    rows: dict[bool, torch.Tensor] = {}
    for native in (True, False):
        model = open_shared(family, encoding, native, kv)
        one, many, other = (model.transformer.new_kv() for _ in range(3))
        for cache in (one, many, other):
            step(model, cache, 0, TOKENS)
        alone = torch.cat([step(model, one, 40 + i, [t]) for i, t in enumerate(NEXT)])
        spans = [Span(40, NEXT, 6), Span(40, NEXT[:3], 3)]
        together = full(model.transformer, spans, [many, other])
        assert torch.equal(together[0].logits_KV, alone)
        assert torch.equal(together[1].logits_KV, alone[:3])
        layers = model.pack.description.num_layers
        assert len(one.positions) == layers - 1
        assert all(len(kept) == 46 for kept in one.positions)
        rows[native] = alone
    torch.testing.assert_close(rows[True], rows[False], rtol=0.05, atol=0.25)


@pytest.mark.parametrize(("family", "encoding"), WAYS)
def test_a_prompt_stops_before_layers_that_share(
    family: str, encoding: str, open_shared: Callable[..., Model]
) -> None:
    """Only the tokens whose logits are wanted go through them, with the same answer as when all do; and a
    prompt in two parts, the first without logits, as one whose parts all want some."""
    model = open_shared(family, encoding, False)
    whole, last = model.transformer.new_kv(), model.transformer.new_kv()
    seen: list[int] = []
    layer = model.transformer.paged_layers[-1]
    run = layer.resident
    assert run is not None

    class Counting:
        def run(self, chunks: list[tuple[torch.Tensor, object]]) -> None:
            seen.extend(len(h) for h, _ in chunks)
            run.run(chunks)  # type: ignore[arg-type]

    every = step(model, whole, 0, TOKENS)
    layer._resident = Counting()  # type: ignore[assignment]
    (out,) = full(model.transformer, [Span(0, TOKENS)], [last])
    torch.testing.assert_close(out.logits_KV[0], every[-1], rtol=0.02, atol=0.1)
    assert seen == [1]
    seen.clear()
    parts = model.transformer.new_kv()
    full(model.transformer, [Span(0, TOKENS[:30], 0)], [parts])
    assert seen == []
    (out,) = full(model.transformer, [Span(30, TOKENS[30:])], [parts])
    torch.testing.assert_close(out.logits_KV[0], every[-1], rtol=0.02, atol=0.1)
    layer._resident = run


def test_the_plan_counts_no_keys_of_layers_that_share(pack_of: Callable[..., Pack]) -> None:
    pack = pack_of("llama", "q8_0")
    d, outline = pack.description, of_pack(pack)
    assert d.num_kv_layers == d.num_layers - 1
    assert stored_bytes(outline) == 2 * 2 * d.num_kv_layers * d.num_kv_heads * d.head_dim
    assert [t.keys for t in pack.tables if t.name.startswith("sharing")] == [(2,)]
    assert pack.table_of("sharing-0").tensors["qkv"][0].num_rows == d.num_heads * d.head_dim


def test_answers_from_a_shared_pack(pack_of: Callable[..., Pack]) -> None:
    """The same with a prefix that was computed before, and without one; lazy prefill is refused."""
    path, texts = str(pack_of("llama", "q8_0").path), set[str]()
    for options in ({}, {"prefix_cache": "off"}, {"streams": 2}):
        with outsize.load(path, quiet=True, **options) as model:  # type: ignore[arg-type]
            for _ in range(2):
                answer = model.generate("some words " * 20, raw=True, max_tokens=6, temperature=0)
                texts.add(answer[0].text)
            with pytest.raises(OptionError, match="share keys and values"):
                model.generate("words", raw=True, max_tokens=1, prefill="lazy")
            assert model.score("some words and more of them").logprobs
    assert len(texts) == 1


def test_what_cannot_share(open_tiny: Callable[..., Model]) -> None:
    d = open_tiny("llama", "q8_0").pack.description
    with pytest.raises(OptionError, match="from 1 to 2 can"):
        share_keys(d, 3)
    with pytest.raises(OptionError, match="where none does yet"):
        share_keys(share_keys(d, 1), 1)
    with pytest.raises(UnsupportedError, match="leave --ranks out"):
        check("shared", share_keys(d, 1), 2, Way())
    windows = open_tiny("gemma3", "q4_0").pack.description
    with pytest.raises(OptionError, match="as none of the first 1 layers does"):
        share_keys(windows, 2)


def wrong(d: Description, *shares: int | None) -> str:
    layers = [replace(layer, shares=s) for layer, s in zip(d.layers, shares, strict=True)]
    return bounds.fault(replace(d, layers=tuple(layers)))


def test_a_description_that_lies_is_refused(
    open_tiny: Callable[..., Model],
) -> None:
    d = open_tiny("llama", "q8_0").pack.description
    assert "behind one that shares" in wrong(d, None, 0, None)
    assert "which makes none" in wrong(d, None, None, 2)
    assert "which makes none" in wrong(d, None, None, -1)
    assert not wrong(d, None, 0, 0)
    windows = open_tiny("gemma3", "q4_0").pack.description
    assert "turns or sees otherwise" in wrong(windows, None, None, 1)
