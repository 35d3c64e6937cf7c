"""Row invariance: a token's logits are the same bits alone, in a batch of eight, and in a 5-token step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import outsize
from outsize.engine.model import Model
from outsize.forward.full import full
from outsize.forward.span import Span
from tests.golden import tiny

PROMPTS = [[(13 * i + 7 * j + 1) % tiny.VOCAB for j in range(3 + 5 * i)] for i in range(8)]
NEXT = [[(31 * i + j) % tiny.VOCAB for j in range(5)] for i in range(8)]


def prefilled(model: Model, i: int) -> object:
    kv = model.transformer.new_kv()
    full(model.transformer, [Span(0, PROMPTS[i])], [kv])
    return kv


def alone(model: Model, i: int) -> list[torch.Tensor]:
    kv, rows = prefilled(model, i), []
    for j, token in enumerate(NEXT[i]):
        (out,) = full(model.transformer, [Span(len(PROMPTS[i]) + j, [token])], [kv])  # type: ignore[list-item]
        rows.append(out.logits_KV[0])
    return rows


# Every encoding on the blocks that all models share; each block of few families once in either way.
WAYS = [
    *(
        (family, encoding, native)
        for family in ("llama", "gemma3", "qwen2", "llama+biases")
        for encoding in ("int4", "int8", "q4_0", "q5_1")
        for native in (True, False)
    ),
    *((family, "q4_0", True) for family in tiny.STORED),
    *(
        (family, "int8", False)
        for family in ("gemma2", "glm4_moe", "deepseek_v3", "qwen2_moe", "qwen3_5")
    ),
]


@pytest.mark.parametrize(("family", "encoding", "native"), WAYS)
def test_rows_do_not_see_their_company(
    family: str, encoding: str, native: bool, open_tiny: Callable[..., Model]
) -> None:
    model = open_tiny(family, encoding, native)
    expected = [alone(model, i) for i in range(8)]
    kvs = [prefilled(model, i) for i in range(8)]
    for j in range(5):  # a batch of eight, token by token
        spans = [Span(len(PROMPTS[i]) + j, [NEXT[i][j]]) for i in range(8)]
        outs = full(model.transformer, spans, kvs)  # type: ignore[arg-type]
        for i in range(8):
            assert torch.equal(outs[i].logits_KV[0], expected[i][j])
    spans = [Span(len(PROMPTS[i]), NEXT[i], 5) for i in range(8)]  # 5-token steps, together
    outs = full(model.transformer, spans, [prefilled(model, i) for i in range(8)])  # type: ignore[misc]
    for i in range(8):
        assert torch.equal(outs[i].logits_KV, torch.stack(expected[i]))


@pytest.mark.parametrize("encoding", ["int4", "int8", "q4_0", "q5_1"])
def test_a_batch_gives_the_text_of_single_runs(
    encoding: str, open_tiny: Callable[..., Model]
) -> None:
    model = open_tiny("llama", encoding)
    prompts = ["x" * (4 * i + 1) + chr(97 + i) for i in range(8)]
    for how in ({"temperature": 0.0}, {"temperature": 0.9, "seed": 5}):
        together = model.generate(prompts, max_tokens=20, raw=True, **how)  # type: ignore[arg-type]
        for prompt, reply in zip(prompts, together, strict=True):
            (single,) = model.generate(prompt, max_tokens=20, raw=True, **how)  # type: ignore[arg-type]
            assert (reply.text, reply.new_tokens) == (single.text, single.new_tokens)


def test_grouped_kernels_are_invariant(home: object) -> None:
    from outsize.encoding.group import Group
    from outsize.home import home as folder
    from outsize.kernels.find import native_in
    from outsize.kernels.plain import PLAIN

    compiled = native_in(folder() / "native")
    for bits in (4, 5, 8):
        for kernel in (PLAIN, compiled or PLAIN):
            e = Group(bits, kernel)
            fields, x = e.encode(torch.randn(96, 192)), torch.randn(13, 192)
            rows = torch.cat([e.linear(x[i : i + 1], fields, False) for i in range(13)])
            assert torch.equal(e.linear(x, fields, False), rows)


def test_fp8_is_invariant() -> None:
    from outsize.encoding.fp8 import Fp8

    e = Fp8()
    fields, x = e.encode(torch.randn(96, 192)), torch.randn(13, 192)
    rows = torch.cat([e.linear(x[i : i + 1], fields, False) for i in range(13)])
    assert torch.equal(e.linear(x, fields, False), rows)


def test_closed_models_say_so(folder_of: Callable[[str], object]) -> None:
    model = outsize.load(str(folder_of("llama")), quiet=True)
    model.close()
    with pytest.raises(outsize.errors.ClosedError, match="is closed"):
        model.generate("x", raw=True)


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_wrong_drafts_leave_nothing_behind(family: str, open_tiny: Callable[..., Model]) -> None:
    """Of every family: after drafts whose first tokens are right, the bits are those of no draft."""
    t = open_tiny(family, "q4_0", True).transformer
    wanted, ours = t.new_kv(), t.new_kv()
    for kv in (wanted, ours):
        full(t, [Span(0, tiny.TOKENS[:20])], [kv])
    at = 20
    for wrong in (3, 0, 7):
        rows = [full(t, [Span(at + i, [tiny.TOKENS[at + i]])], [wanted])[0] for i in range(3)]
        drafted = [*tiny.TOKENS[at : at + 3], *range(5, 5 + wrong)]
        (out,) = full(t, [Span(at, drafted, len(drafted))], [ours])
        assert torch.equal(out.logits_KV[:3], torch.cat([row.logits_KV for row in rows]))
        at += 3
