"""`outsize adapt nested`: what it cuts, trains, measures and writes, resumed to the bit, refused where it
does not fit; and what a user sees of widths."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
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
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import outsize
from outsize.adapt import loop
from outsize.adapt.nested import aims, refit
from outsize.adapt.nested import run as nested
from outsize.adapt.nested.order import SCORES
from outsize.adapt.nested.prefixes import labels
from outsize.adapt.nested.run import NestedOptions, run
from outsize.adapt.nested.task import NestedRecipe
from outsize.adapt.nested.tune import TuneRecipe
from outsize.adapt.nested.tuned import checkpoint_of
from outsize.adapt.sparsity import words
from outsize.engine.reply import Reply
from outsize.errors import AdapterError, BudgetError, OptionError, UnsupportedError
from outsize.model.width import chosen
from outsize.pack import fetch, nested_file, store
from outsize.pack.format import Pack
from outsize.pack.outline import of_pack
from outsize.plan import nested as planned
from outsize.plan.nested_cost import WORTH, drafting
from outsize.plan.place import least_bytes, place
from outsize.plan.placement import BY_ROUTER
from outsize.plan.scratch import lend
from outsize.weights.residency import Share
from tests.command import outsize as outsize_here
from tests.golden import tiny

WIDTHS, PROMPTS = "1/3,2/3,1", ["The cat sat", "A dog, and", "numbers"]
SHORT = """
from outsize.adapt.sparsity import words
from outsize.cli.main import main
words.LENGTH = 64
main()
"""


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


def test_a_forgotten_resume(model: str, text: Path, own_home: Path) -> None:
    """Of tuning or of routers: begun anew, what has not ended would be lost."""
    pack = fetch.find(model)
    assert pack is not None
    path = checkpoint_of(pack, 3)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    with pytest.raises(OptionError, match=f"{path} is of a run that has not ended; go on with"):
        run(options(model, text), recipe(), TuneRecipe(steps=1))
    with (
        mock.patch.object(loop.Training, "run_step", side_effect=SystemExit),
        pytest.raises(SystemExit),
    ):
        run(options(model, text), recipe())
    (cut,) = (p for p in (own_home / "packs").glob("*nested*") if p.is_dir())
    path = cut.with_name(f"{cut.name}.nested.safetensors.checkpoint")
    path.write_bytes(b"")
    with pytest.raises(OptionError, match=f"{path} is of a run that has not ended; go on with"):
        run(options(model, text), recipe())


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


@pytest.mark.parametrize("name", ["router", "bias", "use", "a"])
def test_add_ons_without_a_tensor(made: nested.Made, tmp_path: Path, name: str) -> None:
    """None is made up."""
    with safe_open(made.path, "pt") as file:
        metadata = file.metadata()
    tensors, path = load_file(made.path), tmp_path / "bad.safetensors"
    del tensors[name]
    save_file(tensors, path, metadata)
    with pytest.raises(AdapterError, match=f"tensor '{name}' has shape None"):
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


def test_what_is_lent_holds_layers_and_pieces(
    made: nested.Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the least memory norms are held all the same. Layers go first where all that stream fit, else
    pieces do; none where their policy is the user's."""
    outline = replace(of_pack(made.pack), pins_pieces=True)
    placed = place(outline, least_bytes(outline, 0, 0, 64), 0, 0, 64)
    assert placed.shares["ffn-0"].pinned == tuple(range(tiny.LAYERS))
    monkeypatch.setattr("outsize.plan.scratch.HUGE", 1)
    attn, piece = outline.table("attn-0").stride, outline.table("experts-0").stride
    shares = placed.shares | {"attn-0": Share((), 1), "experts-0": Share((), 6)}
    for size, pins, expected in (
        (2 * attn + piece, True, (2, 1)),
        (attn + 2 * piece, True, (max(0, attn + 2 * piece - 3 * piece) // attn, 3)),
        (attn + 2 * piece, False, (1, 0)),
        (0, True, (0, 0)),
    ):
        made_of = lend(replace(outline, pins_pieces=pins), shares, size)
        assert (made_of["attn-0"].lent, made_of["experts-0"].lent) == expected


def test_pieces_that_are_used_most_stay(made: nested.Made) -> None:
    found = planned.NestedPlan(made.pack, nested_file.of_pack(made.pack))
    ranked = planned.ranked(found, 0.5)
    assert sorted(ranked) == list(range(3 * tiny.LAYERS))
    assert {key % 3 for key in ranked[: tiny.LAYERS]} == {0}
    outline = planned.with_nested(of_pack(made.pack), found)
    placed = place(outline, 1 << 34, 0, 0, 64)
    assert planned.settled(LoadLike("auto"), outline, placed) == 1.0  # type: ignore[arg-type]
    assert planned.settled(LoadLike(0.25), outline, placed) == 0.25  # type: ignore[arg-type]


@pytest.mark.parametrize(("agrees", "pays"), [(0.2, False), (0.47, False), (0.95, True)])
def test_auto_leaves_out_drafts_that_do_not_pay(
    made: nested.Made, agrees: float, pays: bool
) -> None:
    """All pieces stream, a third of them is drafted with, and so often the narrow width is right."""
    found = planned.NestedPlan(made.pack, nested_file.of_pack(made.pack))
    outline = planned.with_nested(of_pack(made.pack), found)
    family = outline.nested
    assert family is not None
    whole = family.rows[-1]
    narrow = replace(whole, share=0.43, agrees=agrees)
    outline = replace(outline, nested=replace(family, rows=(narrow, whole)))
    placed = place(outline, 1 << 34, 0, 0, 64)
    placed = replace(placed, groups=(("experts", BY_ROUTER, family.total),))
    assert (drafting(outline, placed).gain >= WORTH) is pays


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


def records(pack: Pack) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in pack.path.glob("*.records")}


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["tuning", "routers"])
def test_killed_and_resumed_is_the_same(
    phase: str, tuned: nested.Made, model: str, text: Path, own_home: Path
) -> None:
    """A real SIGKILL, as soon as a checkpoint of each phase is there, in a home of its own: the same pack and
    the same add-on, bit for bit."""
    flags = {"--data": text, "--widths": WIDTHS, "--tokens": 1200, "--tune": 6, "--tune-rate": 1e-3,
             "--steps": 6, "--every": 2, "--threads": torch.get_num_threads()}  # fmt: skip
    given = [str(word) for pair in flags.items() for word in pair]
    command = [sys.executable, "-c", SHORT, "adapt", "nested", model, *given, "-q"]
    env = {**os.environ, "OUTSIZE_HOME": str(own_home)}
    where = "adapt/*.checkpoint" if phase == "tuning" else "packs/*.nested.safetensors.checkpoint"
    child = subprocess.Popen(command, env=env)
    try:
        while not list(own_home.glob(where)):
            assert child.poll() is None, "it ended before there was a checkpoint"
            time.sleep(0.005)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL
    with pytest.raises(AdapterError, match="rate was"):
        run(options(model, text, every=2, resume=True), recipe(rank=0), TuneRecipe(steps=6))
    tuning = TuneRecipe(steps=6, rate=1e-3)
    again = run(options(model, text, every=2, resume=True), recipe(rank=0), tuning)
    assert records(again.pack) == records(tuned.pack)
    before, after = load_file(tuned.path), load_file(again.path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not [*own_home.glob("*/*.checkpoint")]


@pytest.mark.parametrize("phase", ["draft", "width"])
def test_only_tuned_ones_are_no_exact_drafters(
    tuned: nested.Made, model: str, text: Path, own_home: Path, phase: str
) -> None:
    """Of the base's name: a width of them is what was asked for; a draft of them would be another model's."""
    run(options(model, text), recipe(steps=1, rank=0), TuneRecipe(steps=1))
    if phase == "width":
        assert said(model, PROMPTS[:1], width=None)
        with outsize.load(model, width=0.5, quiet=True, draft="none") as opened:
            assert opened.pack.quality is not None
        return
    with pytest.raises(OptionError, match="were tuned: all of them are another model"):
        outsize.load(model, draft="nested", quiet=True)


@pytest.mark.parametrize(
    ("made_of", "problem"),
    [({"steps": -1}, "steps is -1"), ({"rate": 2.0}, "rate is 2"), ({"share": 1.5}, "share is 1.5"),
     ({"match": -1.0}, "match is -1"), ({"steps": True}, "steps is True")],
)  # fmt: skip
def test_tuning_that_cannot_be(made_of: dict[str, Any], problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        TuneRecipe(**made_of)


def test_tuning_that_does_not_fit(model: str, text: Path) -> None:
    with pytest.raises(BudgetError, match="leave out --tune"):
        run(options(model, text, memory="60MB"), recipe(), TuneRecipe(steps=1))


def test_refitted_maps_are_the_least_squares() -> None:
    """Against the gradient of what is to be least, in double precision; and where hidden states are of few
    dimensions, narrow widths lose little."""
    g = torch.Generator().manual_seed(0)
    h_NF = torch.randn(300, 4, generator=g) @ torch.randn(4, 24, generator=g)
    h_NF = (h_NF + 0.1 * torch.randn(300, 24, generator=g)).double()
    down_DF, ends = torch.randn(6, 24, generator=g).double(), [8, 16, 24]
    found = refit.fit(h_NF.T @ h_NF, down_DF, ends).requires_grad_()
    y_ND = h_NF @ down_DF.T
    counts = [1.0, 1.0, refit.WHOLE]
    damp = refit.DAMP * float((h_NF.T @ h_NF).diagonal().mean()) * len(ends)
    loss = damp * (found - down_DF).square().sum()
    for end, count in zip(ends, counts, strict=True):
        loss = loss + count * (h_NF[:, :end] @ found[:, :end].T - y_ND).square().sum()
    (grad,) = torch.autograd.grad(loss, found)
    assert float(grad.norm()) < 1e-6 * float(loss.detach())
    found = found.detach()
    errors = [
        float((h_NF[:, :8] @ w[:, :8].T - y_ND).norm() / y_ND.norm()) for w in (found, down_DF)
    ]
    assert errors[0] < 0.5 * errors[1]


def test_levels_and_thresholds_execute_their_share() -> None:
    g, shares = torch.Generator().manual_seed(0), torch.tensor([0.25, 0.5, 0.75, 1.0])
    error = torch.rand(3, 500, 3, generator=g)
    z = torch.randn(3, 500, 4, generator=g)
    for share in (0.4, 0.6, 0.9):
        level, threshold = aims.level_at(error, share, shares), aims.threshold_at(z, share, shares)
        assert float(shares[labels(error, level)].mean()) == pytest.approx(share, abs=2e-3)
        assert float(shares[chosen(z, threshold)].mean()) == pytest.approx(share, abs=2e-3)
