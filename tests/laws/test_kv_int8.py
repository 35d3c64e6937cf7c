"""Keys and values in 8 bits: lossy, and as exact as ever about everything else. An answer does not depend on
company, on where steps begin, on what was kept; C stores what its plain twin stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import outsize
from outsize.engine.model import Model
from outsize.engine.prefixes import Prefixes
from outsize.errors import OptionError
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.kv.int8 import Int8KV, decode, encode
from outsize.kv.kv import KV
from outsize.pack import fetch
from outsize.pack.outline import of_pack
from outsize.plan import place
from tests.golden import tiny
from tests.laws.test_prefixes import CHUNK, answer, keeping, outcome

IDS = [(13 * i + 1) % tiny.VOCAB for i in range(90)]


@contextmanager
def in_8_bits(model: Model) -> Iterator[Model]:
    model.transformer.kv = "int8"
    try:
        yield model
    finally:
        model.transformer.kv = "auto"


def run(model: Model, cuts: list[int], kv: KV) -> torch.Tensor:
    """Logits of the last 20 tokens, in spans that end at `cuts`."""
    rows, at = [], 0
    for end in cuts:
        want = min(end - at, max(0, end - 70))
        (out,) = full(model.transformer, [Span(at, IDS[at:end], want)], [kv])
        rows.append(out.logits_KV)
        at = end
    return torch.cat(rows)[-20:]


@pytest.mark.parametrize(("width", "groups"), [(32, 1), (64, 2), (24, 1), (256, 8)])
def test_entries_are_codes_and_steps(width: int, groups: int) -> None:
    x = torch.randn(4, 9, width).bfloat16()
    x[0, 0], x[1, 1, 0] = 0.0, 1e4
    coded, back = encode(x), torch.empty(4, 9, width, dtype=torch.bfloat16)
    decode(coded, back, 9)
    assert coded.shape == (4, 9, width + 2 * groups)
    assert torch.equal(back[0, 0], x[0, 0])
    steps = x.float().unflatten(-1, (groups, -1)).abs().amax(dim=-1, keepdim=True) / 127
    steps = steps.expand(-1, -1, -1, width // groups).flatten(-2)
    assert ((back.float() - x.float()).abs() <= 0.51 * steps + 0.005 * x.float().abs()).all()
    again = torch.empty_like(back)
    decode(encode(back), again, 9)
    assert (again.float() - back.float()).abs().max() <= steps.max()


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("native", [True, False])
def test_where_steps_begin_changes_nothing(
    family: str, native: bool, open_tiny: Callable[..., Model]
) -> None:
    model = open_tiny(family, "int8", native)
    with in_8_bits(model):
        kvs = [model.transformer.new_kv() for _ in range(3)]
        one = [*range(1, 91)]
        wanted = run(model, one, kvs[0])
        assert torch.equal(run(model, [10, 20, 25, *range(30, 91, 5)], kvs[1]), wanted)
        for layer in range(len(kvs[0].positions)):
            assert torch.equal(kvs[0].entries(layer), kvs[1].entries(layer))
        run(model, one[:60], kvs[2])
        company = [kvs[2], model.transformer.new_kv(), model.transformer.new_kv()]
        spans = [Span(60, IDS[60:76], 16), Span(0, IDS[:9]), Span(0, IDS[5:8])]
        outs = full(model.transformer, spans, company)
        assert torch.equal(outs[0].logits_KV[10:], wanted[:6])


def test_native_stores_what_the_plain_twin_stores(open_tiny: Callable[..., Model]) -> None:
    """From one and the same projections: the first layer's."""
    coded = []
    for native in (True, False):
        with in_8_bits(open_tiny("llama", "int8", native)) as model:
            kv = model.transformer.new_kv()
            run(model, [5, 9, 16], kv)
            coded.append(kv.entries(0).clone())
    codes = [c[..., :32].view(torch.int8).int() for c in coded]
    assert (codes[0] - codes[1]).abs().max() <= 1
    assert (codes[0] != codes[1]).float().mean() < 0.02


def test_it_is_near_to_the_exact_one(open_tiny: Callable[..., Model]) -> None:
    model = open_tiny("llama", "int8")
    exact = run(model, [*range(1, 91)], model.transformer.new_kv())
    with in_8_bits(model):
        lossy = run(model, [*range(1, 91)], model.transformer.new_kv())
    assert not torch.equal(exact, lossy)
    kl = torch.nn.functional.kl_div(
        lossy.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert kl < 5e-3


def test_a_beginning_that_was_there_changes_no_bit(open_tiny: Callable[..., Model]) -> None:
    model = open_tiny("llama", "int8")
    with in_8_bits(model):
        with keeping(model, lambda: None):
            (wanted,) = answer(model, [IDS])
        with keeping(model, lambda: Prefixes(CHUNK)):
            found = [answer(model, [IDS])[0] for _ in range(2)]
        assert [outcome(r) for r in found] == [outcome(wanted)] * 2
        assert found[1].cached == 64


def test_half_the_memory_and_a_longer_context(folder_of: Callable[[str], object]) -> None:
    model = str(folder_of("llama"))
    with outsize.load(model, kv="int8", quiet=True) as m:
        kv, exact = m.new_kv(100), KV(3, (2, 32), torch.bfloat16, 100 + m.drafting.spare)
        assert isinstance(kv, Int8KV)
        assert kv.nbytes / exact.nbytes == 34 / 64
        reply = m.generate("a", raw=True, max_tokens=3)[0]
        assert reply.lossy
        assert reply.options["kv"] == "int8"
        assert any("lossy" in note for note in m.placement.notes)
    outline = of_pack(fetch.pack(model, quiet=True))
    least = [place.least_bytes(o, 0, 0, 512) for o in (outline, replace(outline, kv="int8"))]
    assert least[1] < least[0]


def test_what_it_can_be(folder_of: Callable[[str], object]) -> None:
    with pytest.raises(OptionError, match="kv is 'int4'; known are auto, int8"):
        outsize.load(str(folder_of("llama")), kv="int4", quiet=True)
