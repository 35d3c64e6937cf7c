"""Every family equals transformers' fp32 logits: in one span, token by token, and from a GGUF."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import outsize
from outsize.engine.model import Model
from outsize.family import llama4, smollm3
from outsize.family.find import families
from outsize.forward.full import full
from outsize.forward.span import Span
from tests.golden import converted, memory_reference, tiny

# fp32 throughout; sums are in another order than eager transformers'. Logits reach about 20.
TOLERANCE = 5e-4
# In 8 bits: LongRoPE's scale makes scores 2.25 times as sharp; layers without positions have flat ones.
ROUGH = {"phi3": 0.1, "smollm3": 0.07, "gemma4": 0.3}  # gemma4: scores are not scaled


def reference(family: str) -> np.ndarray:
    with np.load(Path(__file__).with_name(f"{family}.npz")) as data:
        return np.asarray(data["logits"])


def logits(model: Model, lengths: list[int]) -> np.ndarray:
    """All logits of tiny.TOKENS, fed in spans of these lengths."""
    kv, at, rows = model.transformer.new_kv(), 0, []
    for length in lengths:
        span = Span(at, tiny.TOKENS[at : at + length], length)
        rows.append(full(model.transformer, [span], [kv])[0].logits_KV)
        at += length
    return torch.cat(rows).numpy()


def test_every_family_has_a_golden() -> None:
    assert set(tiny.CONFIGS) == set(families())


@pytest.mark.parametrize("family", tiny.CONFIGS)
@pytest.mark.parametrize(
    "lengths", [[40], [1] * 40, [20, 5, 1, 14]], ids=["span", "steps", "mixed"]
)
def test_golden(family: str, lengths: list[int], open_tiny: Callable[..., Model]) -> None:
    ours = logits(open_tiny(family, "fp32"), lengths)
    np.testing.assert_allclose(ours, reference(family), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("lengths", [[40], [1] * 40, [20, 5, 1, 14]])
def test_flex_memory(
    lengths: list[int], open_tiny: Callable[..., Model], folder_of: Callable[[str], Path]
) -> None:
    """A dense feed-forward beside that of the embedding."""
    want = memory_reference.logits(folder_of("memoryllm+dense"), tiny.TOKENS).numpy()
    ours = logits(open_tiny("memoryllm+dense", "fp32"), lengths)
    np.testing.assert_allclose(ours, want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("family", "native"),
    [
        pytest.param(f, n, marks=pytest.mark.slow if f in tiny.STORED and not n else ())
        for f in tiny.CONFIGS
        for n in (True, False)
    ],
)
def test_golden_in_tiles(family: str, native: bool, open_tiny: Callable[..., Model]) -> None:
    """All matrices in the tiled layout: in 8 bits, and activations in bf16, logits stay near, but where a
    near tie sends a token to another expert."""
    model, want = open_tiny(family, "q8_0", native), reference(family)
    limit = 0.4 if family in tiny.MIXTURES else ROUGH.get(family, 0.06)
    for lengths in ([40], [20, 5, 1, 14]):
        assert np.linalg.norm(logits(model, lengths) - want) <= limit * np.linalg.norm(want)


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """Halves -> adjacent pairs: how a llama GGUF stores query and key rows, and their biases."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)


GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "model.layers.": "blk.",
}


