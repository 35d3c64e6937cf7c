"""What Gemma 4 has that no other family has: layers of two sizes, rows by token in every layer, values of
keys' map. Laws that all families share take it from their lists."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import outsize
from outsize.engine import load as loading
from outsize.engine.model import Model
from outsize.errors import OptionError, OutsizeError, UnsupportedError
from outsize.family.bounds import fault
from outsize.kernels.backend import AttentionSpec
from outsize.kernels.find import native_in
from outsize.kernels.plain import PLAIN
from outsize.kernels.rows import Rows, Segment
from outsize.model.layers import cos_sin
from outsize.model.transformer import new_kv
from outsize.model_config import Description, Layer, Rope
from outsize.pack import fetch
from outsize.pack.kinds import tokens
from outsize.pack.outline import of_pack
from outsize.parallel.split import Way, check
from outsize.plan import place
from outsize.plan.cost import MISS_S, predict
from outsize.plan.machine import Compute, Machine
from outsize.plan.placement import BY_TOKEN, DISK
from outsize.system import memory as budget
from tests.golden import converted, tiny
from tests.golden.test_golden import TOLERANCE, logits

LENGTHS = [25, 1, 1, 13]
ROWS = "model.embed_tokens_per_layer.weight"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is held that can be streamed, and as few rows as a step can do with."""
    monkeypatch.setattr(loading, "runtime_bytes", lambda *_: 0)
    monkeypatch.setattr(budget, "resident", lambda *_: 0)
    monkeypatch.setattr(place, "TOKENIZER_PEAK", 0)
    monkeypatch.setattr(place, "TOKENIZER_FACTOR", 0)
    monkeypatch.setattr(tokens, "LEAST", 2)


@pytest.mark.usefixtures("few")
def test_rows_from_disk_are_those_in_memory(
    folder_of: Callable[[str], Path], open_tiny: Callable[..., Model]
) -> None:
    """Bit for bit, with two slots for the rows of 288 tokens and every layer read at each pass."""
    want = logits(open_tiny("gemma4", "q8_0"), LENGTHS)
    pack = fetch.pack(str(folder_of("gemma4")), encoding="q8_0", quiet=True)
    least = place.least_bytes(of_pack(pack), 0, 0, 256)
    with outsize.load(str(pack.path), memory=least, context=256, quiet=True, draft="none") as model:
        table = model.transformer.loaded.tokens
        assert table is not None
        assert table.cache.slots == 2 < len(table.cache.table)
        assert any(tier == BY_TOKEN for _, tier, _ in model.placement.groups)
        np.testing.assert_array_equal(logits(model, LENGTHS), want)
        assert model.counts().experts.misses > 0


