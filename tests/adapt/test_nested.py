"""`outsize adapt nested`: what it cuts, trains, measures and writes, resumed to the bit, refused where it
does not fit; and what a user sees of widths."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import outsize
from outsize.adapt import loop
from outsize.adapt.nested import run as nested
from outsize.adapt.nested.order import SCORES
from outsize.adapt.nested.prefixes import labels
from outsize.adapt.nested.run import NestedOptions, run
from outsize.adapt.nested.task import NestedRecipe
from outsize.adapt.nested.tune import TuneRecipe
from outsize.adapt.sparsity import words
from outsize.engine.reply import Reply
from outsize.errors import AdapterError, OptionError, UnsupportedError
from outsize.pack import fetch, nested_file, store
from outsize.pack.outline import of_pack
from outsize.plan import nested as planned
from outsize.plan.place import place
from tests.command import outsize as outsize_here
from tests.golden import tiny

WIDTHS, PROMPTS = "1/3,2/3,1", ["The cat sat", "A dog, and", "numbers"]


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """Texts of less than real models need."""
    with mock.patch.multiple(words, LENGTH=64):
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "some.txt"
    said = (f"The cat sat on the mat, and number {i * i} was no dog at all." for i in range(60))
    path.write_text("\n".join(said))
    return path


@pytest.fixture(scope="module")
def model(folder_of: Callable[[str], Path], home: Path) -> str:
    return str(fetch.pack(str(folder_of("llama")), encoding="q4_1", quiet=True).path)


@pytest.fixture(scope="module")
def made(model: str, text: Path) -> nested.Made:
    return run(options(model, text), recipe())


def options(model: str, text: Path, **more: Any) -> NestedOptions:
    return NestedOptions(model, (text,), quiet=True, **{"tokens": 1200, "widths": WIDTHS} | more)


def recipe(**more: Any) -> NestedRecipe:
    return NestedRecipe(**{"steps": 6, "rank": 4} | more)


def said(model: str, prompts: list[str], **changes: Any) -> list[Reply]:
    how = {"max_tokens": 12, "raw": True, "ignore_eos": True, "logprobs": 2}
    load = {k: changes.pop(k) for k in ("draft", "memory", "context") if k in changes}
    load = {"draft": "none", "prefix_cache": "off", "quiet": True} | load
    with outsize.load(model, **load) as opened:
        return opened.generate(prompts, **how | changes)


def test_what_is_written(made: nested.Made) -> None:
    about = nested_file.of_pack(made.pack).about  # type: ignore[union-attr]
    assert about == made.about
    assert about.widths == (1, 2, 3)
    shares = [m.share for m in about.family]
    assert shares == sorted(shares)
    assert 1 / 3 - 1e-6 <= shares[0] < shares[-1] < 1
    assert about.perplexity > 1
    assert all(m.kl > 0 for m in about.family)
    assert about.trained_tokens == 6 * 2 * 64
    assert len(made.table) == 1 + len(shares) + 1
    assert made.table[-1].split()[0] == "full"


def test_the_whole_is_the_base_in_the_same_order(made: nested.Made) -> None:
    """With the add-on and without it, held and in the least memory: the same bits."""
    whole = said(str(made.pack.path), PROMPTS)
    full = said(str(made.pack.path), PROMPTS, width="full")
    with mock.patch.object(nested_file, "of_pack", return_value=None):
        base = said(str(made.pack.path), PROMPTS)
    for a, b, c in zip(whole, full, base, strict=True):
        assert a.logprobs == b.logprobs == c.logprobs
        assert (a.width, a.lossy) == (1.0, False)


def test_a_request_has_a_width_of_its_own(made: nested.Made) -> None:
    """Beside others of other widths: the same answer."""
    path = str(made.pack.path)
    alone = {w: said(path, PROMPTS, width=w) for w in ("full", 0.4, "0.7")}
    widths = [r.width for r in alone[0.4]]
    assert all(1 / 3 <= w < 1 for w in widths)
    assert all(r.lossy and "lossy: perplexity" in str(r.options["width_cost"]) for r in alone[0.4])
    assert [r.logprobs for r in alone[0.4]] != [r.logprobs for r in alone["full"]]
    opened = outsize.load(path, draft="none", quiet=True, width=0.4)
    with opened:
        how = {"max_tokens": 12, "raw": True, "ignore_eos": True, "logprobs": 2}
        got = [r.logprobs for r in opened.generate(PROMPTS, **how)]  # type: ignore[arg-type]
        full = [r.logprobs for r in opened.generate(PROMPTS, width="full", **how)]  # type: ignore[arg-type]
    assert got == [r.logprobs for r in alone[0.4]]
    assert full == [r.logprobs for r in alone["full"]]


@pytest.mark.parametrize("width", ["full", 0.7])
@pytest.mark.parametrize("draft", ["nested", "nested:0.4:k=3"])
def test_drafts_change_nothing(made: nested.Made, draft: str, width: str | float) -> None:
    """Not a token, not a logit's bit."""
    path = str(made.pack.path)
    plain = said(path, PROMPTS, width=width)
    drafted = said(path, PROMPTS, width=width, draft=draft)
    for a, b in zip(plain, drafted, strict=True):
        assert a.logprobs == b.logprobs
        assert a.text == b.text
    assert sum(r.drafted for r in drafted) > 0