def write_gguf(
    path: Path,
    family: str,
    quantized: str = "",
    weights: dict[str, np.ndarray] | None = None,
    **split: int,
) -> Path:
    """`weights`: other ones than the tiny model's, under names of either kind."""
    settings = tiny.config(family)
    architecture = {"mixtral": "llama"}.get(family, settings["model_type"])
    writer = gguf.GGUFWriter(path, architecture, **split)
    writer.add_block_count(tiny.LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(tiny.WIDTH)
    writer.add_feed_forward_length(tiny.FFN)
    writer.add_head_count(tiny.HEADS)
    writer.add_head_count_kv(tiny.KV_HEADS)
    writer.add_key_length(tiny.HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(settings["rope_theta"])
    if family == "mixtral":
        writer.add_expert_count(tiny.EXPERTS)
        writer.add_expert_used_count(settings["num_experts_per_tok"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    vocab = sorted(tiny.tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_token_list([name for name, _ in vocab[:-1]] + ["Ġa"])
    writer.add_token_types([1] * 256 + [3] * (tiny.VOCAB - 257) + [1])
    writer.add_token_merges(["Ġ a"])
    for name, w in (tiny.weights(family) if weights is None else weights).items():
        for foreign, theirs in GGUF_NAMES.items():
            name = name.replace(foreign, theirs)
        if architecture == "llama" and ("attn_q" in name or "attn_k" in name):
            w = permuted(w, tiny.HEADS if "attn_q" in name else tiny.KV_HEADS)
        if quantized and w.ndim == 2:
            kind = gguf.GGMLQuantizationType[quantized]
            writer.add_tensor(name, gguf.quants.quantize(w, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, w)
    if "rope_scaling" in settings:
        from outsize.family.rope import rope_divisors

        divisors = rope_divisors(tiny.LLAMA3, 10000.0, tiny.HEAD_DIM)
        writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gguf_equals_golden(family: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", family)
    with outsize.load(str(path), encoding="fp32", quiet=True) as model:
        ours = logits(model, [40])
    np.testing.assert_allclose(ours, reference(family), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", converted.ARCHITECTURES)
def test_converted_equals_golden(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        smollm3, "PERIOD", 2
    )  # files do not say; of three layers, the fourth is none
    own = {k: v for k, v in tiny.config("llama4").items() if k in llama4.GGUF}
    monkeypatch.setattr(llama4, "GGUF", {**llama4.GGUF, **own, "no_rope_layer_interval": 2})
    path = converted.write(tmp_path / "tiny.gguf", family)
    with outsize.load(str(path), encoding="fp32", quiet=True) as model:
        ours = logits(model, [30, *[1] * 10])
    np.testing.assert_allclose(ours, reference(family), atol=TOLERANCE, rtol=0)


def test_experts_beside_a_dense_feed_forward_in_both_formats(
    tmp_path: Path, open_tiny: Callable[..., Model]
) -> None:
    """Gemma 4 26B's kind: values by keys' map, routers with scales; transformers' logits are compared in
    test_transformers.py."""
    path = converted.write(tmp_path / "tiny.gguf", "gemma4+experts")
    theirs = logits(open_tiny("gemma4+experts", "fp32"), [40])
    with outsize.load(str(path), encoding="fp32", quiet=True) as model:
        ours = logits(model, [30, *[1] * 10])
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


def test_a_gguf_of_2025_with_inputs_as_one_matrix(tmp_path: Path) -> None:
    """The first files of Qwen3-Next have them by key head, as the checkpoint does."""
    found = converted.tensors("qwen3_next")
    for i in (0, 2):
        del found[f"blk.{i}.attn_gate.weight"], found[f"blk.{i}.attn_qkv.weight"]
        whole = tiny.weights("qwen3_next")[f"model.layers.{i}.linear_attn.in_proj_qkvz.weight"]
        found[f"blk.{i}.ssm_in.weight"] = whole
    path = converted.write(tmp_path / "tiny.gguf", "qwen3_next", weights=found)
    with outsize.load(str(path), encoding="fp32", quiet=True) as model:
        ours = logits(model, [30, *[1] * 10])
    np.testing.assert_allclose(ours, reference("qwen3_next"), atol=TOLERANCE, rtol=0)


def test_a_gguf_with_biases(tmp_path: Path, open_tiny: Callable[..., Model]) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", "llama+biases")
    with outsize.load(str(path), encoding="fp32", quiet=True) as model:
        assert model.pack.description.mlp_bias
        ours = logits(model, [40])
    theirs = logits(open_tiny("llama+biases", "fp32"), [40])
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


def experts_as(layout: str) -> dict[str, np.ndarray]:
    """The tiny Mixtral's weights with experts as GGUF files have them now, had them in 2023, and have
    them since 2026."""
    out, each = {}, {"gate": "w1", "up": "w3", "down": "w2"}
    whole = tiny.weights("mixtral")
    for i in range(tiny.LAYERS):
        block, prefix = f"blk.{i}.ffn_", f"model.layers.{i}.block_sparse_moe.experts."
        found = {
            k: [whole.pop(f"{prefix}{e}.{w}.weight") for e in range(tiny.EXPERTS)]
            for k, w in each.items()
        }
        stacked = {k: np.stack(v) for k, v in found.items()}
        if layout == "single":
            out |= {
                f"{block}{k}.{e}.weight": w for k, ws in found.items() for e, w in enumerate(ws)
            }
            continue
        if layout == "fused":
            both = np.concatenate([stacked.pop("gate"), stacked.pop("up")], axis=1)
            out[f"{block}gate_up_exps.weight"] = both
        out |= {f"{block}{k}_exps.weight": w for k, w in stacked.items()}
    return whole | out


@pytest.mark.parametrize("layout", ["stacked", "single", "fused"])
def test_layouts_of_experts(layout: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", "mixtral", weights=experts_as(layout))
    with outsize.load(str(path), encoding="fp32", quiet=True) as model:
        ours = logits(model, [40])
    np.testing.assert_allclose(ours, reference("mixtral"), atol=TOLERANCE, rtol=0)


def test_experts_as_transformers_5_holds_them(tmp_path: Path) -> None:
    """`save_pretrained(save_original_format=False)` writes gate and up of all experts as one tensor."""
    folder, whole = tiny.write_folder(tmp_path / "m", "qwen3_moe"), tiny.weights("qwen3_moe")
    for i in range(tiny.LAYERS):
        prefix = f"model.layers.{i}.mlp.experts."
        gate, up, down = (
            np.stack([whole.pop(f"{prefix}{e}.{k}_proj.weight") for e in range(tiny.EXPERTS)])
            for k in ("gate", "up", "down")
        )
        whole[f"{prefix}gate_up_proj"] = np.concatenate([gate, up], axis=1)
        whole[f"{prefix}down_proj"] = down
    save_file(whole, folder / "model.safetensors")
    with outsize.load(str(folder), encoding="fp32", quiet=True) as model:
        ours = logits(model, [40])
    np.testing.assert_allclose(ours, reference("qwen3_moe"), atol=TOLERANCE, rtol=0)


def test_split_gguf(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "llama", split_max_tensors=9)
    parts = sorted(tmp_path.glob("*-of-*.gguf"))
    assert len(parts) > 2
    with outsize.load(str(parts[0]), encoding="fp32", quiet=True) as model:
        ours = logits(model, [40])
    np.testing.assert_allclose(ours, reference("llama"), atol=TOLERANCE, rtol=0)
    parts[1].unlink()
    with pytest.raises(outsize.errors.CheckpointError, match="parts are missing"):
        outsize.load(str(parts[0]), encoding="fp32", quiet=True)
