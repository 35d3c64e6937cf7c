"""Pruned packs and packs whose layers share keys and values: they are the trainable copies that they were
made from, with identities of their own, and better distilled than not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import outsize
from outsize.adapt import loop
from outsize.adapt.change import AS_IS
from outsize.adapt.distill.data import Data
from outsize.adapt.distill.made import Made
from outsize.adapt.distill.matrices import Matrices
from outsize.adapt.distill.prune import PruneOptions, activation, magnitude, prune
from outsize.adapt.distill.share_kv import ShareOptions, share_kv
from outsize.adapt.distill.soft_top_k import MaskStudent, soft_top_k, threshold
from outsize.adapt.distill.task import DistillRecipe, DistillTask, rows
from outsize.adapt.examples import Example, TrainOptions
from outsize.adapt.trainable import TrainableModel
from outsize.bench.synthetic.folder import write_folder
from outsize.bench.synthetic.shapes import Size
from outsize.checkpoint.lora import load as load_adapter
from outsize.engine.model import Model
from outsize.errors import AdapterError, OptionError, UnsupportedError
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.model.lora_file import additions
from outsize.pack import fetch
from outsize.pack.format import Pack, read_header
from outsize.pack.outline import of_pack
from outsize.progress import silent
from outsize.storage.records import Records
from tests.command import outsize as outsize_here

SIZE = Size(3, 128, 256, 2, 1, 300, 1024)
RECIPE = DistillRecipe(steps=12, batch=2, rate=1e-3, length=48)
TOKENS = [(7 * i * i + 3 * i) % 290 for i in range(40)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(f"line {i} of {i * i % 97} words, {i % 7}" for i in range(300)))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Pack:
    folder = tmp_path_factory.mktemp("reshaped") / "small"
    write_folder(folder, "llama", SIZE, 1)
    return fetch.pack(str(folder), encoding="q8_0", quiet=True)


@pytest.fixture(scope="module")
def where(base: Pack, text: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainOptions:
    out = tmp_path_factory.mktemp("out") / "x.safetensors"
    return TrainOptions(str(base.path), (text,), out, quiet=True)


@pytest.fixture(scope="module")
def pruned(where: TrainOptions) -> Made:
    return prune(PruneOptions(where, replace(RECIPE, steps=25, rate=3e-4), "1/4"))


@pytest.fixture(scope="module")
def shared(where: TrainOptions) -> Made:
    return share_kv(ShareOptions(where, RECIPE, 1))


def twin_of(pack: Pack) -> TrainableModel:
    return TrainableModel(pack, torch.device("cpu"), torch.float32, silent)


def logits(model: TrainableModel, change: Matrices | None = None) -> torch.Tensor:
    with torch.no_grad():
        x, _ = model.run(rows(model, torch.tensor([TOKENS])), change=change or AS_IS)
        return model.logits(x[0])


def packed_logits(pack: Pack) -> torch.Tensor:
    with outsize.load(str(pack.path), quiet=True, native=False) as model:
        kv = model.transformer.new_kv()
        return full(model.transformer, [Span(0, TOKENS, len(TOKENS))], [kv])[0].logits_KV


def test_a_pruned_pack_is_the_pruned_copy(base: Pack, pruned: Made) -> None:
    """Smaller, sound, itself; it computes what the trainable copy with its numbers in place computes."""
    pack = pruned.pack
    assert pack.description.ffn_width == 64
    assert pack.size < base.size
    assert read_header(pack.path) == pack
    assert pack.source.sha256 not in ("", base.source.sha256)
    assert pack.source.kin == (base.source.sha256,)
    with Records(pack) as records:
        weights = {
            (layer, name): records.layer(layer, name)
            for layer in range(3)
            for name in ("gate_up", "down")
        }
    copied = logits(twin_of(base), Matrices(weights, {}))
    torch.testing.assert_close(logits(twin_of(pack)), copied, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed_logits(pack), copied, rtol=0.05, atol=0.15)
    assert pruned.after["text"].kl < 0.9 * pruned.begun["text"].kl


def test_a_shared_pack_is_the_sharing_copy(base: Pack, shared: Made) -> None:
    pack = shared.pack
    assert pack.description.num_kv_layers == 2
    with Records(pack) as records:
        weights = {(2, name): records.layer(2, name) for name in ("qkv", "o", "gate_up", "down")}
    assert len(weights[2, "qkv"]) == 128
    copied = logits(twin_of(base), Matrices(weights, {2: 1}))
    torch.testing.assert_close(packed_logits(pack), copied, rtol=0.05, atol=0.15)
    assert shared.after["text"].kl < shared.begun["text"].kl
    with outsize.load(str(pack.path), quiet=True) as model:
        assert model.generate("a few words", raw=True, max_tokens=5)[0].text


def test_what_belongs_to_the_original_is_refused(base: Pack, pruned: Made, tmp_path: Path) -> None:
    """A LoRA of the base, whose shapes may even fit, and a LoRA's training over layers that share."""
    path, text = tmp_path / "a.safetensors", tmp_path / "p.jsonl"
    text.write_text("\n".join('{"prompt": "a", "answer": "b c d"}' for _ in range(9)))
    done = outsize_here(
        "adapt", "feature", str(base.path), "--data", str(text), "--given-answers", "-o", str(path),
        "--steps", "1", "--rank", "2", "-q",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with pytest.raises(AdapterError, match="was trained for another model"):
        additions("a", load_adapter(path), of_pack(pruned.pack))


@pytest.mark.parametrize("by", ["magnitude", "soft"])
def test_other_ways_to_choose(where: TrainOptions, by: str, tmp_path: Path) -> None:
    """Without steps the result is what was chosen."""
    options = replace(where, output=tmp_path / "y.safetensors")
    made = prune(PruneOptions(options, replace(RECIPE, steps=0), ".5", by, mask_steps=6))
    assert made.pack.description.ffn_width == 128
    assert made.begun == made.after
    assert made.steps == 0
    assert not list(tmp_path.glob("*.checkpoint"))


def test_the_neurons_that_matter(base: Pack) -> None:
    """Both measures find neurons that were made larger."""
    model = twin_of(base)
    with Records(base) as records:
        gate_up, down = records.layer(1, "gate_up"), records.layer(1, "down")
        assert len(magnitude(records, 1)) == 256
    grown = gate_up.clone()
    grown[[3, 70, 256 + 3, 256 + 70]] *= 6
    model._layers[1]["gate_up"] = grown
    model._layers[1]["down"] = down
    data = Data([Example(TOKENS, 1)] * 3, {})
    score = activation(model, data)[1]
    assert set(score.topk(2).indices.tolist()) == {3, 70}


def test_soft_top_k() -> None:
    """Masks sum to k; sharpen to the k largest; and have the gradient that differences say."""
    score = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for temperature in (1.0, 0.1, 0.001):
        mask = soft_top_k(score, 13, temperature)
        assert float(mask.sum()) == pytest.approx(13, abs=1e-3)
    assert set(mask.topk(13).indices.tolist()) == set(score.topk(13).indices.tolist())
    assert float(mask.min()) < 1e-6
    leaf, pull = score.clone().requires_grad_(), torch.randn(40, dtype=torch.float64)
    (soft_top_k(leaf, 13, 0.5) * pull).sum().backward()
    assert leaf.grad is not None
    for i in (0, 7, 33):
        ends = []
        for by in (1e-5, -1e-5):
            moved = score.clone()
            moved[i] += by
            at = threshold(moved, 13, 0.5)
            ends.append(float((torch.sigmoid((moved - at) / 0.5) * pull).sum()))
        assert float(leaf.grad[i]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-5)


def test_learned_scores_keep_what_hurts_to_lose(base: Pack) -> None:
    """Begun from scores that are wrong on purpose, they find neurons that cost less."""
    model = twin_of(base)
    data = Data([Example([(7 * i * j + i) % 290 for j in range(40)], 1) for i in range(1, 7)], {})
    wrong = [-s for s in activation(model, data)]
    student = MaskStudent(model, wrong, 128, 30)
    recipe = replace(RECIPE, steps=30, rate=0.2)
    held = replace(data, held_out={"text": data.train[:2]})
    task = DistillTask(recipe, model, student, held)
    before = task.measure(student.change(None))["text"].kl
    training = loop.start(task, "base")
    for _ in range(30):
        training.run_step()
    assert task.measure(student.change(None))["text"].kl < 0.9 * before


def test_what_cannot_be(where: TrainOptions, shared: Made, open_tiny: Callable[..., Model]) -> None:
    for ffn in ("2", "0", "-1/2", "half", "1/0", "1e-999999999", "1" * 99):
        with pytest.raises(OptionError, match="a share between 0 and 1"):
            PruneOptions(where, RECIPE, ffn)
    with pytest.raises(OptionError, match="by is 'random'"):
        PruneOptions(where, RECIPE, by="random")
    with pytest.raises(OptionError, match="which leaves nothing out"):
        prune(PruneOptions(where, RECIPE, ".99"))
    with pytest.raises(OptionError, match="from 1 to 2 can"):
        share_kv(ShareOptions(where, RECIPE, 3))
    again = replace(where, model=str(shared.pack.path))
    with pytest.raises(UnsupportedError, match="whose layers all make keys"):
        share_kv(ShareOptions(again, RECIPE, 1))
    mixture = replace(where, model=str(open_tiny("olmoe").pack.path))
    with pytest.raises(UnsupportedError, match="prune is for dense models"):
        prune(PruneOptions(mixture, RECIPE))


def stopped(after: int) -> Any:
    """Training that is interrupted as soon as it has run so many steps, of however many parts."""
    count, run_step = iter(range(99)), loop.Training.run_step

    def step(self: loop.Training) -> None:
        if next(count) == after:
            raise KeyboardInterrupt
        run_step(self)

    return mock.patch.object(loop.Training, "run_step", step)


@pytest.mark.slow
def test_pruning_goes_on_where_it_was(where: TrainOptions, tmp_path: Path) -> None:
    """Interrupted while scores are learned, or weights: to the same pack. By another choice it is another
    training, and a forgotten --resume loses nothing."""
    options = PruneOptions(where, replace(RECIPE, steps=4), ".5", "soft", mask_steps=3)
    made = []
    for after in (None, 2, 5):
        options = replace(options, train=replace(where, output=tmp_path / f"{after}.safetensors"))
        if after is not None:
            with stopped(after), pytest.raises(KeyboardInterrupt):
                prune(options)
            with pytest.raises(OptionError, match="has not ended; go on with --resume"):
                prune(options)
            options = replace(options, train=replace(options.train, resume=True))
        if after == 5:
            with pytest.raises(AdapterError, match="kind was 'pruned by soft', is 'pruned by act"):
                prune(replace(options, by="activation"))
        made.append(prune(options).pack.source.sha256)
    assert made[0] == made[1] == made[2]
    assert not [*tmp_path.iterdir()]


def test_on_the_command_line(base: Pack, text: Path, tmp_path: Path) -> None:
    out = ("-o", str(tmp_path / "z.safetensors"), "--length", "48", "-t", "1")
    for words in (
        ("prune", str(base.path), "--ffn", "1/2", "--steps", "1"),
        ("share-kv", str(base.path), "--layers", "2", "--steps", "1"),
    ):
        done = outsize_here("adapt", *words, "--data", str(text), *out)
        assert done.returncode == 0, done.stderr
        assert "text, untrained" in done.stdout
        assert "text, after 1 steps" in done.stdout
        assert "lossy" in done.stdout
    refused = outsize_here(
        "adapt", "prune", str(base.path), "--data", str(text), "--mask-steps", "3"
    )
    assert refused.returncode == 2
    assert "give --by soft" in refused.stderr
