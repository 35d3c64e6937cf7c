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
from outsize.model.width import Nested, chosen
from outsize.pack import fetch, nested_file, store
from outsize.pack.format import Pack
from outsize.pack.lock import locked
from outsize.pack.outline import NestedFamily, Outline, of_pack
from outsize.plan import nested as planned
from outsize.plan.nested_cost import WORTH, drafting
from outsize.plan.place import least_bytes, place
from outsize.plan.placement import BY_ROUTER
from outsize.plan.scratch import lend
from outsize.serve.openai_common import account
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


def test_a_pack_whose_making_was_broken_off_is_not_the_one(
    made: nested.Made, model: str, text: Path
) -> None:
    """The newest with an add-on is; a width without routers would be nobody's choice."""
    other = run(options(model, text, importance="plain"), recipe(steps=1))
    other.path.unlink()
    with outsize.load(model, width=0.5, quiet=True, draft="none") as opened:
        assert opened.pack.path == made.pack.path
    store.remove(other.pack.path.parent, other.pack.path.name)


def test_what_is_scored_is_as_wide_as_the_model(made: nested.Made) -> None:
    """Of one that was opened at a width, and where a width is asked for."""
    path, words_ = str(made.pack.path), "The cat sat on the mat."
    with outsize.load(path, quiet=True, draft="none") as opened:
        whole = opened.score(words_)
        tokens = whole.tokens
        narrow = [
            x.token.logprob for part in opened.logprobs_by_chunk(tokens, 0, 0.5) for x in part
        ]
    assert narrow != whole.logprobs
    with outsize.load(path, quiet=True, draft="none", width=0.5) as opened:
        assert opened.score(words_).logprobs == narrow
        full = [x.token.logprob for part in opened.logprobs_by_chunk(tokens, 0, 1) for x in part]
    assert full == whole.logprobs


def test_a_conversation_keeps_what_it_knows_at_one_width(made: nested.Made) -> None:
    """However that is written; of another, nothing is used again."""
    reused = []
    with outsize.load(str(made.pack.path), quiet=True, draft="nested:0.4") as opened:
        talk = opened.conversation(max_tokens=4)
        for width in (0.5, "0.5", "full", 1.0, 0.5):
            talk.options = talk.options.with_changes({"width": width})
            list(talk.say("The cat"))
            reused.append(talk.reply.reused_tokens > 0)
    assert reused == [False, True, False, True, False]


def test_what_is_said_of_a_width(made: nested.Made, capsys: pytest.CaptureFixture[str]) -> None:
    """What it costs; nothing of `auto` where that is all of them."""
    for width, expected in (
        (0.5, "(0.50 of the feed-forwards) is lossy: perplexity"),
        ("auto", ""),
    ):
        outsize.load(str(made.pack.path), width=width, draft="none").close()
        said_ = [x for x in capsys.readouterr().err.splitlines() if "lossy" in x]
        assert len(said_) == bool(expected)
        assert expected in "".join(said_)


def test_a_server_says_what_a_width_costs(made: nested.Made) -> None:
    with outsize.load(str(made.pack.path), quiet=True, draft="none") as opened:
        replies = opened.generate(PROMPTS[:1], max_tokens=3, raw=True, width=0.5)
    told = account(replies)
    assert (told["lossy"], told["width"]) == (True, replies[0].width)
    assert str(told["width_cost"]).startswith("lossy: perplexity")


def test_one_process_at_a_time(model: str, text: Path) -> None:
    base = fetch.find(model)
    assert base is not None
    with (
        locked(checkpoint_of(base, 3).with_suffix(".lock")),
        pytest.raises(OptionError, match="another process makes nested experts"),
    ):
        run(options(model, text), recipe())


def test_refused_before_anything_is_computed(model: str, text: Path) -> None:
    with mock.patch.object(nested, "TrainableModel", side_effect=AssertionError):
        with pytest.raises(BudgetError, match="needs at least"):
            run(options(model, text, memory="60MB"), recipe())
        with pytest.raises(OptionError, match="tune_until is for --tune"):
            run(options(model, text, until=3), recipe(), TuneRecipe())


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
        ("perplexity", 0.0, "perplexity is 0"),
        ("share", 0.0, "do not rise"),
        ("threshold", -1.0, "do not rise"),
        ("agrees", 1e308, "out of range"),
        ("kl", -1.0, "out of range"),
        ("perplexity of a member", 0.5, "out of range"),
    ],
)
def test_damaged_add_ons(
    made: nested.Made, tmp_path: Path, field: str, value: Any, problem: str
) -> None:
    """A field of the file, or of the first member of its family."""
    with safe_open(made.path, "pt") as file:
        metadata = file.metadata()
    (key,) = metadata
    about = json.loads(metadata[key])
    name = field.split()[0]
    of = about if field in about else about["family"][0]
    of[name] = value
    path = tmp_path / "bad.safetensors"
    save_file(load_file(made.path), path, {key: json.dumps(about)})
    with pytest.raises(AdapterError, match=problem):
        nested_file.read(path, made.pack)


