"""`outsize bench quality`: how far a pack is from its checkpoint in fp32, run by transformers.

Mean KL divergence (reference to pack, in nats), top-1 agreement and perplexity over the leading tokens
of a text. Nothing of ours computes the reference: transformers reads the same file by itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from outsize.engine import load as loading
from outsize.engine.model import Model
from outsize.errors import OptionError, SourceError
from outsize.forward.full import full, hidden
from outsize.forward.span import Span
from outsize.options import LoadOptions

ROWS = 64  # positions compared at once: logits of a large vocabulary are big


@dataclass(frozen=True, slots=True)
class Quality:
    """Over `tokens` - 1 predictions."""

    model: str
    tokens: int
    kl_mean: float
    top1_agreement: float
    perplexity: float
    reference_perplexity: float
    step_kl_mean: float  # the same, fed token by token over the last `step_tokens`
    step_top1_agreement: float
    step_tokens: int


def _need(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise OptionError(
            f"this needs the package {module!r}: pip install 'outsize[bench]'"
        ) from None


def reference_logits(files: Sequence[str], tokens: Sequence[int]) -> Tensor:
    """(T, V) fp32 from transformers, reading the checkpoint itself."""
    transformers = _need("transformers")
    path = Path(files[0])
    if not path.is_file():
        raise SourceError(f"{path} is gone; give the path of the checkpoint, not its package")
    extra = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, dtype=torch.float32, **extra
    )
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([list(tokens)])).logits[0]
    return logits


def compare(reference_KV: Tensor, ours_KV: Tensor) -> tuple[float, int]:
    """Summed KL(reference || ours) in nats, and how often the likeliest token is the same."""
    p, q = (torch.log_softmax(x, 1, dtype=torch.float64) for x in (reference_KV, ours_KV))
    agree = (reference_KV.argmax(1) == ours_KV.argmax(1)).sum()
    return float((p.exp() * (p - q)).sum()), int(agree)


@torch.inference_mode()
def evaluate(model: Model, tokens: Sequence[int], reference_TV: Tensor, steps: int) -> Quality:
    """Compare logits at every position but the last."""
    count, transformer = len(tokens) - 1, model.transformer
    (h_TD,) = hidden(transformer, [(Span(0, tokens, len(tokens)), transformer.new_kv())])
    kl = agree = nll = reference_nll = 0.0
    for start in range(0, count, ROWS):
        rows = slice(start, min(start + ROWS, count))
        ours, reference = transformer.logits(h_TD[rows]), reference_TV[rows].clone()
        target = torch.tensor(tokens[rows.start + 1 : rows.stop + 1])
        nll += float(cross_entropy(ours, target, reduction="sum"))
        reference_nll += float(cross_entropy(reference, target, reduction="sum"))
        more_kl, more_agree = compare(reference, ours)
        kl, agree = kl + more_kl, agree + more_agree
    step_kl, step_agree = _stepwise(model, tokens, reference_TV, steps)
    return Quality(
        model.name, len(tokens), kl / count, agree / count, math.exp(nll / count),
        math.exp(reference_nll / count), step_kl / steps, step_agree / steps, steps,
    )  # fmt: skip


def _stepwise(
    model: Model, tokens: Sequence[int], reference_TV: Tensor, steps: int
) -> tuple[float, int]:
    """The last `steps` positions, fed one at a time as decoding does."""
    kv, first = model.transformer.new_kv(), len(tokens) - 1 - steps
    kl, agree = 0.0, 0
    full(model.transformer, [Span(0, tokens[:first])], [kv])
    for at in range(first, first + steps):
        (out,) = full(model.transformer, [Span(at, [tokens[at]])], [kv])
        more_kl, more_agree = compare(reference_TV[at : at + 1].clone(), out.logits_KV)
        kl, agree = kl + more_kl, agree + more_agree
    return kl, agree


def _open(name: str, load_options: LoadOptions) -> Model:
    w = load_options
    return loading.load(
        name, encoding=w.encoding, native=w.native, quiet=w.quiet, defaults=w.defaults
    )


def _read(path: Path) -> str:
    """Raises SourceError, OptionError."""
    if not path.is_file():
        raise SourceError(f"no such text file: {path}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise OptionError(f"cannot read the text {path}: {e}; UTF-8 is expected") from None


def show(name: str, text: Path, num: int, load_options: LoadOptions) -> None:
    """Print a table and one JSON object."""
    said = _read(text)
    with _open(name, load_options) as model:
        tokens = model.tokens.encode(said, start=True)[:num]
        if len(tokens) < 32:
            raise OptionError(f"{text} has {len(tokens)} tokens; at least 32 are needed")
        files = [stat[0] for stat in model.pack.source.files]
        reference = reference_logits(files, tokens)
        q = evaluate(model, tokens, reference, min(256, len(tokens) // 2))
    print(f"{q.model}: {q.tokens} tokens of {text.name}, against transformers in fp32")
    print(f"  perplexity {q.perplexity:.3f} (reference {q.reference_perplexity:.3f})")
    print(f"  KL {q.kl_mean:.5f} nats, top-1 agreement {q.top1_agreement:.2%}")
    print(f"  token by token: KL {q.step_kl_mean:.5f}, top-1 {q.step_top1_agreement:.2%}")
    print(json.dumps(asdict(q)))


def show_tasks(
    name: str, tasks: list[str], limit: int | None, include: Path | None, load_options: LoadOptions
) -> None:
    """Run lm-eval tasks on a pack; one JSON object last."""
    lm_eval, harness = _need("lm_eval"), _need("outsize.bench.lm_eval")
    manager = _need("lm_eval.tasks").TaskManager(
        include_path=None if include is None else str(include)
    )
    with _open(name, load_options) as model:
        result = lm_eval.simple_evaluate(
            model=harness.Harness(model), tasks=tasks, limit=limit, task_manager=manager
        )
    for task, metrics in result["results"].items():
        shown = {k: v for k, v in metrics.items() if isinstance(v, float)}
        print(task, ", ".join(f"{k} {v:.4f}" for k, v in shown.items()))
    print(json.dumps(result["results"], default=str))