def test_the_base_names_its_nested_pack(made: nested.Made, model: str) -> None:
    """`--width` on the model that it was cut from."""
    assert said(model, PROMPTS, width=None)[0].options["width_cost"] == ""
    with outsize.load(model, width=0.5, quiet=True, draft="none") as opened:
        assert opened.pack.path == made.pack.path


def test_resumed_to_the_bit(model: str, text: Path, made: nested.Made) -> None:
    """Broken off after a checkpoint, and gone on from there."""
    before = load_file(made.path)
    steps = loop.Training.run_step

    def dies(self: loop.Training) -> None:
        if self.step == 5:
            raise SystemExit
        steps(self)

    with (
        mock.patch.object(loop.Training, "run_step", dies),
        pytest.raises(SystemExit),
    ):
        run(options(model, text, every=2), recipe())
    found = run(options(model, text, every=2, resume=True), recipe())
    after = load_file(found.path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not found.path.with_name(found.path.name + ".checkpoint").exists()


@pytest.mark.parametrize("score", SCORES)
def test_orders(model: str, text: Path, score: str) -> None:
    """Each importance, by neurons or by blocks, gives a pack that runs; blocks keep all codes."""
    found = run(options(model, text, importance=score, blocks=True), recipe(steps=1, rank=0))
    assert found.about.rank == 0
    (reply,) = said(str(found.pack.path), ["The cat"], width=0.5)
    assert 1 / 3 <= reply.width < 1
    store.remove(found.pack.path.parent, found.pack.path.name)


def test_labels_by_loss(model: str, text: Path) -> None:
    found = run(options(model, text, importance="plain"), recipe(steps=2, labels="loss", rank=2))
    assert found.about.labels == "loss"
    store.remove(found.pack.path.parent, found.pack.path.name)
    assert not found.path.exists()


def test_labels_narrow_as_the_level_rises() -> None:
    error = torch.rand(200, 3, generator=torch.Generator().manual_seed(0))
    before = labels(error, 0.0)
    assert int(before.min()) == 3
    for level in (0.2, 0.5, 0.8, 1.0):
        now = labels(error, level)
        assert bool((now <= before).all())
        before = now
    assert int(before.max()) == 0


def test_an_add_on_of_another_order_is_refused(
    made: nested.Made, model: str, text: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    shutil.copy(made.path, kept)
    other = run(options(model, text, importance="plain"), recipe(steps=1))
    shutil.copy(other.path, made.path)
    with pytest.raises(AdapterError, match="another order of its neurons"):
        outsize.load(str(made.pack.path), quiet=True)
    store.remove(other.pack.path.parent, other.pack.path.name)
    shutil.copy(kept, made.path)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("widths", [1, 1, 3], "do not rise"),
        ("widths", [1, 2], "do not rise to 3"),
        ("count", 4, "not the pack's"),
        ("rank", 5000, "rank is 5,000"),
        ("family", [], "0 members"),
        ("seed", "x", "a whole number is due"),
        ("version", 9, "of this version"),
    ],
)
def test_damaged_add_ons(
    made: nested.Made, tmp_path: Path, field: str, value: Any, problem: str
) -> None:
    with safe_open(made.path, "pt") as file:
        metadata = file.metadata()
    (key,) = metadata
    about = json.loads(metadata[key]) | {field: value}
    path = tmp_path / "bad.safetensors"
    save_file(load_file(made.path), path, {key: json.dumps(about)})
    with pytest.raises(AdapterError, match=problem):
        nested_file.read(path, made.pack)