@pytest.mark.parametrize("use", [-1.0, 3e38])
def test_uses_that_are_no_shares(made: nested.Made, tmp_path: Path, use: float) -> None:
    """What a plan would add up, and divide by."""
    with safe_open(made.path, "pt") as file:
        metadata = file.metadata()
    tensors, path = load_file(made.path), tmp_path / "bad.safetensors"
    save_file(tensors | {"use": torch.full_like(tensors["use"], use)}, path, metadata)
    found = planned.NestedPlan(made.pack, nested_file.read(path, made.pack))
    with pytest.raises(AdapterError, match="not from 0 to 1"):
        planned.with_nested(of_pack(made.pack), found)


def test_what_a_file_names_cannot_write_on_a_terminal(made: nested.Made) -> None:
    assert "\x1b" not in replace(made.about, text="\x1b[31mred\n").cost(0.5)


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
    "widths",
    ["1/2,1/4,1", "1/4,1/2", "1/2,1/2,1", "0,1", "a,1", "", "1/0,1", "-1/2,1", "1/97,1", "1", "1/2,,1",
     "1e-9999999999,1", "0." + "3" * 20 + ",1"],
)  # fmt: skip
def test_widths_that_cannot_be(widths: str) -> None:
    with pytest.raises(OptionError, match="widths is"):
        NestedOptions("m", (), widths=widths)


def test_more_rank_than_a_token_has_numbers_is_refused(model: str, text: Path) -> None:
    with pytest.raises(OptionError, match=r"rank is 65, and .* has 64 numbers a token"):
        run(options(model, text), recipe(rank=65))


