"""A model's own layers for further tokens: their numbers are those of their definition (transformers' layer
between norms and maps), their drafts change no answer, and right ones are kept."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import outsize
from outsize.draft.native import FurtherLayer
from outsize.engine.model import Model
from outsize.errors import OptionError, UnsupportedError
from outsize.options import LoadOptions
from outsize.pack import fetch
from outsize.plan import fixed
from outsize.plan.decide import foresee
from tests.golden import converted, tiny

BEHIND = ("glm4_moe", "deepseek_v3", "glm4_moe_lite")
APART = ("qwen3_5", "qwen3_next", "qwen3_5_moe")
MTP = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "eh_proj": "fc",
       "shared_head.norm": "norm"}  # fmt: skip
WIDTH, LAST = tiny.WIDTH, tiny.LAYERS - 1


def further(family: str) -> dict[str, np.ndarray]:
    """The tensors of a further layer: numbers of the last layer of attention, and others."""
    number = LAST if family in BEHIND else 1
    prefix, random = f"model.layers.{number}.", np.random.default_rng(3)
    stem = f"model.layers.{tiny.LAYERS}." if family in BEHIND else "mtp.layers.0."
    made = {
        name.replace(prefix, stem): w + 0.05 * random.standard_normal(w.shape).astype(np.float32)
        for name, w in tiny.weights(family).items()
        if name.startswith(prefix)
    }
    for name in MTP:
        shape = (WIDTH, 2 * WIDTH) if name == "eh_proj" else (WIDTH,)
        whole = stem + name if family in BEHIND else f"mtp.{MTP[name]}"
        made[f"{whole}.weight"] = 0.2 * random.standard_normal(shape).astype(np.float32)
    return made


def write(folder: Path, family: str, change: Callable[[str, Any], Any] = lambda _, w: w) -> Path:
    path = tiny.write_folder(folder, family)
    whole = load_file(path / "model.safetensors") | further(family)
    save_file({k: change(k, w) for k, w in whole.items()}, path / "model.safetensors")
    config = tiny.config(family) | {"num_nextn_predict_layers": int(family in BEHIND)}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def folder_with(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    base = tmp_path_factory.mktemp("further")

    def make(family: str) -> Path:
        return base / family if (base / family).exists() else write(base / family, family)

    return make


CLASSES = {"glm4_moe": "Glm4Moe", "deepseek_v3": "DeepseekV3", "qwen3_5": "Qwen3_5"}


def theirs(folder: Path, family: str, tokens: list[int], states_TD: torch.Tensor) -> torch.Tensor:
    """(T, D) normed states by transformers' layer."""
    transformers = pytest.importorskip("transformers", minversion="5.20")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    kind, name = tiny.REFERENCE.get(family, family), CLASSES[family]
    settings = {k: v for k, v in tiny.config(family).items() if k != "model_type"}
    config = transformers.AutoConfig.for_model(kind, **settings)
    config._attn_implementation = "eager"
    number = LAST if family in BEHIND else 1
    layer = getattr(module, f"{name}DecoderLayer")(config, number).eval()
    text = "Text" if family == "qwen3_5" else ""
    rotary = getattr(module, f"{name}{text}RotaryEmbedding")(config)
    norm = getattr(module, f"{name}RMSNorm")
    own = {k: torch.from_numpy(w) for k, w in further(family).items()}
    stem = f"model.layers.{tiny.LAYERS}." if family in BEHIND else "mtp.layers.0."
    own = {k.removeprefix(stem): w for k, w in own.items()}
    names = {n: f"{n}.weight" if family in BEHIND else f"mtp.{MTP[n]}.weight" for n in MTP}
    extra = {n: own.pop(key) for n, key in names.items()}
    expert = [k for k in own if ".experts." in k]
    if expert:
        count = tiny.EXPERTS
        parts = [[own.pop(f"mlp.experts.{e}.{k}_proj.weight") for e in range(count)]
                 for k in ("gate", "up", "down")]  # fmt: skip
        gate, up, down = (torch.stack(part) for part in parts)
        own["mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        own["mlp.experts.down_proj"] = down
    layer.load_state_dict(own, strict=True)

    def normed(key: str, x: torch.Tensor) -> torch.Tensor:
        made = norm(WIDTH, eps=1e-5)
        made.weight.data = extra[key]
        return made(x)

    embedded = torch.from_numpy(tiny.weights(family)["model.embed_tokens.weight"])[tokens]
    joined = torch.cat([normed("enorm", embedded), normed("hnorm", states_TD)], dim=1)
    x = (joined @ extra["eh_proj"].T)[None]
    count = len(tokens)
    ids = torch.arange(count)[None]
    mask = torch.full((count, count), float("-inf")).triu(1)[None, None]
    out = layer(x, position_embeddings=rotary(x, ids), attention_mask=mask, position_ids=ids)
    out = out[0] if isinstance(out, tuple) else out
    return normed("shared_head.norm", out)[0]


@pytest.mark.parametrize("family", CLASSES)
@torch.no_grad()
def test_a_further_layer_is_its_definition(family: str, folder_with: Callable[[str], Path]) -> None:
    tokens, states = tiny.TOKENS[:7], torch.randn(7, WIDTH, generator=torch.manual_seed(1))
    expected = theirs(folder_with(family), family, tokens, states)
    source = str(folder_with(family))
    with outsize.load(source, encoding="fp32", draft="native", quiet=True) as model:
        assert model.drafting.model is not None
        layer = FurtherLayer(model.drafting.model)
        kv = layer.new_kv()
        for start, end in ((0, 3), (3, 4), (4, 7)):
            found = layer.run(start, tokens[start:end], states[start:end], kv)
            torch.testing.assert_close(found[0], expected[end - 1], atol=2e-4, rtol=1e-3)
        again = layer.run(4, tokens[4:7], states[4:7], kv)  # what was drafted is forgotten
        assert torch.equal(again, found)


@pytest.mark.parametrize(
    "family",
    [
        "glm4_moe", "deepseek_v3", "qwen3_next",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("glm4_moe_lite", "qwen3_5", "qwen3_5_moe")),
    ],
)  # fmt: skip
def test_drafts_of_a_models_own_change_no_answer(
    family: str, folder_with: Callable[[str], Path]
) -> None:
    source, prompts = str(folder_with(family)), ["abcabc", "x", "the sea is wide, and deep"]
    how: list[dict[str, Any]] = [{}, {"temperature": 0.8, "seed": 4}]
    with outsize.load(source, encoding="int8", quiet=True) as model:
        plain = [
            [r.text for r in model.generate(prompts, raw=True, max_tokens=20, **h)] for h in how
        ]
    with outsize.load(source, encoding="int8", draft="native:k=3", quiet=True) as model:
        for wanted, h in zip(plain, how, strict=True):
            replies = model.generate(prompts, raw=True, max_tokens=20, **h)
            assert [r.text for r in replies] == wanted
            assert all(r.drafted > 0 for r in replies if r.new_tokens > 3)