@pytest.mark.parametrize(
    "widths", ["1/2,1/4,1", "1/4,1/2", "1/2,1/2,1", "0,1", "a,1", "", "1/0,1", "-1/2,1", "1/97,1"]
)
def test_widths_that_cannot_be(widths: str) -> None:
    with pytest.raises(OptionError, match="widths is"):
        NestedOptions("m", (), widths=widths)


def test_what_has_none_is_refused(folder_of: Callable[[str], Path], made: nested.Made) -> None:
    with pytest.raises(OptionError, match="not cut into nested experts"):
        outsize.load(str(folder_of("qwen3")), width=0.5, quiet=True)
    with pytest.raises(OptionError, match="not cut into nested experts"):
        outsize.load(str(folder_of("qwen3")), draft="nested", quiet=True)
    with (
        outsize.load(str(folder_of("qwen3")), quiet=True) as opened,
        pytest.raises(OptionError, match="not cut into nested experts"),
    ):
        opened.generate("a", width=0.5)
    with pytest.raises(OptionError, match="share above 0"):
        outsize.load(str(made.pack.path), width="wide", quiet=True)
    with pytest.raises(OptionError, match="share of the feed-forwards below 1"):
        outsize.load(str(made.pack.path), draft="nested:full", quiet=True)
    with pytest.raises(UnsupportedError, match="already"):
        run(NestedOptions(str(made.pack.path), (made.path,)), recipe())


def test_plan_shows_the_family(made: nested.Made) -> None:
    done = outsize_here("plan", str(made.pack.path), "--json", "-q")
    widths = json.loads(done.stdout)["widths"]
    assert [w["share"] for w in widths] == [*(m.share for m in made.about.family), 1.0]
    used = [w["used_bytes"] for w in widths]
    assert used == sorted(used)
    shown = outsize_here("plan", str(made.pack.path), "-q").stdout
    assert "--width" in shown


def test_pieces_that_are_used_most_stay(made: nested.Made) -> None:
    found = planned.NestedPlan(made.pack, nested_file.of_pack(made.pack))
    ranked = planned.ranked(found, 0.5)
    assert sorted(ranked) == list(range(3 * tiny.LAYERS))
    assert {key % 3 for key in ranked[: tiny.LAYERS]} == {0}
    outline = planned.with_nested(of_pack(made.pack), found)
    placed = place(outline, 1 << 34, 0, 0, 64)
    assert planned.settled(LoadLike("auto"), outline, placed) == 1.0  # type: ignore[arg-type]
    assert planned.settled(LoadLike(0.25), outline, placed) == 0.25  # type: ignore[arg-type]


class LoadLike:
    """Options of which only the width is looked at."""

    def __init__(self, width: str | float) -> None:
        self.width = width


@pytest.fixture(scope="module")
def tuned(model: str, text: Path) -> nested.Made:
    return run(options(model, text), recipe(rank=0), TuneRecipe(steps=6, rate=1e-3))


def test_tuned_feed_forwards(tuned: nested.Made, model: str) -> None:
    """Another model, said so; the base itself stays reachable, and no exact draft is made of another."""
    pack = tuned.pack
    assert pack.quality is not None
    assert pack.quality.kl > 0
    assert pack.source.encoding == "nested3-tuned"
    assert tuned.about.trained_tokens == 2 * 6 * 64 + 6 * 64
    assert said(str(pack.path), PROMPTS, width=0.6)[0].lossy
    base = said(model, PROMPTS, width="full")
    assert [r.logprobs for r in base] == [r.logprobs for r in said(model, PROMPTS)]
