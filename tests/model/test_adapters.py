"""LoRA adapters: the merged model's logits, swapped by request, each sequence its own."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import outsize
from outsize.engine.model import Model
from outsize.errors import AdapterError, OptionError
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.kernels import build
from outsize.kernels.find import native_in
from outsize.kernels.plain import PLAIN
from outsize.model.lora import Adapter, widths
from outsize.model_config import Description
from tests.drafts import write_peft
from tests.golden import tiny


def logits(model: Model, adapter: Adapter | None, lengths: tuple[int, ...]) -> torch.Tensor:
    t, at, rows = model.transformer, 0, []
    kv = t.new_kv()
    for size in lengths:
        span = Span(at, tiny.TOKENS[at : at + size], size, adapter=adapter)
        rows.append(full(t, [span], [kv])[0].logits_KV)
        at += size
    return torch.cat(rows)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "llama+biases"])
@pytest.mark.parametrize("lengths", [(30,), (1,) * 6, (18, 3, 1)])
def test_an_adapter_is_the_merged_model(
    family: str, lengths: tuple[int, ...], open_tiny: Callable[..., Model],
    folder_of: Callable[[str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    """Also: PEFT's rows, which rotate in halves, against ours."""
    model = open_tiny(family, "fp32")
    folder = write_peft(model, tmp_path / "lora", 3)
    model.load_adapter("a", folder)
    merged = tmp_path / "merged"
    shutil.copytree(folder_of(family), merged)
    factors = load_file(folder / "adapter_model.safetensors")
    (file,) = merged.glob("*.safetensors")
    weights = load_file(file)
    for name in [n for n in factors if n.endswith("lora_A.weight")]:
        stem = name.removesuffix(".lora_A.weight")
        key = stem.removeprefix("base_model.model.") + ".weight"
        b = factors[f"{stem}.lora_B.weight"].to(torch.bfloat16).float()
        weights[key] = weights[key].float() + 2.0 * b @ factors[name].to(torch.bfloat16).float()
    save_file(weights, file)
    with outsize.load(str(merged), encoding="fp32", quiet=True) as whole:
        theirs = logits(whole, None, lengths)
    ours, plain = logits(model, model.adapters["a"], lengths), logits(model, None, lengths)
    assert (ours - theirs).norm() / theirs.norm() < 5e-3
    assert (ours - plain).norm() / plain.norm() > 0.05


def test_a_b_a_gives_the_same_bits(open_tiny: Callable[..., Model], tmp_path: Path) -> None:
    model = open_tiny("llama", "int4")
    before = logits(model, None, (18, 1, 1, 4))
    for i, name in enumerate("ab"):
        started = time.process_time()
        model.load_adapter(name, write_peft(model, tmp_path / name, i))
        assert time.process_time() - started < 1
    found = [logits(model, model.adapters[n], (18, 1, 1, 4)) for n in "aba"]
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert torch.equal(before, logits(model, None, (18, 1, 1, 4)))


@pytest.mark.parametrize("encoding", ["int4", "int8"])
def test_each_sequence_of_a_batch_has_its_own(
    encoding: str, open_tiny: Callable[..., Model], tmp_path: Path
) -> None:
    model, names = open_tiny("llama", encoding), ["a", "b", "c", None]
    for i, name in enumerate("abc"):
        model.load_adapter(name, write_peft(model, tmp_path / name, i, rank=3 + i))
    prompts = ["hello there", "hello there", "other words, and more of them", "hello there"]
    together = model.generate(prompts, raw=True, max_tokens=25, adapter=names)
    for prompt, name, reply in zip(prompts, names, together, strict=True):
        (alone,) = model.generate(prompt, raw=True, max_tokens=25, adapter=name)
        assert (reply.text, reply.new_tokens) == (alone.text, alone.new_tokens)
    assert len({r.text for r in together}) == 4
    with pytest.raises(OptionError, match="4 adapters for more prompts"):
        model.generate([*prompts, "x"], raw=True, max_tokens=2, adapter=names)
    with pytest.raises(OptionError, match="'nobody' is not known: a, b, c"):
        model.generate("x", raw=True, max_tokens=2, adapter="nobody")