def sure(name: str, w: np.ndarray) -> np.ndarray:
    """A model that says one token for each, and a further layer that knows which."""
    if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight")):
        return np.zeros_like(w)
    if "eh_proj" in name or name == "mtp.fc.weight":
        return np.concatenate([np.eye(WIDTH), np.zeros((WIDTH, WIDTH))], axis=1).astype(np.float32)
    if "norm" in name and "linear" not in name:
        return np.full_like(w, 0.0 if name.startswith("mtp") or "norm.weight" in name else 1.0)
    return w


@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_5"])
def test_right_drafts_are_kept(family: str, tmp_path: Path) -> None:
    shifted = family in APART  # norms are stored as w - 1

    def change(name: str, w: np.ndarray) -> np.ndarray:
        made = sure(name, w)
        is_norm = "norm" in name and "linear" not in name
        return np.full_like(w, 0.0 if shifted else 1.0) if is_norm else made

    path = write(tmp_path / "m", family, change)
    with outsize.load(str(path), encoding="fp32", draft="native:k=2", quiet=True) as model:
        (reply,) = model.generate("abc", raw=True, max_tokens=31, ignore_eos=True)
    assert reply.new_tokens == 31
    assert reply.accepted == reply.drafted > 15


def test_what_has_no_such_layer_is_refused(
    folder_of: Callable[[str], Path], folder_with: Callable[[str], Path], tmp_path: Path
) -> None:
    for family in ("llama", "qwen3_5"):
        with pytest.raises(UnsupportedError, match=r"draft=native.*no layer that predicts further"):
            outsize.load(str(folder_of(family)), draft="native", quiet=True)
    path = converted.write(tmp_path / "m.gguf", "qwen3_5")
    with pytest.raises(UnsupportedError, match="GGUF files"):
        outsize.load(str(path), draft="native", quiet=True)
    pack = fetch.pack(str(folder_with("glm4_moe")), quiet=True)
    with pytest.raises(OptionError, match="is a pack, which has no layers"):
        outsize.load(str(pack.path), draft="native", quiet=True)
    with pytest.raises(OptionError, match="native takes no path"):
        outsize.load(str(path), draft="native:x.gguf", quiet=True)


def test_the_plan_knows_what_it_takes(folder_with: Callable[[str], Path]) -> None:
    source, options = str(folder_with("glm4_moe")), LoadOptions(draft="native", quiet=True)
    before, place = foresee(source, options, 1 << 40, 0)
    with outsize.load(source, draft="native", quiet=True) as model:
        assert isinstance(model, Model)
        held = model.placement.fixed[fixed.DRAFT]
    assert before.smaller is not None
    assert place.fixed[fixed.DRAFT] > before.smaller.size > 0
    assert held > before.smaller.size
