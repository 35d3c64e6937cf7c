"""Alignment: checks by name and never code, advantages, a trust region that is nothing where nothing moved;
resumed to the same bits; and rewards rise."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

import outsize
from outsize.adapt import loop
from outsize.adapt.align import mdloo, task_file
from outsize.adapt.align.checks import CHECKS, Check, parse
from outsize.adapt.align.mdloo import AlignRecipe, AlignTask, advantages, log_probs
from outsize.adapt.align.run import AlignOptions, align, task_of
from outsize.adapt.answers import answer
from outsize.adapt.change import AS_IS
from outsize.adapt.distill.task import rows
from outsize.adapt.examples import Example, TrainOptions
from outsize.adapt.trainable import TrainableModel
from outsize.checkpoint.lora import raw
from outsize.engine.model import Model
from outsize.errors import DataError, OptionError
from outsize.progress import silent
from tests.command import outsize as outsize_here
from tests.processes import together

RECIPE = AlignRecipe(
    steps=6, batch=2, samples=3, inner=2, max_tokens=6, rank=2, length=400, rate=5e-3
)
# A tiny model of bytes says anything: what passes often enough to learn from.
CHECK = {"kind": "most_words", "count": 1}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "task.json"
    prompts = [{"prompt": f"say {i}", "check": CHECK} for i in range(12)]
    path.write_text(json.dumps({"name": "short", "prompts": prompts}))
    return path


@pytest.fixture(scope="module")
def model(open_tiny: Callable[..., Model]) -> Model:
    return open_tiny("llama", "int8")


def new_task(model: Model, file: Path, recipe: AlignRecipe = RECIPE) -> AlignTask:
    twin = TrainableModel(model.pack, torch.device("cpu"), torch.float32, silent)
    return task_of(recipe, model.pack, twin, task_file.read(file))


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (Check("words", 2), "two-part words!", "three of them"),
        (Check("most_words", 2), "yes", ""),
        (Check("lines", 2), "a\n\nb", "a"),
        (Check("letters", 3, "e"), "Every tree"[:9], "no"),
        (Check("starts", 0, "So"), "  So it is", "so it is"),
        (Check("ends", 0, "X"), "at the end X ", "X first"),
        (Check("contains", 0, "BLUE"), "a blue sky", "red"),
        (Check("lower"), "all small", "Not"),
        (Check("upper"), "ALL LARGE", "Not"),
        (Check("json", 0, "a"), '{"a": 1}', '{"b": 1}'),
        (Check("json"), "{}", "[1]"),
    ],
)
def test_checks(check: Check, good: str, bad: str) -> None:
    assert check.passes(good)
    assert not check.passes(bad)


def test_every_check_is_tested_and_total() -> None:
    """None raises, whatever a model says."""
    for kind in CHECKS:
        for text in ("", "{", "\0", "[" * 5000, "a" * 9999):
            assert Check(kind, 1, "a").passes(text) in (True, False)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"kind": "python", "text": "import os"}, "no code is run from a file"),
        ({"kind": "words", "count": 2, "code": "x"}, "kind, count and text are all"),
        ({"kind": "words"}, "a count from 0 to 10,000 is expected"),
        ({"kind": "words", "count": True}, "a count from 0"),
        ({"kind": "lower", "count": 1}, "no count is expected"),
        ({"kind": "ends"}, "one is expected"),
        ({"kind": "upper", "text": "x"}, "none is expected"),
        ({"kind": "ends", "text": "X "}, "no answer passes for 'X ', .*'X' is expected"),
        ({"kind": "starts", "text": " So"}, "'So' is expected"),
        ({"kind": "most_words", "count": 0}, "an answer of no word never passes"),
        ({"kind": "ends", "text": "x" * 201}, "at most 200 characters"),
        ("eval(1)", "an object with a kind"),
    ],
)
def test_checks_that_are_none(said: object, why: str) -> None:
    with pytest.raises(DataError, match=why):
        parse(said)


def test_task_files(tmp_path: Path, file: Path) -> None:
    told = task_file.read(file)
    assert [len(told.train), len(told.held_out)] == [9, 3]
    assert not set(told.train) & set(told.held_out)
    path = tmp_path / "t.json"
    good, other = ({"prompt": text, "check": CHECK} for text in "ab")
    some = [{"prompt": text, "check": CHECK} for text in "cdef"]
    for content, why in (
        (json.dumps({"prompts": [good, other, *some, other]}), "prompt 7: it is prompt 2 again"),
        (json.dumps({"prompts": some, "name": "a\x1b[31m"}), "its name is no text of at most"),
        (json.dumps({"prompts": some, "name": 3}), "its name is no text of at most"),
        ("[1]", "has no list of prompts"),
        ("{", "is not JSON"),
        (json.dumps({"prompts": [good] * 3}), "3 prompts; from 4"),
        (json.dumps({"prompts": [good] * 4, "import": "os"}), "no code is run from a file"),
        (json.dumps({"prompts": [*[good] * 4, {"check": CHECK}]}), "prompt 5: it has no prompt"),
        (
            json.dumps({"prompts": [*[good] * 4, good | {"reward": "x"}]}),
            "are all that it may have",
        ),
        (json.dumps({"prompts": [*[good] * 4, {"prompt": "a"}]}), "a check is an object"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=why):
            task_file.read(path)
    with pytest.raises(DataError):
        task_file.read(tmp_path / "none.json")


def test_advantages() -> None:
    total = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    far = torch.tensor(0.25)  # the mean of all processes
    loo = advantages(total, "loo", far)
    torch.testing.assert_close(loo[0], torch.tensor([1.0, -0.5, -0.5]))
    torch.testing.assert_close(loo[1], torch.zeros(3))
    torch.testing.assert_close(advantages(total, "mean", far), total - 0.25)
    assert torch.equal(advantages(total, "none", far), total)


@pytest.mark.parametrize("baseline", ["loo", "mean"])
def test_processes_sample_what_one_does(model: Model, file: Path, baseline: str) -> None:
    """Two take every other prompt, with the advantages that they have where one takes all."""
    recipe = replace(RECIPE, batch=4, baseline=baseline)
    task = new_task(model, file, recipe)
    whole = task.sample(0, slice(None), AS_IS)
    assert whole.total_PK is not None
    mean = whole.total_PK.mean()
    with (
        mock.patch.object(mdloo, "processes", return_value=(0, 2)),
        mock.patch.object(mdloo, "average", lambda some: some[0].copy_(mean)),
    ):
        found = [task.sample(0, slice(rank, None, 2), AS_IS) for rank in range(2)]
    for rank, mine in enumerate(found):
        due = whole.advantage_M.view(4, -1)[rank::2].flatten()
        torch.testing.assert_close(mine.advantage_M, due, rtol=1e-4, atol=1e-4)
        assert mine.examples[0] == whole.examples[3 * rank]


def test_log_probabilities_are_the_plain_ones(model: Model, file: Path) -> None:
    task = new_task(model, file)
    examples = [Example([5, 9, 100, 7, 31], 2), Example([5, 9, 8, 7], 3)]
    found = log_probs(task.student.model, examples, AS_IS)
    for e, total in zip(examples, found.tolist(), strict=True):
        twin = task.student.model
        x, _ = twin.run(rows(twin, torch.tensor([e.tokens])))
        logs = twin.logits(x[0]).log_softmax(-1)
        plain = sum(float(logs[i - 1, e.tokens[i]]) for i in range(e.num_prompt, len(e.tokens)))
        assert total == pytest.approx(plain, rel=1e-4)


def test_answers_do_not_depend_on_their_company(model: Model, file: Path) -> None:
    """Each is drawn by a seed of its own; together they follow the model's distribution."""
    task = new_task(model, file)
    some = task.draw(task.asked[:1], 2, 9, AS_IS)
    more = task.draw(task.asked[:3], 2, 9, AS_IS)
    assert more[0] == some[0]
    assert task.draw(task.asked[:1], 2, 10, AS_IS) != some
    draws = [torch.Generator().manual_seed(s) for s in range(300)]
    prompt = [5, 9, 100]
    first = [a[0] for a in answer(task.student.model, [prompt] * 300, 1, frozenset(), draws)]
    twin = task.student.model
    x, _ = twin.run(rows(twin, torch.tensor([prompt])))
    shares = twin.logits(x[0, -1]).softmax(-1)
    top = int(shares.argmax())
    assert first.count(top) / 300 == pytest.approx(float(shares[top]), abs=0.1)


