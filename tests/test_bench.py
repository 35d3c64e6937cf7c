"""The quality bench against transformers, and the lm-eval interface."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from outsize.api import Model
from outsize.bench import quality
from outsize.errors import OptionError, SourceError

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
    quality.show(str(folder_of("qwen3")), text, 120, encoding, True, True)
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
        quality.show(str(folder_of("qwen3")), tmp_path / "short.txt", 99, "fp32", True, True)
    with pytest.raises(SourceError, match="is gone"):
        quality.reference_logits([str(tmp_path / "m.gguf")], [1, 2])
    with pytest.raises(OptionError, match=r"pip install 'outsize\[bench\]'"):
        quality._need("no_such_module_here")


def test_the_harness_answers_as_the_model_does(open_tiny: Callable[..., Model]) -> None:
    pytest.importorskip("lm_eval", reason="pip install 'outsize[bench]' to include this")
    from outsize.bench.harness import Harness

    model = open_tiny("llama", "fp32")
    harness = Harness(model)
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
