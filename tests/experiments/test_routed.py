"""A model whose own router makes a recording's choices (experiments/caching/routed.py), here and in
transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import outsize
from experiments.caching import routed
from outsize.bench.synthetic.gguf import write
from outsize.bench.synthetic.shapes import Size
from outsize.forward.full import full
from outsize.forward.span import Span

SIZE = Size(2, 256, 64, 4, 2, 512, 512, head_dim=64, experts=16, used=4)
PROMPT, TOKENS = 5, 20


def wanted() -> list[list[tuple[int, ...]]]:
    """Drifting choices, the heaviest first."""
    return [[tuple((t // 3 + 5 * k + layer * t) % 16 for k in range(4)) for t in range(TOKENS)]
            for layer in range(2)]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_both_engines_make_the_recorded_choices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    first, mark = routed.FIRST, routed.Routed(wanted(), SIZE, 1)
    write(path, "qwen3_moe", SIZE, 1, mark)
    ids = list(range(first, first + TOKENS))
    with outsize.load(str(path), quiet=True) as m:
        watched, kv = routed.watch(m, wanted()), m.transformer.new_kv()
        full(m.transformer, [Span(0, ids[:PROMPT])], [kv])
        for t in range(PROMPT, TOKENS):
            (out,) = full(m.transformer, [Span(t, [ids[t]])], [kv])
        assert routed.agreed(watched, wanted()) == 1
        other = [row[:1] + row[2:] for row in wanted()]
        assert routed.agreed(watched, other) < 0.5, "and it tells others apart"
    config = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    config.moe_intermediate_size = SIZE.ffn  # which its reading of a GGUF leaves at the default
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, config=config
    )
    with torch.inference_mode():
        theirs = model(torch.tensor([ids]), output_router_logits=True)
    for logits, rows in zip(theirs.router_logits, wanted(), strict=True):
        found = logits.topk(4).indices.tolist()
        assert [set(row) for row in found] == [set(row) for row in rows]
    correlation = torch.corrcoef(torch.stack([out.logits_KV[-1], theirs.logits[0, -1].float()]))
    assert correlation[0, 1] > 0.99
