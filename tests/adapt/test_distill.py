"""Recovery and feature adapters: neutral at zero, better after, swapped without a trace, resumed and shared
among processes to the same numbers; and what cannot be is refused in a sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.nn.functional import cross_entropy

import outsize
from outsize.adapt import calibration, head_loss, loop
from outsize.adapt.change import AS_IS
from outsize.adapt.distill import data as texts
from outsize.adapt.distill.data import Data
from outsize.adapt.distill.factors import LoraStudent, best, nothing
from outsize.adapt.distill.feature import FeatureOptions, feature
from outsize.adapt.distill.recover import Recovered, RecoverOptions, recover, source_of
from outsize.adapt.distill.tables import Palettes, TableStudent
from outsize.adapt.distill.task import DistillRecipe, DistillTask, Student
from outsize.adapt.examples import Example, TrainOptions
from outsize.adapt.head_kl import head_kl, likeliest, mixed_loss
from outsize.adapt.repack import BitsOptions, repack
from outsize.adapt.trainable import TrainableModel
from outsize.bench.synthetic.folder import write_folder
from outsize.bench.synthetic.shapes import Size
from outsize.checkpoint.lora import raw
from outsize.errors import AdapterError, BudgetError, DataError, OptionError, UnsupportedError
from outsize.pack import fetch
from outsize.pack.format import Pack
from outsize.progress import silent
from outsize.storage.records import Records
from tests.command import outsize as outsize_here
from tests.processes import together

SIZE = Size(2, 128, 256, 2, 1, 300, 1024)
RECIPE = DistillRecipe(steps=8, batch=2, rate=3e-3, length=48)


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """Texts of less than real models need."""
    with mock.patch.multiple(calibration, TIMES=2, HELD_OUT=512):
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(f"line {i} of {i * i % 97} words, {i % 7}" for i in range(400)))
    return path


@pytest.fixture(scope="module")
def prompts(text: Path) -> Path:
    path = text.with_name("asked.jsonl")
    rows = [{"prompt": f"what is {i}", "answer": f"it is {i % 5} and no more"} for i in range(12)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory, home: Path, text: Path) -> tuple[Pack, Pack]:
    """A pack, and the same in three bits."""
    folder = tmp_path_factory.mktemp("distilled") / "small"
    write_folder(folder, "llama", SIZE, 5)
    base = fetch.pack(str(folder), quiet=True)
    return base, repack(base, BitsOptions(3.0, calibrate=text, quiet=True)).pack


def twin_of(pack: Pack, kind: torch.dtype = torch.float32) -> TrainableModel:
    return TrainableModel(pack, torch.device("cpu"), kind, silent)


def wish(pack: Pack, text: Path, output: Path, **more: object) -> RecoverOptions:
    where = TrainOptions(str(pack.path), (text,), output, quiet=True)
    return RecoverOptions(where, RECIPE, **more)  # type: ignore[arg-type]


def examples() -> Data:
    made = [Example([(7 * i * j + i) % 290 for j in range(20 + 5 * i)], 3) for i in range(6)]
    return Data(made[1:], {"text": made[:1]})


def task_of(packs: tuple[Pack, Pack], student: Student) -> DistillTask:
    return DistillTask(RECIPE, twin_of(packs[0]), student, examples())


@pytest.mark.parametrize("chunk", [1, 8 * 50 * 3, 1 << 20])
def test_divergence_in_chunks_is_the_plain_one(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient, in fp64, however many rows a chunk has; and of the mixed label."""
    monkeypatch.setitem(head_loss.CHUNK_BYTES, "cpu", chunk)
    former, head = torch.randn(7, 6).double(), torch.randn(50, 6).double()
    z = torch.randn(7, 6).double().requires_grad_()
    p, q = ((x @ head.T).log_softmax(-1) for x in (former, z))
    plain = 3 * (p.exp() * (p - q)).sum() / 7
    plain.backward()
    expected, z.grad = z.grad, None
    ours = 3 * head_kl(z, former, head)
    ours.backward()
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(z.grad, expected, rtol=1e-12, atol=1e-14)
    assert float(head_kl(former, former, head)) == pytest.approx(0, abs=1e-14)
    label = torch.randint(50, (7,))
    first = (former @ head.T).argmax(1)
    assert torch.equal(likeliest(former, head), first)
    both = [cross_entropy(z @ head.T, of) for of in (first, label)]
    found = mixed_loss(z, former, label, head)
    torch.testing.assert_close(found, 0.9 * both[0] + 0.1 * both[1], rtol=1e-12, atol=0)