def test_nothing_pulls_where_nothing_moved(model: Model, file: Path) -> None:
    """On fresh samples the loss's gradient is that of the rewards alone: with equal rewards, none."""
    task = new_task(model, file, replace(RECIPE, beta=0.0))
    with mock.patch.object(AlignTask, "passes", lambda self, a, answers: [1.0] * len(answers)):
        loss = task.loss(0, slice(None))
    loss.backward()  # type: ignore[no-untyped-call]
    grads = [float(p.grad.abs().max()) for p in task.parameters.values() if p.grad is not None]
    assert max(grads) < 1e-6


def test_rewards_rise(model: Model, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mdloo, "MEASURED", 24)
    recipe = replace(RECIPE, steps=30, batch=4, samples=8, rate=1e-2, beta=0.0, inner=1)
    task = new_task(model, file, recipe)
    before = task.pass_rate(AS_IS)
    training = loop.start(task, "base")
    for _ in range(recipe.steps):
        training.run_step()
    after = task.pass_rate(task.student.change(None))
    assert after > before + 0.1 or after == 1.0


def test_resumed_between_two_steps_on_the_same_samples(
    model: Model, file: Path, tmp_path: Path
) -> None:
    """To the same bits: what is still to be learned from is kept."""
    whole, part = (loop.start(new_task(model, file), "base") for _ in range(2))
    for _ in range(4):
        whole.run_step()
    for _ in range(3):
        part.run_step()
    part.save(tmp_path / "c")
    again = loop.resume(new_task(model, file), tmp_path / "c", "base")
    again.run_step()
    for name, value in whole.task.parameters.items():
        assert torch.equal(value, again.task.parameters[name]), name