def test_drafts_with_an_adapter_change_nothing(
    open_tiny: Callable[..., Model], tmp_path: Path
) -> None:
    plain = open_tiny("llama", "int4")
    folder = write_peft(plain, tmp_path / "a", 5)
    texts = []
    for draft in ("none", "ngram:k=5", "auto"):
        path = str(plain.pack.path)
        with outsize.load(path, draft=draft, adapters={"a": str(folder)}, quiet=True) as model:
            texts.append(model.generate("abab" * 4, raw=True, max_tokens=40, adapter="a")[0].text)
    assert len(set(texts)) == 1


@pytest.mark.skipif(build.compiler() is None, reason="no C compiler on this machine")
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("rank", [5, 6])
def test_the_kernel_is_its_plain_twin_and_rows_are_alone(
    coarse: bool, rank: int, open_tiny: Callable[..., Model], home: Path
) -> None:
    d = open_tiny("llama", "int4").pack.description
    adapter = Adapter("k", d, random_factors(d, rank), 0.5, coarse)
    found = native_in(home / "native")
    assert found is not None
    x = torch.randn(7, d.width).bfloat16()
    for name, width in (("qkv", d.qkv_rows), ("gate_up", 2 * d.ffn_width)):
        y = torch.randn(7, width).bfloat16()
        plain, native = y.clone(), y.clone()
        factors = adapter.factors(1, name)
        assert factors is not None
        PLAIN.lowrank(factors, x, plain, slice(2, 6), False)
        found.lowrank(factors, x, native, slice(2, 6), False)
        assert (plain.float() - native.float()).norm() / plain.float().norm() < 0.01
        assert torch.equal(native[:2], y[:2])
        for row in range(2, 6):
            one = y.clone()
            found.lowrank(factors, x, one, slice(row, row + 1), False)
            assert torch.equal(one[row], native[row])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_codes_of_eight_bits_are_near_the_factors(
    family: str, open_tiny: Callable[..., Model]
) -> None:
    d = open_tiny(family, "int4").pack.description
    factors, x = random_factors(d, 8), torch.randn(3, d.width).bfloat16()
    made = []
    for coarse in (False, True):
        y = torch.zeros(3, d.qkv_rows, dtype=torch.bfloat16)
        stack = Adapter("k", d, factors, 0.5, coarse).factors(0, "qkv")
        assert stack is not None
        PLAIN.lowrank(stack, x, y, slice(0, 3), False)
        made.append(y.float())
    assert 0 < (made[0] - made[1]).norm() / made[0].norm() < 0.02


def random_factors(d: Description, rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {
        f"{layer}.{part}": (torch.randn(rank, inputs), torch.randn(outputs, rank))
        for layer in range(d.num_layers)
        for part, (outputs, inputs) in widths(d).items()
    }


def test_adapters_that_do_not_fit(open_tiny: Callable[..., Model], tmp_path: Path) -> None:
    model = open_tiny("llama", "int8")
    good = write_peft(model, tmp_path / "good", 1)

    def broken(name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        folder = tmp_path / name
        shutil.copytree(good, folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    cases = {
        "wide": (lambda t: t.update({first: torch.zeros(4, 999)}), "belongs to another model"),
        "half": (lambda t: t.pop(first), "one factor of two"),
        "nan": (lambda t: t.update({first: torch.full((4, 64), torch.nan)}), "no finite numbers"),
        "head": (lambda t: t.update({"lm_head.lora_A.weight": torch.zeros(1)}), "not a low-rank factor"),
        "deep": (
            lambda t: t.update({
                first.replace("layers.0", "layers.9").replace("_A", f"_{x}"): torch.zeros(size)
                for x, size in (("A", (4, 64)), ("B", (128, 4)))
            }),
            "does not have",
        ),
    }  # fmt: skip
    for name, (change, words) in cases.items():
        with pytest.raises(AdapterError, match=words):
            model.load_adapter(name, broken(name, change))  # type: ignore[arg-type]
    dora = tmp_path / "dora"
    shutil.copytree(good, dora)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": True}
    (dora / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="use_dora is not known"):
        model.load_adapter("dora", dora)
    (dora / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match="PEFT's adapters have one"):
        model.load_adapter("dora", dora)