def test_palettes_have_the_plain_gradient(packs: tuple[Pack, Pack]) -> None:
    """Weights are those of the pack; gradients of levels and steps are those of the plain formula."""
    with Records(packs[1]) as records:
        weight = records.weights(1, "down")[0]
        p = Palettes(weight, torch.device("cpu"))
        whole = records.layer(1, "down")
    levels = torch.zeros_like(p.level_JL).requires_grad_()
    steps = torch.zeros(p.shape).requires_grad_()
    made = p.weight(levels, steps, torch.float32)
    assert torch.equal(made, whole)
    pull = torch.randn_like(made)
    (made * pull).sum().backward()
    ours = levels.grad, steps.grad
    other = torch.zeros_like(levels).requires_grad_(), torch.zeros_like(steps).requires_grad_()
    level = (p.level_JL + 127 * other[0]).gather(1, p.code_JM.long()).view(*p.step_NG.shape, -1)
    grown = (1 + other[1]).transpose(1, 2).flatten(0, 1)
    step = p.step_NG * grown.repeat_interleave(p.step_NG.shape[1] // grown.shape[1], dim=1)
    ((level * step[..., None]).flatten(1)[: len(pull)] * pull).sum().backward()
    for found, plain in zip(ours, (other[0].grad, other[1].grad), strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)


def test_tables_that_have_not_grown_are_the_packs(packs: tuple[Pack, Pack]) -> None:
    """Neutral at zero: the same predictions, and the same bytes to write."""
    pack = packs[1]
    model = twin_of(pack, torch.bfloat16)
    with Records(pack) as records:
        student = TableStudent(model, pack, records)
        task = task_of(packs, student)
        assert task.measure(student.change(None)) == task.measure(AS_IS)
        for (layer, name), (made,) in student.made().items():
            (before,) = records.weights(layer, name)
            for key, field in made.fields().items():
                assert torch.equal(field, before.fields[key]), (layer, name, key)


def test_an_adapter_of_nothing_is_neutral(packs: tuple[Pack, Pack]) -> None:
    model = twin_of(packs[1], torch.bfloat16)
    student = LoraStudent(model, nothing(packs[1].description, 2, 0), "recovery")
    task = task_of(packs, student)
    assert task.measure(student.change(None)) == task.measure(AS_IS)


def test_the_best_factors() -> None:
    """With all ranks nothing is lost; with few, less of what inputs see than plain singular vectors leave."""
    generator = torch.Generator().manual_seed(3)
    for shape in ((12, 20), (20, 12)):
        lost = torch.randn(shape, generator=generator)
        inputs = torch.randn(200, shape[1], generator=generator) * torch.logspace(-1, 1, shape[1])
        lower = torch.linalg.cholesky(inputs.T @ inputs / 200)
        a, b = best(lost, lower, 12)
        torch.testing.assert_close(b @ a, lost, rtol=1e-3, atol=1e-3)
        a, b = best(lost, lower, 3)
        u, s, v = torch.linalg.svd(lost)
        plain = (u[:, :3] * s[:3]) @ v[:3]
        seen = [float(((lost - w) @ lower).norm()) for w in (b @ a, plain)]
        assert seen[0] < 0.95 * seen[1]


@pytest.fixture(scope="module")
def repaired(
    packs: tuple[Pack, Pack], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Recovered:
    folder = tmp_path_factory.mktemp("tables")
    options = wish(packs[1], text, folder / "t.safetensors")
    return recover(replace(options, recipe=replace(RECIPE, steps=25)))


def test_recovered_tables(packs: tuple[Pack, Pack], repaired: Recovered) -> None:
    """Another pack, as large and as fast, nearer to the source; its numbers are those that were measured."""
    pack = repaired.pack
    assert repaired.adapter is None
    assert repaired.begun == repaired.before
    assert repaired.after["text"].kl < 0.9 * repaired.before["text"].kl
    assert pack.source.sha256 not in (packs[1].source.sha256, packs[0].source.sha256)
    assert pack.source.kin == (packs[1].source.sha256, packs[0].source.sha256)
    assert pack.size == packs[1].size
    assert [t.stride for t in pack.tables] == [t.stride for t in packs[1].tables]
    assert source_of(pack, None) == packs[0]
    assert pack.quality is not None
    assert pack.quality.kl == repaired.after["text"].kl
    with outsize.load(str(pack.path), quiet=True) as model:
        assert model.generate("a few words", raw=True, max_tokens=5)[0].text


def test_the_written_tables_are_the_trained_ones(
    packs: tuple[Pack, Pack], tmp_path: Path, text: Path
) -> None:
    """What is measured while training is what the pack computes, within the rounding of its steps."""
    options = wish(packs[1], text, tmp_path / "t.safetensors")
    made = recover(options)
    teacher, model = twin_of(packs[0]), twin_of(made.pack)
    found = texts.load(options.train, RECIPE.length, packs[0], teacher)
    nobody = LoraStudent(model, nothing(made.pack.description, 1, 0), "recovery")
    again = DistillTask(RECIPE, teacher, nobody, found).measure(AS_IS)["text"]
    assert again.kl == pytest.approx(made.after["text"].kl, rel=0.02)


def test_recovered_factors(packs: tuple[Pack, Pack], text: Path, tmp_path: Path) -> None:
    """An ordinary adapter: better in closed form, better yet trained; refused over any other pack; and the
    same answers when it is swapped out and in."""
    path = tmp_path / "rec.safetensors"
    made = recover(wish(packs[1], text, path, rank=4))
    assert made.pack == packs[1]
    kl = [found["text"].kl for found in (made.before, made.begun, made.after)]
    assert kl[1] < 0.97 * kl[0]
    assert kl[2] < kl[1]
    assert raw(path)[1]["base"] == packs[1].source.sha256
    with outsize.load(str(packs[1].path), quiet=True, adapters={"rec": path}) as model:
        answers = [
            model.generate("some words", raw=True, max_tokens=6, temperature=0, adapter=name)[
                0
            ].text
            for name in ("rec", None, "rec", None)
        ]
        assert answers[:2] == answers[2:]
        scores = [model.score("several words in a row").logprobs for _ in range(2)]
        assert scores[0] == scores[1]
    with pytest.raises(AdapterError, match="was trained for another model"):
        outsize.load(str(packs[0].path), quiet=True, adapters={"rec": path})


def test_a_feature_begins_from_a_recovery(
    packs: tuple[Pack, Pack], text: Path, prompts: Path, tmp_path: Path
) -> None:
    begun, out = tmp_path / "rec.safetensors", tmp_path / "f.safetensors"
    recover(wish(packs[1], text, begun, rank=2, begin="zero"))
    where = TrainOptions(str(packs[1].path), (prompts,), out, own_answers=False, quiet=True)
    recipe = replace(RECIPE, steps=20, length=80, loss="ce")
    feature(FeatureOptions(where, recipe, begun))
    tensors, about = raw(out)
    assert about["kind"] == "feature"
    assert about["base"] == packs[1].source.sha256
    assert float(str(about["held_out_perplexity"])) < 200
    first, _ = raw(begun)
    assert tensors["0.q.A"].shape == first["0.q.A"].shape
    assert not torch.equal(tensors["0.q.B"], first["0.q.B"])
    with pytest.raises(AdapterError, match="was trained for another model"):
        feature(FeatureOptions(replace(where, model=str(packs[0].path)), recipe, begun))
    with pytest.raises(OptionError, match="has one; leave it out"):
        feature(FeatureOptions(where, recipe, begun, 4))
    with pytest.raises(DataError, match="a feature learns from prompts"):
        feature(FeatureOptions(replace(where, data=(text,)), recipe))


def test_resumed_tables_are_the_same(packs: tuple[Pack, Pack], tmp_path: Path) -> None:
    pack = packs[1]
    with Records(pack) as records:

        def new() -> DistillTask:
            return task_of(packs, TableStudent(twin_of(pack), pack, records))

        whole, part = loop.start(new(), "base"), loop.start(new(), "base")
        for _ in range(4):
            whole.run_step()
        for _ in range(2):
            part.run_step()
        part.save(tmp_path / "c")
        again = loop.resume(new(), tmp_path / "c", "base")
        for _ in range(2):
            again.run_step()
        for name, value in whole.task.parameters.items():
            assert torch.equal(value, again.task.parameters[name]), name


def test_processes_average_to_the_whole_batch(packs: tuple[Pack, Pack]) -> None:
    """However the sequences' lengths fall, the mean of the parts' losses is the loss of the whole."""
    student = LoraStudent(twin_of(packs[1]), nothing(packs[1].description, 2, 0), "recovery")
    task = task_of(packs, student)
    for step in range(3):
        whole = float(task.loss(step, slice(None)).detach())
        with mock.patch("outsize.adapt.distill.task.processes", return_value=(0, 2)):
            parts = [float(task.loss(step, slice(rank, None, 2)).detach()) for rank in range(2)]
        assert sum(parts) / 2 == pytest.approx(whole, rel=1e-5)


def test_what_cannot_be_recovered(packs: tuple[Pack, Pack], text: Path, tmp_path: Path) -> None:
    base, few = packs
    out = tmp_path / "o.safetensors"
    with pytest.raises(OptionError, match="was made from no other pack"):
        recover(wish(base, text, out))
    with pytest.raises(OptionError, match="is not, or does not hold, what"):
        recover(wish(few, text, out, source=str(few.path)))
    with pytest.raises(OptionError, match="rank is 129; from 1 to 64"):
        recover(wish(few, text, out, rank=129))
    with pytest.raises(OptionError, match="begin is 'best'"):
        wish(few, text, out, begin="best")
    with pytest.raises(OptionError, match="loss is 'mse'"):
        DistillRecipe(loss="mse")
    short = tmp_path / "short.txt"
    short.write_text("too few words")
    with pytest.raises(DataError, match="no two pieces of 48 tokens"):
        recover(wish(few, short, out))
    options = wish(few, text, out)
    with pytest.raises(OptionError, match="length is 1; 2 tokens at least"):
        recover(replace(options, recipe=replace(RECIPE, length=1)))
    with pytest.raises(BudgetError, match=r"MB of memory, and 90 MB may be used"):
        recover(replace(options, train=replace(options.train, memory="90MB")))
    with pytest.raises(DataError, match="nothing to train on"):
        recover(replace(options, train=replace(options.train, data=())))
    with pytest.raises(OptionError, match="is no pack that is here"):
        recover(replace(options, train=replace(options.train, model=str(tmp_path))))
    with (
        Records(base) as records,
        pytest.raises(UnsupportedError, match="has no palettes with tables"),
    ):
        TableStudent(twin_of(base), base, records)


def words_of(pack: Pack, text: Path, output: Path, *more: str) -> list[str]:
    return [
        "adapt", "recover", str(pack.path), "--data", str(text), "-o", str(output), "--steps", "8",
        "--batch", "2", "--length", "48", "-t", "1", *more,
    ]  # fmt: skip


def test_on_the_command_line(packs: tuple[Pack, Pack], text: Path, tmp_path: Path) -> None:
    """The table; and flags that do not go together."""
    words = words_of(packs[1], text, tmp_path / "a.safetensors", "--rank", "2", "--begin", "zero")
    done = outsize_here(*words)
    assert done.returncode == 0, done.stderr
    assert "text, before" in done.stdout
    assert "text, after 8 steps" in done.stdout
    assert "--adapter recovery=" in done.stdout
    for more, said in (
        (["--tables", "--rank", "2"], "one of them is trained at a time"),
        (["--begin", "zero"], "is of low-rank factors"),
        (["--given-answers", "-n", "9"], "is of own answers"),
    ):
        refused = outsize_here(*words_of(packs[1], text, tmp_path / "b.safetensors", *more))
        assert refused.returncode == 2
        assert said in refused.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGINT is POSIX")
def test_an_interrupt_saves(packs: tuple[Pack, Pack], text: Path, tmp_path: Path) -> None:
    """Ctrl-C, while training: the command ends in words, with a checkpoint of where it was."""
    output = tmp_path / "a.safetensors"
    words = words_of(packs[1], text, output, "--rank", "2", "--steps", "2000", "--every", "5", "-q")
    script = (
        "import signal\nfrom outsize.cli.main import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background ignores it
        "main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, *words], stderr=subprocess.PIPE, text=True
    )
    checkpoint = output.with_suffix(".checkpoint")
    while not checkpoint.is_file():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in said
    assert 5 <= int(str(raw(checkpoint)[1]["step"])) < 2000
    refused = outsize_here(*words)
    assert refused.returncode == 2
    assert "has not ended; go on with --resume" in refused.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")
def test_a_killed_recovery_resumes_to_the_same_file(
    packs: tuple[Pack, Pack], text: Path, tmp_path: Path
) -> None:
    made = []
    for name in ("whole", "killed"):
        output = tmp_path / f"{name}.safetensors"
        more = ("--rank", "2", "--begin", "zero", "--steps", "60", "--every", "5", "-q")
        words = words_of(packs[1], text, output, *more)
        if name == "killed":
            process = subprocess.Popen([sys.executable, "-m", "outsize.cli.main", *words])
            while not output.with_suffix(".checkpoint").is_file():
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
            if not output.exists():
                assert outsize_here(*words, "--resume").returncode == 0
        else:
            assert outsize_here(*words).returncode == 0
        made.append(raw(output)[0])
    for name, value in made[0].items():
        assert torch.equal(value, made[1][name]), name


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without processes")
def test_two_processes_train_as_one(packs: tuple[Pack, Pack], text: Path, tmp_path: Path) -> None:
    """To rounding: they add in another order."""
    alone, both = tmp_path / "alone.safetensors", tmp_path / "both.safetensors"
    more = ("--rank", "2", "--begin", "zero")
    assert outsize_here(*words_of(packs[1], text, alone, *more)).returncode == 0
    said = together(*words_of(packs[1], text, both, *more))
    assert ["after 8 steps" in out for out, _ in said] == [True, False]
    one, two = raw(alone)[0], raw(both)[0]
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name].float(), two[name].float(), rtol=0.05, atol=2e-3)
