"""`outsize adapt relu`: a pack with ReLU that runs, and pages its neurons exactly; resumed after SIGKILL to
the same bits; refused where it makes no sense."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.functional import linear

import outsize
from outsize.adapt.head_loss import head_divergence
from outsize.adapt.relu.run import Relufied, ReluOptions, fitted, run
from outsize.adapt.relu.task import ReluRecipe, Student
from outsize.adapt.run import alone
from outsize.adapt.sparsity import run as sparsity
from outsize.adapt.sparsity import words
from outsize.adapt.sparsity.run import SparsityOptions
from outsize.errors import AdapterError, BudgetError, OptionError, UnsupportedError
from outsize.family.bounds import fault
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.kernels.plain import activation_of
from outsize.pack import fetch
from tests.command import outsize as outsize_here
from tests.golden import tiny
from tests.processes import together

RECIPE = ReluRecipe(steps=12, batch=2, rate=3e-3, length=32)


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    with mock.patch.multiple(words, LENGTH=64):
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "some.txt"
    said = (f"The cat sat on the mat, and number {i * i} was no dog at all." for i in range(40))
    path.write_text("\n".join(said))
    return path


@pytest.fixture(scope="module")
def model(folder_of: Callable[[str], Path], home: Path) -> str:
    folder = str(folder_of("llama"))
    fetch.pack(folder, quiet=True)
    return folder


@pytest.fixture(scope="module")
def made(model: str, text: Path) -> Relufied:
    return run(options(model, text), RECIPE)


def options(model: str, text: Path, **more: Any) -> ReluOptions:
    given: dict[str, Any] = {"every": 4, "quiet": True, "memory": "20GB"} | more
    return ReluOptions(model, (text,), **given)


def rows(made: Relufied) -> list[dict[str, float]]:
    return [json.loads(line) for line in made.history.read_text().splitlines()]


def test_it_learns_and_runs(made: Relufied) -> None:
    found = rows(made)
    assert [row["step"] for row in found] == [4, 8, 12]
    assert found[-1]["tokens"] == 12 * 2 * 32
    assert found[-1]["loss"] < found[0]["loss"]
    assert 0 < found[-1]["fires"] < 1
    assert made.pack.description.activation == "relu"
    with outsize.load(str(made.pack.path), quiet=True) as opened:
        (reply,) = opened.generate(["The cat"], max_tokens=3)
    assert reply.new_tokens


def test_its_neurons_are_paged_exactly(made: Relufied, text: Path, tmp_path: Path) -> None:
    pack, logits = str(made.pack.path), []
    given = SparsityOptions(
        pack,
        (text,),
        tmp_path / "f",
        predictor="gate:exact",
        order="natural",
        tokens=900,
        quiet=True,
    )
    found = sparsity.run(given)
    assert found.about.exact
    for neurons in ("off", str(found.path)):
        with outsize.load(pack, neurons=neurons, quiet=True) as opened:
            kv = opened.transformer.new_kv()
            logits.append(
                full(opened.transformer, [Span(0, tiny.TOKENS[:9], 9)], [kv])[0].logits_KV
            )
    assert torch.equal(*logits)


def test_it_is_another_model(made: Relufied, model: str) -> None:
    base = fetch.pack(model, quiet=True)
    assert made.pack.source.identity != base.source.identity
    assert made.pack.source.kin[0] == base.source.sha256


def contents(made: Relufied) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in made.pack.path.glob("*.records")
    }


def words_of(model: str, text: Path) -> list[str]:
    """The command that trains as `made` was trained."""
    flags = {
        "--data": text, "--steps": RECIPE.steps, "--batch": RECIPE.batch, "--rate": RECIPE.rate,
        "--length": RECIPE.length, "--every": 4,
    }  # fmt: skip
    return ["adapt", "relu", model, *(str(word) for pair in flags.items() for word in pair)]


def test_killed_and_resumed_is_the_same(
    made: Relufied, model: str, text: Path, own_home: Path
) -> None:
    """SIGKILL, as soon as a checkpoint is there, in a home of its own."""
    command = [sys.executable, "-m", "outsize.cli.main", *words_of(model, text), "-q"]
    env = {**os.environ, "OUTSIZE_HOME": str(own_home)}
    child = subprocess.Popen([*command, "--threads", str(torch.get_num_threads())], env=env)
    try:
        while not list((own_home / "adapt").glob("*.checkpoint")):
            assert child.poll() is None, "it ended before there was a checkpoint"
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    with pytest.raises(AdapterError, match="rate was"):
        run(options(model, text, resume=True), ReluRecipe(steps=12, batch=2, length=32))
    again = run(options(model, text, resume=True), RECIPE)
    assert contents(again) == contents(made)
    assert rows(again)[-1]["perplexity"] == rows(made)[-1]["perplexity"]
    with pytest.raises(OptionError, match="no checkpoint"):
        run(options(model, text, resume=True), RECIPE)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without processes")
def test_two_processes_train_one_model(
    made: Relufied, model: str, text: Path, own_home: Path
) -> None:
    """As torchrun starts them: of what one alone trains, to rounding; one of them writes and speaks."""
    said = together(*words_of(model, text), "-t", "1", "--json", OUTSIZE_HOME=str(own_home))
    assert not said[1][0]
    found, alone = json.loads(said[0][0]), rows(made)[-1]
    assert Path(found["pack"]).is_dir()
    assert found["perplexity"] == pytest.approx(alone["perplexity"], rel=0.02)
    assert found["fires"] == pytest.approx(alone["fires"], abs=0.02)
    assert not [*own_home.glob("adapt/*.checkpoint")]


def test_a_threshold(model: str, text: Path, tmp_path: Path) -> None:
    """FATReLU: fewer neurons fire, and the pack says above what."""
    recipe = ReluRecipe(steps=1, batch=1, length=32, threshold=0.5)
    found = run(options(model, text), recipe)
    assert found.pack.description.activation == "fatrelu:0.500000"
    given = {"predictor": "gate:exact", "order": "natural", "tokens": 900, "quiet": True}
    sparse = sparsity.run(SparsityOptions(str(found.pack.path), (text,), tmp_path / "f", **given))
    assert sparse.about.exact
    x = torch.tensor([-1.0, 0.4, 0.5, 0.6])
    assert activation_of("fatrelu:0.500000")(x).tolist() == pytest.approx([0, 0, 0, 0.6])
    for name in ("fatrelu:x", "fatrelu", "fatrelu:-1.0"):
        wrong = replace(found.pack.description, activation=name)
        assert "activation" in fault(wrong)


def test_neighbours_are_penalized_together() -> None:
    """A bundle's size is that of its neurons together; of single ones it is what they are. A bundle that is
    shut has a gradient of nothing, not of no number."""
    gate = torch.tensor([[[3.0, 4.0, -1.0, -2.0], [0.0, 1.0, -1.0, 2.0]]]).requires_grad_()
    up, size = torch.ones_like(gate), float(gate.detach().square().mean().sqrt())
    for bundle, norms in ((1, [3.0, 4.0, 1.0, 2.0]), (2, [5.0, 1.0, 2.0])):
        student = Student({}, "relu", bundle)
        student.inner(torch.cat([gate, up], dim=-1), None)  # type: ignore[arg-type]
        (opened,) = student.opened
        due = sum(norms) / (8 / bundle) / bundle**0.5 / size
        assert float(opened.detach()) == pytest.approx(due)
        assert float(student.fires[0]) == 4 / 8
        assert float(student.bundles[0]) == len(norms) * bundle / 8
        (grad,) = torch.autograd.grad(opened, gate)
        assert torch.isfinite(grad).all()


@pytest.mark.slow
def test_bundles_learn_to_shut(made: Relufied, model: str, text: Path) -> None:
    """Of the same steps, with a penalty on bundles of 4: fewer of them fire than with none."""
    found = [
        run(options(model, text), replace(RECIPE, steps=24, bundle=4, penalty=penalty)).figures
        for penalty in (0.0, 30.0)
    ]
    assert found[1]["bundles_fire"] < found[0]["bundles_fire"]
    assert found[1]["fires"] < found[0]["fires"]


def test_the_divergence_and_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    z, former, head = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((5, 8), (5, 8), (11, 8))
    )
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    loss = head_divergence(ours, former, head)
    new, old = (linear(x, head).log_softmax(-1) for x in (theirs, former))
    due = (old.exp() * (old - new)).sum(-1).mean()
    for some in (loss, due):
        some.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(float(due.detach()))
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_command(model: str, text: Path) -> None:
    given = ["--data", str(text), "--steps", "2", "--batch", "1", "--length", "32", "--json"]
    found = outsize_here("adapt", "relu", model, *given)
    assert found.returncode == 0, found.stderr
    said = json.loads(found.stdout)
    assert Path(said["pack"]).is_dir()
    assert said["perplexity"] > 1
    assert "--predictor gate:exact --order natural" in found.stderr


def test_what_cannot_be(
    made: Relufied, model: str, text: Path, folder_of: Callable[[str], Path]
) -> None:
    with pytest.raises(OptionError, match="has relu feed-forwards"):
        run(options(str(made.pack.path), text), RECIPE)
    with pytest.raises(UnsupportedError, match="gated"):
        run(options(str(folder_of("opt")), text), RECIPE)
    with pytest.raises(UnsupportedError, match="gated"):
        run(options(str(folder_of("olmoe")), text), RECIPE)
    with pytest.raises(BudgetError, match="smaller --batch"):
        run(options(model, text, memory="1MB"), RECIPE)
    with pytest.raises(OptionError, match="does not divide"):
        run(options(model, text), replace(RECIPE, bundle=7))
    with pytest.raises(OptionError, match="auto, cpu or cuda"):
        run(options(model, text, device="tpu"), RECIPE)
    wrong = {"threshold": -1.0}, {"match": -1.0}, {"penalty": 2000.0}, {"rate": 2.0}, {"bundle": 0}
    for more in wrong:
        with pytest.raises(OptionError):
            ReluRecipe(**more)
    with pytest.raises(OptionError, match="every"):
        options(model, text, every=0)


def test_no_sequence_is_longer_than_the_context(model: str) -> None:
    d = fetch.pack(model, quiet=True).description
    assert fitted(replace(RECIPE, length=d.context + 1), d).length == d.context
    assert fitted(RECIPE, d) == RECIPE


def test_a_forgotten_resume(model: str, text: Path, own_home: Path) -> None:
    """Begun anew, what has not ended would be lost."""
    path = own_home / "adapt" / f"{fetch.pack(model, quiet=True).path.name}.relu.checkpoint"
    path.parent.mkdir()
    with (
        alone(path),
        pytest.raises(OptionError, match="another process trains"),
    ):
        run(options(model, text), RECIPE)
    path.write_bytes(b"")
    with pytest.raises(OptionError, match="is of a run that has not ended; go on with --resume"):
        run(options(model, text), RECIPE)