def test_rows_beyond_what_texts_use_stay_on_disk(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much memory there is."""
    monkeypatch.setattr(tokens, "MOST", 5)
    with outsize.load(str(folder_of("gemma4")), encoding="q8_0", quiet=True) as model:
        table = model.transformer.loaded.tokens
        assert table is not None
        assert table.cache.slots == 5 < len(table.cache.table)


def test_drafts_are_exact(folder_of: Callable[[str], Path]) -> None:
    texts = []
    for draft in ("none", "ngram"):
        how: dict[str, Any] = {"encoding": "q8_0", "quiet": True, "draft": draft}
        with outsize.load(str(folder_of("gemma4")), **how) as model:
            (reply,) = model.generate(
                "the cat sat on the mat; " * 6, max_tokens=24, ignore_eos=True
            )
            texts.append(reply.text)
    assert texts[0] == texts[1]


def test_keys_and_values_in_8_bits(open_tiny: Callable[..., Model], folder_of: Any) -> None:
    """Of heads of 32 and of 48 numbers."""
    want = logits(open_tiny("gemma4", "q8_0"), LENGTHS)
    with outsize.load(str(folder_of("gemma4")), encoding="q8_0", kv="int8", quiet=True) as model:
        got = logits(model, LENGTHS)
    assert 0 < np.linalg.norm(got - want) < 0.1 * np.linalg.norm(want)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"prefix_cache": "memory"}, "several sizes"),
        ({"prefill": "lazy"}, "read their tokens"),
        ({"layers_off": "1"}, "layers_off"),
        ({"draft": "native"}, "draft=native"),
    ],
)
def test_what_it_cannot_have_is_refused(
    options: dict[str, Any], word: str, folder_of: Callable[[str], Path]
) -> None:
    with pytest.raises((OptionError, UnsupportedError), match=word):
        outsize.load(str(folder_of("gemma4")), quiet=True, **options).close()


@pytest.mark.parametrize(
    ("kind", "encoding"), [("Q8_0", "group8"), ("Q4_0", "group4"), ("Q5_1", "group8")]
)
def test_quantized_rows(kind: str, encoding: str, tmp_path: Path) -> None:
    """Codes of 8 and 4 bits are kept; others are rounded to 8."""
    found = converted.tensors("gemma4")
    name = "per_layer_token_embd.weight"
    exact = gguf.quants.quantize(found[name], gguf.GGMLQuantizationType[kind])
    numbers = gguf.quants.dequantize(exact, gguf.GGMLQuantizationType[kind])
    found[name] = numbers.astype(np.float32)
    plain = converted.write(tmp_path / "plain.gguf", "gemma4", weights=found)
    with outsize.load(str(plain), encoding="fp32", quiet=True) as model:
        want = logits(model, [40])
    file = converted.write(
        tmp_path / "coded.gguf", "gemma4", weights=found, coded={name: (exact, kind)}
    )
    pack = fetch.pack(str(file), encoding="auto", quiet=True)
    (matrix,) = pack.table_of("perlayer-0").tensors["rows"]
    assert matrix.encoding == encoding
    with outsize.load(str(pack.path), quiet=True) as model:
        table = model.transformer.loaded.tokens
        assert table is not None
        recalled = table.ask(tiny.TOKENS).part(slice(0, 40))
        got = torch.stack([recalled.numbers(i) for i in range(3)], 1).flatten(1).numpy()
    near = 0 if kind != "Q5_1" else 0.01
    assert np.linalg.norm(got - numbers[tiny.TOKENS]) <= near * np.linalg.norm(numbers) + 1e-6
    assert np.isfinite(want).all()


def test_big_heads_in_compiled_code(home: Path) -> None:
    """Of 512 numbers, as the published models have: few rows and a span equal torch's."""
    native = native_in(home / "native")
    if native is None:
        pytest.skip("no C compiler on this machine")
    torch.manual_seed(0)
    heads, keys, size, count = 8, 2, 512, 30
    spec = AttentionSpec(0, heads, keys, size, 1.0)
    d = replace(wide(), num_heads=heads, num_kv_heads=keys, head_dim=size)
    qkv = (torch.randn(count, (heads + 2 * keys) * size) / 12).bfloat16()
    turned = cos_sin(Rope(1e4, (1.0,) * 64 + (1e30,) * 192), size, torch.arange(count))
    for wide_step in (False, True):
        out = []
        for backend in (PLAIN, native.wide if wide_step else native):
            kv = new_kv(d, torch.bfloat16)
            rows = Rows([Segment(kv, range(count))], wide_step)
            out.append(backend.attend(spec, qkv.clone(), turned.clone(), rows).float())
        assert torch.linalg.norm(out[1] - out[0]) <= 0.01 * torch.linalg.norm(out[0])


def wide() -> Description:
    return Description("x", 64, 8, 2, 512, 96, 288, 512, 1e-5, 1.0, (Layer(Rope(1e4)),))


def test_pairs_that_do_not_rotate_stay_as_they_are() -> None:
    turned = cos_sin(Rope(1e6, (1.0,) * 2 + (1e30,) * 6), 16, torch.tensor([0, 1, 131_071]))
    assert torch.equal(turned[:, 0, 2:].real, torch.ones(3, 6))
    x = torch.randn(3, 6, dtype=torch.complex64)
    assert torch.equal(torch.view_as_real(x * turned[:, 0, 2:]), torch.view_as_real(x))


BROKEN: list[tuple[str, Callable[[Description], Description], str]] = [
    ("even heads", lambda d: with_layer(with_layer(d, head_dim=47), 2, head_dim=47), "47 numbers"),
    ("key heads divide", lambda d: with_layer(d, num_kv_heads=3), "3 key heads"),
    ("two sizes at most", lambda d: with_layer(d, 2, head_dim=64), "more sizes"),
    ("rows", lambda d: replace(d, token_width=-1), "numbers of a token"),
    ("one rope, one size", lambda d: with_layer(d, rope=d.layers[0].rope), "two sizes"),
    ("norms of values", lambda d: replace(d, qkv_bias=True), "values are normed"),
    ("sharing", lambda d: with_layer(d, 2, shares=0), "turns or sees otherwise"),
    ("another kind", lambda d: replace(d, sinks=True), "such attention|another kind"),
]


def with_layer(d: Description, index: int = 1, **changes: Any) -> Description:
    layers = [*d.layers]
    layers[index] = replace(layers[index], **changes)
    return replace(d, layers=tuple(layers))


@pytest.mark.parametrize(("what", "change", "word"), BROKEN, ids=[b[0] for b in BROKEN])
def test_bounds(
    what: str,
    change: Callable[[Description], Description],
    word: str,
    folder_of: Callable[[str], Path],
) -> None:
    whole = fetch.outline(str(folder_of("gemma4")), "bf16", True).description
    d = with_layer(whole, 2, shares=None)
    assert fault(whole) == fault(d) == ""
    assert re.search(word, fault(change(d))), fault(change(d))


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"vocab_size_per_layer_input": 300}, "vocab_size_per_layer_input is 300"),
    ({"layer_types": ["full_attention"] * 3}, "one kind"),
    ({"num_kv_shared_layers": 2}, "share keys and values"),
    ({"per_layer_config": {"0": {"head_dim": 48}}}, "per_layer_config names others"),
    ({"per_layer_config": {"1": {"strange": 1}, "2": {"strange": 1}}}, "'strange'"),
    ({"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64,
      "num_kv_shared_layers": 0}, "beside experts"),
    ({"enable_moe_block": "false"}, "enable_moe_block is 'false', true or false"),
    ({"per_layer_config": {}}, r"has shape \(192, 64\), not \(128"),  # all alike, which these are not
    ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
    ({"rope_parameters": {"full_attention": {"rope_type": "proportional", "strange": 1}}}, "'strange'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "word"), CONFIGS)
def test_configs_that_are_not_known(change: dict[str, Any], word: str, tmp_path: Path) -> None:
    folder = tiny.write_folder(tmp_path / "m", "gemma4")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(OutsizeError, match=word):
        fetch.outline(str(folder), "bf16", True)


def test_images_and_unused_keys_are_left_out(
    tmp_path: Path, open_tiny: Callable[..., Model]
) -> None:
    """A folder as it is published: the text model inside, keys and values of layers that share others'."""
    folder = tiny.write_folder(tmp_path / "m", "gemma4")
    text = json.loads((folder / "config.json").read_text()) | {"model_type": "gemma4_text"}
    outer = {"model_type": "gemma4", "text_config": text, "vision_config": {"hidden_size": 768}}
    (folder / "config.json").write_text(json.dumps(outer))
    named = {
        n.replace("model.", "model.language_model.", 1): w
        for n, w in tiny.weights("gemma4").items()
    }
    zeros = np.zeros((96, 64), np.float32)
    named["model.language_model.layers.2.self_attn.k_proj.weight"] = zeros
    named["model.language_model.layers.2.self_attn.v_proj.weight"] = zeros
    named["model.vision_tower.patch.weight"] = zeros
    save_file(named, folder / "model.safetensors")
    with outsize.load(str(folder), encoding="fp32", quiet=True) as model:
        got = logits(model, [40])
    np.testing.assert_allclose(
        got, logits(open_tiny("gemma4", "fp32"), [40]), atol=TOLERANCE, rtol=0
    )


def test_a_plan_of_paged_layers_waits_for_them_alone(folder_of: Callable[[str], Path]) -> None:
    """Not for rows of tokens that nobody asks for; and says nothing of a loss."""
    o = of_pack(fetch.pack(str(folder_of("gemma4")), encoding="q8_0", quiet=True))
    made = place.place(o, place.least_bytes(o, 0, 0, 256), 0, 0, 256)
    made = replace(made, groups=(*made.groups, ("ffn-0", DISK, 4096)))  # as if it were read
    names = [t.name for t in o.tables if t.kind != "tokens"]
    machine = Machine("x", (), {}, rate_now=1e9)
    compute = Compute(dict.fromkeys(names, 0.0), {}, 64)
    assert made.streamed > 0
    assert predict(o, machine, made, compute, 64).compute_s < 20 * MISS_S
    assert place.table_note(o) == ""


def test_ranks_are_refused(folder_of: Callable[[str], Path]) -> None:
    d = fetch.outline(str(folder_of("gemma4")), "bf16", True).description
    for made in (replace(d, layers=d.layers[:2]), replace(d, layers=d.layers[:1], token_width=0)):
        with pytest.raises(
            UnsupportedError, match="reads its tokens in every layer, or has layers"
        ):
            check("m", made, 2, Way("sum"))
