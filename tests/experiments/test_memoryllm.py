"""What the arms of MemoryLLM are judged by finds what it says; arms that were broken off go on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.memoryllm import arms
from experiments.memoryllm.probes import Probes, form, information, shared_information
from outsize.adapt.memory import task as tasks
from outsize.adapt.memory.text import Text

VOCAB = 20


def test_facts_and_copies() -> None:
    """1 2 3 always goes on with 4, and 9 with 8; a sequence that has shown it asks for no fact."""
    train = np.array([1, 2, 3, 4, 9, 8] * 12, np.int32)
    probes = Probes(train, VOCAB)
    rows = torch.tensor(
        [[7, 1, 2, 3, 4, 7, 3, 4, 9, 5, 9, 5], [1, 2, 3, 5, 9, 5, 9, 8, 9, 5, 1, 2]]
    )
    assert probes.facts(rows).nonzero().tolist() == [[0, 3]]
    # After 9 the text has 8, after 5 nothing, and these have shown others. 3 4 and 1 2 are shown, and usual.
    assert probes.copies(rows).nonzero().tolist() == [[0, 10], [1, 5], [1, 8]]


def test_what_labels_say_of_each_other() -> None:
    a = torch.arange(60) % 3
    assert information(a, a) == pytest.approx(math.log(3))
    assert information(a, torch.arange(60) // 30) == pytest.approx(0, abs=1e-12)
    assert shared_information(a, (a + 1) % 3) == pytest.approx(1)
    assert shared_information(a, torch.arange(60) // 30) == pytest.approx(0, abs=1e-12)


def test_forms() -> None:
    assert len({form(x) for x in (" the", " The", "the", " 12", "\n", " ,", " THE")}) == 7
    assert form(" walking") == form(" talking") != form(" walked")


def test_arms_go_on_where_they_were_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the row of an arm that was not; what has a row is not trained again."""
    monkeypatch.setitem(tasks.CONFIGS, "mini", (2, 64, 2, VOCAB))
    ids = torch.arange(4000, dtype=torch.int32) * 7 % VOCAB
    text = Text(ids, ids[:200], "{}")
    recipe = arms.recipe_of("memory", "mini", 1, steps=8, batch=2, length=16)
    want = arms.run("memory", recipe, text, tmp_path / "whole")
    train = arms.loop.train

    def broken_off(training: arms.loop.Training, path: Path, every: int, report: object) -> None:
        steps = training.task.recipe.steps // 2
        while training.step < steps:
            training.run_step()
            if training.step % every == 0:
                training.figures = training.task.evaluate()
                training.save(path)
                report(training)  # type: ignore[operator]
        raise KeyboardInterrupt

    monkeypatch.setattr(arms.loop, "train", broken_off)
    with pytest.raises(KeyboardInterrupt):
        arms.run("memory", recipe, text, tmp_path / "broken")
    monkeypatch.setattr(arms.loop, "train", train)
    found = arms.run("memory", recipe, text, tmp_path / "broken")
    assert (found["curve"], len(found["curve"])) == (want["curve"], arms.MARKS)
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "broken")]
    assert weights[0] == weights[1]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"arm": "base", "seed": 0}) + "\n")
    left = list(arms.missing(["base", "memory"], [0, 1], rows))
    assert left == [("memory", 0), ("base", 1), ("memory", 1)]