def test_a_damaged_add_on_is_made_again(made: nested.Made, model: str, text: Path) -> None:
    """As its refusal says."""
    whole = made.path.read_bytes()
    made.path.write_bytes(whole[:-1000])
    with pytest.raises(AdapterError):
        outsize.load(str(made.pack.path), quiet=True)
    again = run(options(model, text), recipe())
    before = load_file(again.path)
    made.path.write_bytes(whole)
    after = load_file(made.path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


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
    for width in ("full", "auto", "0", "nan"):
        with pytest.raises(OptionError, match="share of the feed-forwards below 1"):
            outsize.load(str(made.pack.path), draft=f"nested:{width}", quiet=True)
    with pytest.raises(OptionError, match="is a mixture of experts, of which no nested"):
        outsize.load(str(folder_of("olmoe")), width=0.5, quiet=True)
    with pytest.raises(UnsupportedError, match="already"):
        run(NestedOptions(str(made.pack.path), (made.path,)), recipe())


def test_a_width_is_one_process_s() -> None:
    shared = Nested(3, is_shared=True)
    assert shared.width("full") is None
    with pytest.raises(OptionError, match="which several ranks do not run"):
        shared.width(0.5)


@pytest.mark.slow
def test_ranks_run_no_width(made: nested.Made) -> None:
    """Others are told of none: they would compute all pieces, and routers are not there. All of them: the
    same bits."""
    path = str(made.pack.path)
    with outsize.load(path, ranks=2, parallel="relay", memory="1GB", quiet=True) as opened:
        how = {"max_tokens": 12, "raw": True, "ignore_eos": True, "logprobs": 2}
        replies = opened.generate(PROMPTS, **how)  # type: ignore[arg-type]
        for width in (0.5, "0.9"):
            with pytest.raises(OptionError, match="which several ranks do not run"):
                opened.generate("a", width=width)
    assert [r.logprobs for r in replies] == [r.logprobs for r in said(path, PROMPTS)]
    with pytest.raises(UnsupportedError, match="use --parallel relay"):
        outsize.load(path, ranks=2, memory="1GB", quiet=True)


@pytest.mark.parametrize("experts", ["lru,misses=drop:0.5", "misses=substitute", "routing=cached"])
def test_lossy_caches_are_refused(made: nested.Made, experts: str) -> None:
    """They would change nothing, or leave prefixes that no width has."""
    with pytest.raises(OptionError, match="of which there are no others"):
        outsize.load(str(made.pack.path), experts=experts, quiet=True)
    how = {"experts": experts, "defaults": ("experts",), "quiet": True}
    with outsize.load(str(made.pack.path), **how) as opened:  # type: ignore[arg-type]
        assert opened.placement.notes == ()


def test_plan_shows_the_family(made: nested.Made, tmp_path: Path) -> None:
    done = outsize_here("plan", str(made.pack.path), "--json", "-q")
    widths = json.loads(done.stdout)["widths"]
    assert [w["share"] for w in widths] == [*(m.share for m in made.about.family), 1.0]
    used = [w["used_bytes"] for w in widths]
    assert used == sorted(used)
    shown = outsize_here("plan", str(made.pack.path), "-q", "--html", str(tmp_path / "p.html"))
    rows = [line for line in shown.stdout.splitlines() if line.endswith("#")]
    assert [f"{m.share:.2f}" for m in made.about.family] == [
        r.split()[0] for r in rows[-len(widths) : -1]
    ]
    assert "--width auto is full here" in shown.stdout
    assert json.loads(done.stdout)["auto_width"] == 1.0
    assert "Widths of nested experts" in (tmp_path / "p.html").read_text()


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
    assert planned.settled("auto", outline, placed) == 1.0
    assert planned.settled(0.25, outline, placed) == 0.25


def foreseen(made: nested.Made) -> tuple[Outline, NestedFamily]:
    """The model as the planner sees it."""
    found = planned.NestedPlan(made.pack, nested_file.of_pack(made.pack))
    outline = planned.with_nested(of_pack(made.pack), found)
    assert outline.nested is not None
    return outline, outline.nested


@pytest.mark.parametrize(("times", "is_taken"), [(1.0, True), (1.09, True), (1.11, False)])
def test_auto_is_the_widest_that_memory_holds(
    made: nested.Made, times: float, is_taken: bool
) -> None:
    """If it loses little."""
    outline, family = foreseen(made)
    whole = family.rows[-1]
    narrow = replace(family.rows[0], perplexity=times * whole.perplexity)
    outline = replace(outline, nested=replace(family, rows=(narrow, whole)))
    placed = place(outline, 1 << 34, 0, 0, 64)
    missing = int((1 - narrow.share) * family.total)
    placed = replace(placed, groups=(("experts", BY_ROUTER, missing),))
    expected = narrow.share if is_taken else 1.0
    assert planned.settled("auto", outline, placed) == expected


@pytest.mark.parametrize(("agrees", "pays"), [(0.2, False), (0.47, False), (0.95, True)])
def test_auto_leaves_out_drafts_that_do_not_pay(
    made: nested.Made, agrees: float, pays: bool
) -> None:
    """All pieces stream, a third of them is drafted with, and so often the narrow width is right."""
    outline, family = foreseen(made)
    whole = family.rows[-1]
    narrow = replace(whole, share=0.43, agrees=agrees)
    outline = replace(outline, nested=replace(family, rows=(narrow, whole)))
    placed = place(outline, 1 << 34, 0, 0, 64)
    placed = replace(placed, groups=(("experts", BY_ROUTER, family.total),))
    assert (drafting(outline, placed).gain >= WORTH) is pays


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


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"importance": "plain"}, "order was"),
        pytest.param({"widths": "1/3,1"}, "widths was", marks=pytest.mark.slow),
        pytest.param({}, "", marks=pytest.mark.slow),
    ],
)
def test_tuning_goes_on_as_it_began(
    model: str, text: Path, own_home: Path, changes: dict[str, Any], problem: str
) -> None:
    """Of the same widths and the same order alone; and what does not tune leaves it there to go on from."""
    tuning = TuneRecipe(steps=6, rate=1e-3)
    first = run(options(model, text, until=2), recipe(steps=1, rank=0), tuning)
    base = fetch.find(model)
    assert base is not None
    path = checkpoint_of(base, 3)
    if not problem:
        run(options(model, text), recipe(steps=1, rank=0), TuneRecipe())
        assert path.is_file()
        again = run(options(model, text, resume=True), recipe(steps=1, rank=0), tuning)
        assert again.about.trained_tokens > first.about.trained_tokens
        assert not path.exists()
        return
    with pytest.raises(AdapterError, match=problem):
        run(options(model, text, resume=True, **changes), recipe(steps=1, rank=0), tuning)


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
