"""The layout laws of mask drafts: what masks see does not depend on which other masks there are; ordinary
tokens compute what they always did, to the bit; what is kept is what a plain run keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import outsize
from outsize.adapt.examples import Example
from outsize.adapt.mtp.losses import (
    MtpRecipe,
    all_anchors,
    collate,
    deltas,
    mask_rows,
    ordinary,
)
from outsize.adapt.trainable import TrainableModel
from outsize.draft import mtp_file
from outsize.draft.drafter import Drafter, NoDraft
from outsize.draft.mtp import MtpDraft
from outsize.draft.verify import verify
from outsize.engine import decode as flow
from outsize.engine.drive import drive
from outsize.engine.model import Model
from outsize.forward.full import full
from outsize.forward.span import NARROW, MaskTokens, Span
from outsize.model.lora import Adapter
from outsize.pack.outline import of_pack
from outsize.progress import silent
from outsize.sampling.sample import greedy
from tests.drafts import random_parameters, write_masks
from tests.golden import tiny

RECIPE = MtpRecipe(k=3, rank=4)
DENSE = ("llama", "qwen2", "qwen3", "gemma3", "mistral")
SCALE = 2.0


@pytest.mark.parametrize("family", DENSE)
def test_interleaved_masks_equal_separate_ones(
    family: str, open_tiny: Callable[..., Model]
) -> None:
    """All anchors at once, and each alone after its own prefix: the same states to 1e-9 in fp64."""
    model = open_tiny(family, "fp32")
    twin = TrainableModel(model.pack, torch.device("cpu"), torch.float64, silent)
    parameters = random_parameters(model, RECIPE)
    added, masks = deltas(parameters, SCALE), parameters["masks"]
    whole = Example(tiny.TOKENS[:14], 4)
    batch = collate([whole], [all_anchors(whole)])
    with torch.no_grad():
        _, stored = ordinary(twin, batch)
        z, _ = twin.run(mask_rows(twin, batch, masks), stored, added)
        for row, anchor in enumerate(all_anchors(whole)):
            alone = collate([Example(whole.tokens[: anchor + 1], 4)], [[anchor]])
            _, past = ordinary(twin, alone)
            one, _ = twin.run(mask_rows(twin, alone, masks), past, added)
            ours = z[0, row * RECIPE.k : (row + 1) * RECIPE.k]
            assert (ours - one[0]).abs().max() < 1e-9


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("native", [True, False])
def test_the_engine_runs_masks_as_training_did(
    family: str, native: bool, open_tiny: Callable[..., Model]
) -> None:
    """Mask tokens' states in a step equal the training layout's."""
    encoding = "bf16" if native else "fp32"
    model = open_tiny(family, encoding, native)
    twin = TrainableModel(model.pack, torch.device("cpu"), torch.float32, silent)
    parameters = random_parameters(model, RECIPE)
    factors = deltas(parameters, SCALE).factors
    adapter = Adapter("test", model.pack.description, factors, SCALE)
    tokens, first = tiny.TOKENS[:20], 15
    example = Example(tokens, first + 1)
    batch = collate([example], [list(range(first, 20))])
    t = model.transformer
    kv = t.new_kv()
    with torch.no_grad():
        _, stored = ordinary(twin, batch)
        z, _ = twin.run(
            mask_rows(twin, batch, parameters["masks"]), stored, deltas(parameters, SCALE)
        )
    full(t, [Span(0, tokens[:first])], [kv])
    masks = MaskTokens(tuple(range(5)), parameters["masks"], adapter)
    (out,) = full(t, [Span(first, tokens[first:], 5, masks)], [kv])
    assert out.masks_MD is not None
    error = (out.masks_MD - z[0]).norm() / z[0].norm()
    assert error < (0.05 if native else 1e-2)  # the adapter's factors are bf16


@pytest.mark.parametrize("encoding", ["int4", "int8", "q4_0"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_masks_change_no_bit_of_ordinary_rows(
    family: str, encoding: str, open_tiny: Callable[..., Model]
) -> None:
    model = open_tiny(family, encoding)
    parameters = random_parameters(model, RECIPE)
    factors = deltas(parameters, SCALE).factors
    adapter = Adapter("test", model.pack.description, factors, SCALE)
    t, rows = model.transformer, []
    for masks in (None, MaskTokens((0, 1, 2, 3), parameters["masks"], adapter)):
        kv = t.new_kv()
        full(t, [Span(0, tiny.TOKENS[:20])], [kv])
        (out,) = full(t, [Span(20, tiny.TOKENS[20:24], 4, masks)], [kv])
        rows.append((out.logits_KV, [kv.view(i).clone() for i in range(len(kv.positions))]))
    assert torch.equal(rows[0][0], rows[1][0])
    for plain, masked in zip(rows[0][1], rows[1][1], strict=True):
        assert torch.equal(plain, masked)


@pytest.mark.parametrize("layout", ["linear", "quadratic"])
@pytest.mark.parametrize("encoding", ["int4", "int8"])
def test_kept_keys_and_values_are_a_plain_runs(
    layout: str, encoding: str, open_tiny: Callable[..., Model], tmp_path: Path
) -> None:
    model = open_tiny("llama", encoding)
    file = write_masks(model, tmp_path / "m.safetensors")
    masks = mtp_file.read(file, 0, of_pack(model.pack), model.transformer)
    kept = [run(model, drafter) for drafter in (NoDraft(), MtpDraft(masks, 3, layout))]
    assert kept[0][0] == kept[1][0]
    for plain, drafted in zip(kept[0][1], kept[1][1], strict=True):
        size = min(plain.shape[1], drafted.shape[1])
        assert size > 30
        assert torch.equal(plain[:, :size], drafted[:, :size])


def run(model: Model, drafter: Drafter) -> tuple[list[int], list[torch.Tensor]]:
    """The tokens of a greedy run, and what its cache keeps of each layer."""
    t = model.transformer
    seq, kv = flow.Sequence(tiny.TOKENS[:9], 9, 45, frozenset()), t.new_kv()
    for _ in drive(t, [flow.decode(seq, (drafter, verify), greedy)], [kv]):
        pass
    kv.truncate(len(seq.tokens) - 1)
    return seq.tokens, [kv.view(i).clone() for i in range(len(kv.positions))]


def drafts_of(model: Model, folder: Path) -> list[str]:
    file = write_masks(model, folder / "masks.safetensors")
    return [
        "auto", "ngram", "ngram:k=1", "ngram:k=15", f"model:{model.pack.path}:k=5", f"masks:{file}",
        f"masks:{file}:k=1", f"masks:{file}:k=2,layout=linear", f"masks:{file}:layout=linear",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "encoding"),
    [
        ("llama", "int4"),
        pytest.param("gemma3", "int8", marks=pytest.mark.slow),
        pytest.param("llama", "int8", marks=pytest.mark.slow),
        pytest.param("gemma3", "int4", marks=pytest.mark.slow),
    ],
)
def test_every_drafter_gives_the_answers_of_none(
    family: str, encoding: str, open_tiny: Callable[..., Model], tmp_path: Path
) -> None:
    plain = open_tiny(family, encoding)
    prompts = [
        "".join(chr(97 + (i * j) % 23) for j in range(3 + i)) * (1 + i % 3) for i in range(9)
    ]
    how = {"raw": True, "max_tokens": 30, "stop": ["zz"]}
    want = [plain.generate(p, **how)[0] for p in prompts]  # type: ignore[arg-type]
    warm = [plain.generate(p, temperature=0.9, seed=5, **how)[0] for p in prompts]  # type: ignore[arg-type]
    for draft in drafts_of(plain, tmp_path):
        with outsize.load(str(plain.pack.path), draft=draft, quiet=True) as model:
            drafted = [model.generate(p, **how)[0] for p in prompts]  # type: ignore[arg-type]
            sampled = [model.generate(p, temperature=0.9, seed=5, **how)[0] for p in prompts]  # type: ignore[arg-type]
            together = model.generate(prompts, **how)  # type: ignore[arg-type]
        for theirs, ours, batch in zip(want, drafted, together, strict=True):
            assert (ours.text, ours.new_tokens, ours.finish) == (
                theirs.text, theirs.new_tokens, theirs.finish
            ), draft  # fmt: skip
            assert batch.text == theirs.text
        assert [r.text for r in sampled] == [r.text for r in warm]
        if draft.startswith("model"):
            assert all(r.tokens_per_step > 3 for r in drafted if r.new_tokens > 20)
            # Longer prompts are read whole, and by the draft with one token more: other sums, other ties.
            alike = [r for p, r in zip(prompts, drafted, strict=True) if len(p) < NARROW]
            assert len(alike) > 5
            assert all(r.accepted == r.drafted > 20 for r in alike)
            assert sum(r.accepted for r in drafted) > 0.98 * sum(r.drafted for r in drafted)