def test_a_committee(model: Model, file: Path, tmp_path: Path) -> None:
    """Passing answers are learned; what came of it may be a member; a task that nobody passes is refused."""
    out = tmp_path / "a.safetensors"
    where = TrainOptions(str(model.pack.path), (), out, quiet=True)
    recipe = replace(RECIPE, steps=20, samples=8)
    made = align(AlignOptions(where, recipe, file, "reject"))
    assert made.steps == 20
    assert made.after >= made.before
    again = replace(where, output=tmp_path / "b.safetensors")
    align(AlignOptions(again, replace(recipe, steps=2), file, "reject", {"first": out}))
    with outsize.load(str(model.pack.path), quiet=True, adapters={"x": out}) as loaded:
        assert loaded.generate("say 3", max_tokens=4, adapter="x")
    path = tmp_path / "hard.json"
    hard = [{"prompt": f"{i}", "check": {"kind": "words", "count": 9999}} for i in range(4)]
    path.write_text(json.dumps({"prompts": hard}))
    with pytest.raises(DataError, match="none has an answer that passes"):
        align(AlignOptions(where, RECIPE, path, "reject"))


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without processes")
@pytest.mark.parametrize("baseline", ["loo", "mean"])
def test_two_processes_align_as_one(
    model: Model, file: Path, tmp_path: Path, baseline: str
) -> None:
    """To rounding, on the same samples; of a gradient of about nothing AdamW makes a step of its own."""
    made = []
    for world in (1, 2):
        out = tmp_path / f"{world}.safetensors"
        said = together(
            "adapt", "align", str(model.pack.path), "--task", str(file), "-o", str(out), "--steps", "2",
            "--batch", "4", "--samples", "3", "-n", "4", "--rank", "2", "--baseline", baseline, "-t", "1",
            world=world,
        )  # fmt: skip
        assert sum("wrote" in text for _, text in said) == 1
        made.append(raw(out)[0])
    one, two = made
    assert one.keys() == two.keys()
    for name in one:
        a, b = one[name].float(), two[name].float()
        assert torch.isclose(a, b, rtol=0.05, atol=2e-3).float().mean() > 0.85, name


def test_on_the_command_line(model: Model, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.safetensors"
    words = [
        "adapt", "align", str(model.pack.path), "--task", str(file), "-o", str(out), "--steps", "2",
        "--batch", "2", "--samples", "2", "-n", "4", "--rank", "2", "-t", "1",
    ]  # fmt: skip
    done = outsize_here(*words)
    assert done.returncode == 0, done.stderr
    assert "held-out prompts pass" in done.stderr
    for more, said in (
        (("--baseline", "best"), "baseline is 'best'"),
        (("--samples", "1"), "samples is 1"),
        (("--rank", "99"), "what the narrowest map has"),
        (("--member", f"a={out}"), "give method reject"),
        (("--method", "dpo"), "method is 'dpo'"),
        (("--length", "8"), "give a larger --length"),
    ):
        refused = outsize_here(*words, *more)
        assert refused.returncode == 2, more
        assert said in refused.stderr
    with pytest.raises(OptionError, match="eta is 0"):
        replace(RECIPE, eta=0.0)
