"""The quality bench against transformers, and the lm-eval interface."""

from __future__ import annotations

import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import outsize
from outsize.bench import quality
from outsize.bench.synthetic import make
from outsize.engine.model import Model
from outsize.errors import OptionError, SourceError
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.options import LoadOptions
from tests.golden import tiny

TEXT = "The sea is wide and the night is long; déjà vu. " * 6


@pytest.mark.parametrize(
    ("encoding", "kl", "agreement"), [("fp32", 1e-7, 1.0), ("bf16", 1e-2, 0.9), ("int8", 2e-2, 0.8)]
)
@pytest.mark.filterwarnings("ignore")
def test_quality_against_transformers(
    encoding: str,
    kl: float,
    agreement: float,
    folder_of: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("transformers")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    quality.show(str(folder_of("qwen3")), text, 120, LoadOptions(encoding=encoding, quiet=True))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["tokens"] == 120
    assert 0 <= result["kl_mean"] < kl
    assert 0 <= result["step_kl_mean"] < kl
    assert result["top1_agreement"] >= agreement
    exact = result["reference_perplexity"]
    assert result["perplexity"] == pytest.approx(exact, rel=0.05 if encoding != "fp32" else 1e-5)


def test_quality_needs_its_inputs(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("hi")
    with pytest.raises(OptionError, match="at least 32 are needed"):
        quality.show(str(folder_of("qwen3")), tmp_path / "short.txt", 99, LoadOptions(quiet=True))
    with pytest.raises(SourceError, match="is gone"):
        quality.reference_logits([str(tmp_path / "m.gguf")], [1, 2])
    with pytest.raises(OptionError, match=r"pip install 'outsize\[bench\]'"):
        quality._need("no_such_module_here")


class LM(ABC):
    """What lm-eval 0.4's `lm_eval.api.model.LM` asks of a model, where lm-eval is not installed: it brings
    forty packages."""

    @abstractmethod
    def loglikelihood(self, requests: list[object]) -> list[tuple[float, bool]]: ...

    @abstractmethod
    def loglikelihood_rolling(self, requests: list[object]) -> list[float]: ...

    @abstractmethod
    def generate_until(self, requests: list[object]) -> list[str]: ...


@pytest.fixture
def harness_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Model], Any]]:
    if find_spec("lm_eval") is None:
        made = ModuleType("lm_eval.api.model")
        made.LM = LM  # type: ignore[attr-defined]
        for name in ("lm_eval", "lm_eval.api"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, made.__name__, made)
    yield import_module("outsize.bench.lm_eval").Harness
    sys.modules.pop("outsize.bench.lm_eval")


def test_the_harness_answers_as_the_model_does(
    open_tiny: Callable[..., Model], harness_of: Callable[[Model], Any]
) -> None:
    model = open_tiny("llama", "fp32")
    harness = harness_of(model)
    ask = [SimpleNamespace(args=("the sea", " is wide")), SimpleNamespace(args=("", "night"))]
    (first, _), (second, _) = harness.loglikelihood(ask)
    tokens = model.tokens.encode("the sea is wide", start=True)
    logprobs, _ = model.score_tokens(tokens)
    assert first == pytest.approx(sum(logprobs[-8:]), abs=1e-4)
    assert math.isfinite(second)
    whole = harness.loglikelihood_rolling([SimpleNamespace(args=("the sea is wide",))])
    assert whole[0] < first
    how = {"until": ["zzz"], "max_gen_toks": 5}
    (text,) = harness.generate_until([SimpleNamespace(args=("the sea", how))])
    assert text == model.generate("the sea", raw=True, max_tokens=5)[0].text


SYNTHETIC = ("llama", "qwen2", "qwen3", "gemma3", "olmoe", "mixtral", "qwen3_moe", "gpt_oss")


@pytest.mark.parametrize(
    "family",
    [
        *(*SYNTHETIC, "phi3", "granite", "olmo2", "gemma2", "qwen2_moe", "glm4_moe", "deepseek_v3"),
        *("lfm2", "qwen3_next", "qwen3_5", "qwen3_5_moe", "falcon"),
    ],
)
def test_synthetic_models_run(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / f"{family}.gguf"
    size = "tiny-moe" if family in tiny.MIXTURES else "tiny"
    make.show(path, make.What(family, size, 1), "auto", True)
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert made["model_bytes"] == path.stat().st_size
    with outsize.load(str(path), quiet=True) as model:
        assert model.generate("abc", raw=True, max_tokens=3)[0].new_tokens >= 1
    with pytest.raises(OptionError, match="is there already"):
        make.show(path, make.What(family, size, 1), "auto", True)
    with pytest.raises(OptionError, match="size 'huge' is not known"):
        make.show(tmp_path / "x.gguf", make.What(family, "huge"), "auto", True)


@pytest.mark.parametrize("size", ["tiny", "tiny-moe"])
def test_a_synthetic_model_in_a_mix_of_types(
    size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Q4_K_M's: more bits for the values' matrices of some layers, and weights of the same spread."""
    gguf = pytest.importorskip("gguf")
    path, family = tmp_path / "m.gguf", "qwen3_moe" if size == "tiny-moe" else "llama"
    if size == "tiny-moe":  # its experts' rows are no whole blocks
        with pytest.raises(OptionError, match="has rows of 128, Q4_K has blocks of 256; take q4_0"):
            make.show(path, make.What(family, size, 1, "q4_k_m"), "auto", True)
        return
    make.show(path, make.What(family, size, 1, "q4_k_m"), "auto", True)
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert {t.tensor_type.name for t in found.values()} == {"F32", "Q4_K", "Q6_K"}
    for name in ("blk.0.attn_v.weight", "blk.1.attn_q.weight", "output.weight"):
        some = gguf.dequantize(found[name].data, found[name].tensor_type)
        assert abs(some.std() * some.shape[-1] ** 0.5 - 1) < 0.1
    with outsize.load(str(path), quiet=True) as model:
        assert model.generate("abc", raw=True, max_tokens=3)[0].new_tokens >= 1
    make.show(tmp_path / "three.gguf", make.What(family, size, 1, "q3_k"), "auto", True)
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "three.gguf").tensors}
    some = gguf.dequantize(
        found["blk.0.ffn_up.weight"].data, found["blk.0.ffn_up.weight"].tensor_type
    )
    assert abs(some.std() * some.shape[-1] ** 0.5 - 1) < 0.1


def test_synthetic_types_are_named_or_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="types 'q2' are not known; known are q4_0, q4_k_m, q3_k"):
        make.show(tmp_path / "m.gguf", make.What("llama", "tiny", 1, "q2"), "auto", True)
    with pytest.raises(OptionError, match="a folder is written in bf16"):
        make.show(tmp_path / "m", make.What("llama", "tiny", 1, "q4_k_m"), "auto", True)


def test_a_synthetic_folder_runs_here_and_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same random weights give transformers' logits."""
    transformers = pytest.importorskip("transformers")
    make.show(tmp_path / "m", make.What("llama", "tiny", 1), "fp32", True)
    capsys.readouterr()
    ids = list(range(40, 60))
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=torch.float32
    )
    with torch.inference_mode():
        theirs = reference(torch.tensor([ids])).logits[0]
    with outsize.load(str(tmp_path / "m"), encoding="fp32", quiet=True) as model:
        t = model.transformer
        (out,) = full(t, [Span(0, ids, len(ids))], [t.new_kv()])
    assert torch.allclose(out.logits_KV, theirs, atol=1e-3)
