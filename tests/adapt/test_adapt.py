"""Training mask drafters: resumed to the bit, saved whatever happens, and honest about its data."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import outsize
from outsize.adapt import checkpoints, head_loss, loop, trainable, training_peak
from outsize.adapt.answers import answer
from outsize.adapt.examples import Example, Kept, TrainOptions, prepare
from outsize.adapt.mtp.losses import MtpRecipe, deltas, losses, ordinary, sample_batch
from outsize.adapt.mtp.simulate import Simulated, leading, simulate
from outsize.adapt.mtp.task import MtpTask, work
from outsize.adapt.processes import join
from outsize.adapt.run import run, session
from outsize.adapt.trainable import TrainableModel, matmul_type
from outsize.checkpoint.lora import raw
from outsize.engine.batch import Batch
from outsize.engine.model import Model
from outsize.errors import (
    AdapterError,
    BudgetError,
    DataError,
    DiskFullError,
    OptionError,
    UnsupportedError,
)
from outsize.progress import silent
from outsize.text.prompt_file import read
from tests.command import outsize as outsize_here
from tests.golden import tiny
from tests.processes import together

RECIPE = MtpRecipe(k=2, rank=2, steps=8, batch=2, anchors=4, length=80)
EXAMPLES = [Example([(7 * i * j + i) % 250 for j in range(30)], 6) for i in range(5)]


def twin_of(model: Model) -> TrainableModel:
    return TrainableModel(model.pack, torch.device("cpu"), torch.float32, silent)


def task_of(twin: TrainableModel, recipe: MtpRecipe = RECIPE) -> MtpTask:
    return MtpTask(recipe, twin, EXAMPLES)


def quiet(now: loop.Training) -> None:
    """Nobody looks."""


def test_a_resumed_training_gives_the_same_weights(
    open_tiny: Callable[..., Model], tmp_path: Path
) -> None:
    twin, path = twin_of(open_tiny("llama", "int8")), tmp_path / "c"
    whole = loop.start(task_of(twin), "base")
    loop.train(whole, tmp_path / "w", 100, quiet)
    part = loop.start(task_of(twin), "base")
    for _ in range(5):
        part.run_step()
    part.save(path)
    again = loop.resume(task_of(twin), path, "base")
    assert again.step == 5
    loop.train(again, path, 100, quiet)
    for name, value in whole.task.parameters.items():
        assert torch.equal(value, again.task.parameters[name]), name
    with pytest.raises(AdapterError, match="another model or recipe"):
        loop.resume(task_of(twin, MtpRecipe(k=2, rank=4)), path, "base")
    with pytest.raises(AdapterError, match="another model or recipe"):
        loop.resume(task_of(twin), path, "other")


def test_training_lowers_the_loss_and_leaves_the_base_alone(
    open_tiny: Callable[..., Model],
) -> None:
    """Gated additions never reach ordinary tokens; ordinary ones do."""
    twin = twin_of(open_tiny("llama", "int8"))
    recipe = MtpRecipe(k=2, rank=4, steps=60, batch=4, anchors=8, length=80, rate=5e-3)
    state = loop.start(task_of(twin, recipe), "base")
    batch = sample_batch(EXAMPLES, recipe, 0)
    with torch.no_grad():
        before = losses(twin, state.task.parameters, recipe, batch)
        base, _ = ordinary(twin, batch)
    for _ in range(60):
        state.run_step()
    with torch.no_grad():
        after = losses(twin, state.task.parameters, recipe, batch)
        assert torch.equal(base, ordinary(twin, batch)[0])
    assert after.base < 0.8 * before.base
    assert after.sampled < 0.8 * before.sampled
    found = simulate(twin, state.task.parameters, recipe.scale, EXAMPLES, 2)
    assert found.by_quadratic >= found.by_linear >= 1


def test_ordinary_lora_has_the_ordinary_loss(open_tiny: Callable[..., Model]) -> None:
    """The term is the plain cross-entropy of the tokens after the anchors; it has a gradient, and training
    with it keeps that loss where training without it does not."""
    twin = twin_of(open_tiny("llama", "int8"))
    recipe = MtpRecipe(k=2, rank=4, steps=40, batch=4, anchors=8, length=80, rate=5e-3, gated=False)
    spoken = replace(recipe, next_token=1.0)
    state = loop.start(task_of(twin, spoken), "base")
    with torch.no_grad():  # additions that add nothing have a gradient in one factor only
        for name, value in state.task.parameters.items():
            if name.endswith(".B"):
                value.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    batch = sample_batch(EXAMPLES, recipe, 0)
    found = losses(twin, state.task.parameters, spoken, batch)
    x, _ = ordinary(twin, batch, deltas(state.task.parameters, spoken.scale))
    plain = torch.stack([
        cross_entropy(twin.logits(x[b, at]), batch.tokens_BS[b, at + 1])
        for b in range(len(x)) for at in batch.anchor_BA[b].tolist() if at >= 0
    ]).mean()  # fmt: skip
    torch.testing.assert_close(found.ordinary, plain)
    found.ordinary.backward()  # type: ignore[no-untyped-call]
    grads = {
        n: float(p.grad.norm()) for n, p in state.task.parameters.items() if p.grad is not None
    }
    assert grads["0.q.A"] > 0
    assert grads["1.down.B"] > 0
    assert not {"masks", "sampler.first.weight"} & grads.keys()
    assert float(losses(twin, state.task.parameters, recipe, batch).ordinary) == 0
    ends = []
    for arm in (recipe, spoken):
        trained = loop.start(task_of(twin, arm), "base")
        for _ in range(40):
            trained.run_step()
        with torch.no_grad():
            ends.append(float(losses(twin, trained.task.parameters, spoken, batch).ordinary))
    assert ends[1] < 0.9 * ends[0]
    with pytest.raises(OptionError, match="never reach ordinary tokens"):
        replace(spoken, gated=True)


@pytest.mark.parametrize("chunk", [1, 4 * 50 * 3, 1 << 20])
def test_a_loss_in_chunks_is_the_plain_loss(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient, in fp64, however many rows a chunk has; and the head is left alone."""
    monkeypatch.setitem(head_loss.CHUNK_BYTES, "cpu", chunk)
    z, head = torch.randn(7, 6).double().requires_grad_(), torch.randn(50, 6).double()
    label = torch.randint(50, (7,))
    plain = 3 * cross_entropy(z @ head.T, label)
    plain.backward()
    expected, z.grad = z.grad, None
    ours = 3 * head_loss.head_loss(z, label, head)
    ours.backward()
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(z.grad, expected, rtol=1e-12, atol=1e-15)
    pull, z.grad = torch.randn(7).double(), None
    plain = (z @ head.T).log_softmax(-1)[torch.arange(7), label]
    (expected,) = torch.autograd.grad((plain * pull).sum(), z)
    each = head_loss.head_logs(z, label, head)
    torch.testing.assert_close(each, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(*torch.autograd.grad((each * pull).sum(), z), expected)
    with torch.no_grad():
        assert torch.equal(head_loss.head_logs(z, label, head), each)


def test_training_multiplies_in_bf16_where_that_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for sets, kind in ((["avx2", "avx512_bf16"], torch.bfloat16), (["avx2"], torch.float32)):
        monkeypatch.setattr(trainable, "instruction_sets", lambda sets=sets: sets)
        assert matmul_type(torch.device("cpu")) == kind
        assert matmul_type(torch.device("cuda")) == torch.bfloat16


def test_training_leaves_cudnns_attention_out(
    open_tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradients can be NaN where the loss is a number; the setting is the process's, and put back."""
    plain, seen = trainable.scaled_dot_product_attention, []

    def spy(*args: torch.Tensor, scale: float) -> torch.Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return plain(*args, scale=scale)

    monkeypatch.setattr(trainable, "scaled_dot_product_attention", spy)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    task_of(twin_of(open_tiny("llama", "int8"))).loss(0, slice(None)).backward()
    assert seen
    assert not any(seen)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_a_walk_counts_steps_as_decoding_takes_them() -> None:
    found = Simulated()
    found.add([2, 0, 1, 0, 0], k=2)
    # Quadratic: three tokens, one, one. Linear: all right, one, then a step without guesses.
    assert (found.tokens, found.quadratic, found.linear) == (5, 3, 3)
    example = Example([9, 9, 1, 2, 3, 4], 2)
    guesses = torch.tensor([[2, 3], [3, 9], [4, 0], [0, 0]])
    assert leading(example, guesses) == [2, 1, 1, 0]


@pytest.mark.parametrize("family", ["llama", "llama+biases"])
def test_own_answers_are_the_engines(family: str, open_tiny: Callable[..., Model]) -> None:
    """Prompts of unlike length together, padded, give what each gives alone in fp32."""
    model = open_tiny(family, "fp32")
    prompts = [tiny.TOKENS[:5], tiny.TOKENS[3:14], tiny.TOKENS[7:9]]
    made = answer(twin_of(model), prompts, 12, frozenset())
    for prompt, tokens in zip(prompts, made, strict=True):
        run = model.start(list(prompt), outsize.Options(max_tokens=12))
        run.seq.ends = frozenset()
        batch = Batch(model.scheduler)
        batch.add(run)
        while batch.step():
            pass
        assert run.seq.new_tokens == tokens


def test_kept_answers_survive_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    kept = Kept(path, {"base": "x"})
    kept.add([0, 1], [[1, 2], [3]])
    with path.open("a") as file:
        file.write("[2, [4, 5")
    assert Kept(path, {"base": "x"}).answers == {0: [1, 2], 1: [3]}
    assert Kept(path, {"base": "y"}).answers == {}

    kept = Kept(path, {"base": "x"})  # begun anew, and cut short again
    kept.add([0], [[7]])
    with path.open("a") as file:
        file.write("[1, [4")
    Kept(path, {"base": "x"}).add([1], [[8]])
    assert Kept(path, {"base": "x"}).answers == {0: [7], 1: [8]}
    path.write_text(path.read_text() + "[2\n")
    with pytest.raises(DataError, match=r"answers.jsonl is damaged"):
        Kept(path, {"base": "x"})


def test_other_prompts_have_other_answers(open_tiny: Callable[..., Model], tmp_path: Path) -> None:
    """As many, and of the same model: the answers of the first ones were taken."""
    model = open_tiny("llama", "int8")
    wish = wish_of(model, tmp_path)
    twin = twin_of(model)
    first = prepare(wish, RECIPE.length, model.pack, twin)
    (wish.data[0]).write_text("\n".join(f"tell me {i}" for i in range(9)))
    second = prepare(wish, RECIPE.length, model.pack, twin)
    fresh = prepare(
        replace(wish, output=tmp_path / "fresh.safetensors"), RECIPE.length, model.pack, twin
    )
    assert second == fresh != first
    longer = prepare(replace(wish, max_tokens=14), RECIPE.length, model.pack, twin)
    assert longer != second


def test_a_resumed_training_has_the_same_data(
    open_tiny: Callable[..., Model], tmp_path: Path
) -> None:
    twin, path = twin_of(open_tiny("llama", "int8")), tmp_path / "c"
    loop.start(task_of(twin), "base", "data").save(path)
    with pytest.raises(AdapterError, match="the prompts or answers differ"):
        loop.resume(task_of(twin), path, "base", "other")
    with pytest.raises(AdapterError, match="rank was 2, is 4"):
        loop.resume(task_of(twin, replace(RECIPE, rank=4)), path, "base", "data")


def test_what_is_no_number_is_not_kept(open_tiny: Callable[..., Model], tmp_path: Path) -> None:
    """The checkpoint before it stays."""
    state, path = loop.start(task_of(twin_of(open_tiny("llama", "int8"))), "base"), tmp_path / "c"
    state.save(path)
    first = next(iter(state.task.parameters.values()))
    state.step = 7
    with torch.no_grad():
        first[0] = torch.nan
    with pytest.raises(AdapterError, match="no finite numbers after step 7; train at a lower"):
        state.save(path)
    assert raw(path)[1]["step"] == 0


def test_checkpoints_of_something_else(open_tiny: Callable[..., Model], tmp_path: Path) -> None:
    twin, path = twin_of(open_tiny("llama", "int8")), tmp_path / "c"
    state = loop.start(task_of(twin), "base", "data")
    for changed, why in (
        ({"kind": "tables"}, "kind was 'tables', is"),
        ({"step": "some"}, "is not a checkpoint of this recipe .*remove it"),
    ):
        about = {**state.about(), **changed}
        checkpoints.save(path, dict(state.task.parameters), about)
        with pytest.raises(AdapterError, match=why):
            loop.resume(task_of(twin), path, "base", "data")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(AdapterError):
        loop.resume(task_of(twin), path, "base", "data")


def test_places(tmp_path: Path) -> None:
    """Before anything is read: a place that cannot be written, a forgotten --resume, and two trainings into
    one file are refused; and a lock does not stay."""
    good = TrainOptions("none", (), tmp_path / "a.safetensors", quiet=True)

    def opened(options: TrainOptions, *others: Path) -> None:
        with session(options, *others):
            pass

    with pytest.raises(OptionError, match="is a folder; name a file in it"):
        opened(replace(good, output=tmp_path))
    with pytest.raises(OptionError, match=r"is no folder that can be written, as b.safe"):
        opened(replace(good, output=tmp_path / "none" / "b.safetensors"))
    with (
        session(good),
        pytest.raises(OptionError, match=r"another process trains .*a.safetensors now"),
    ):
        opened(good)
    opened(good)
    assert not [*tmp_path.iterdir()]
    with pytest.raises(OptionError, match=r"there is no checkpoint .*leave out --resume"):
        opened(replace(good, resume=True), tmp_path / "earlier")
    for path in (good.checkpoint, tmp_path / "earlier"):
        path.write_bytes(b"")
        with pytest.raises(OptionError, match=f"{path} is of a run that has not ended; go on with"):
            opened(good, tmp_path / "earlier")
        opened(replace(good, resume=True), tmp_path / "earlier")
        path.unlink()


def test_answers_that_cannot_be_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    kept = Kept(path, {"base": "a"})
    path.unlink()
    path.mkdir()
    with pytest.raises(DiskFullError, match=r"could not be written .*answers that are there stay"):
        kept.add([0], [[1, 2]])
    other = tmp_path / "b.jsonl"
    other.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is damaged"):
        Kept(other, {"base": "a"})


def test_two_processes_train_one_drafter(open_tiny: Callable[..., Model], tmp_path: Path) -> None:
    """As torchrun starts them: prompts are shared out, each is answered once, one file is written."""
    model = open_tiny("llama", "int8")
    wish = wish_of(model, tmp_path)
    said = together(
        "adapt", "mtp", wish.model, "--data", str(wish.data[0]), "-o", str(wish.output), "--steps", "6",
        "--k", "2", "--rank", "2", "--batch", "3", "--anchors", "4", "-n", "12", "--at-once", "1", "-t",
        "1", "--device", "cpu",
    )  # fmt: skip
    assert ["wrote" in text for _, text in said] == [True, False]
    rows = [json.loads(line) for line in wish.answers.read_text().splitlines()[1:]]
    assert sorted(i for i, _ in rows) == list(range(9))
    alone = replace(wish, output=tmp_path / "alone.safetensors", at_once=1)
    kind = matmul_type(torch.device("cpu"))
    twin = TrainableModel(model.pack, torch.device("cpu"), kind, silent)
    prepare(alone, RECIPE.length, model.pack, twin)
    lines = alone.answers.read_text().splitlines()[1:]
    assert dict(map(json.loads, lines)) == dict(rows)
    assert raw(wish.output)[1]["step"] == 6


def test_a_full_disk_leaves_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.safetensors"
    checkpoints.save(path, {"a": torch.ones(3)}, {"step": 1})

    def full(*args: object) -> None:
        (tmp_path / "c.safetensors.part").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(DiskFullError, match="the disk is full; what was there before is kept"):
        checkpoints.save(path, {"a": torch.zeros(3)}, {"step": 2})
    assert raw(path)[1] == {"step": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.safetensors"]


def test_data_is_refused_with_its_line(tmp_path: Path) -> None:
    def wrote(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    good = wrote("a.jsonl", '{"prompt": "p", "answer": "a"}\n{"turns": ["t", "u"]}\n'
                 '{"messages": [{"role": "user", "content": "m"}]}\n')  # fmt: skip
    assert [line.prompt for line in read([good, wrote("b.txt", "one\n\ntwo\n")])] == [
        "p", "t", "m", "one", "two"
    ]  # fmt: skip
    for name, text, words in (
        ("c.jsonl", '{"prompt": "p"}\n{"prompt": \n', "line 2: not JSON"),
        ("d.jsonl", '{"prompt": "p"}\n[1]\n', "line 2: an object"),
        ("e.jsonl", '{"text": "p"}\n', "line 1: no text under prompt"),
        ("f.txt", "\n\n", "no prompts"),
    ):
        with pytest.raises(DataError, match=words):
            read([wrote(name, text)])
    with pytest.raises(DataError, match="cannot be read"):
        read([tmp_path / "nothing.txt"])


def wish_of(model: Model, folder: Path, **more: object) -> TrainOptions:
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(f"say {i} and {i * i}" for i in range(9)))
    told = {"max_tokens": 12, "at_once": 4, "quiet": True} | more
    return TrainOptions(str(model.pack.path), (prompts,), folder / "a.safetensors", **told)  # type: ignore[arg-type]


def train(options: TrainOptions, recipe: MtpRecipe = RECIPE) -> None:
    run(options, recipe, partial(MtpTask, recipe), partial(work, recipe, options))


def test_too_little_memory_is_refused_before_anything_is_made(
    open_tiny: Callable[..., Model], tmp_path: Path
) -> None:
    wish = wish_of(open_tiny("llama", "int8"), tmp_path, memory="100MB")
    with pytest.raises(BudgetError, match=r"MB of memory, and 100 MB may be used; give a larger"):
        train(wish)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_a_model_that_is_not_trained_on_is_named_before_its_memory(
    open_tiny: Callable[..., Model], tmp_path: Path
) -> None:
    wish = wish_of(open_tiny("mixtral", "int8"), tmp_path, memory="100MB")
    with pytest.raises(UnsupportedError, match="training knows dense models"):
        train(wish)


def test_processes_share_what_is_free_and_the_batch(
    open_tiny: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two on one machine each has half of what is free; but all of a --memory that was given."""
    pack = open_tiny("llama", "int8").pack
    wish = wish_of(open_tiny("llama", "int8"), tmp_path, own_answers=False)
    own = training_peak.Work(7, 2000, 2000, 10**6)
    each = replace(own, sequences=4)
    alone = training_peak.peak_bytes((pack,), each)
    assert alone < training_peak.peak_bytes((pack,), own)
    monkeypatch.setenv("WORLD_SIZE", "2")
    two = training_peak.peak_bytes((pack,), each)
    assert two >= alone + 4 * 10**6 - 2**20  # gradients, gathered to be averaged
    monkeypatch.setattr(training_peak.memory, "parse", lambda given: int(1.2 * two))
    training_peak.check((pack,), own, wish)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    training_peak.check((pack,), own, replace(wish, memory="1GB"))
    with pytest.raises(BudgetError, match="MB may be used"):
        training_peak.check((pack,), own, wish)


def test_own_answers_are_a_part_of_what_training_takes(
    open_tiny: Callable[..., Model], tmp_path: Path
) -> None:
    wish = wish_of(open_tiny("llama", "int8"), tmp_path, memory="300MB", at_once=4000)
    with pytest.raises(BudgetError, match="or a smaller --batch, --length or --at-once"):
        train(wish)


def test_the_whole_recipe_makes_a_drafter_that_loads(
    open_tiny: Callable[..., Model], tmp_path: Path
) -> None:
    model = open_tiny("llama", "int8")
    wish = wish_of(model, tmp_path)
    train(wish)
    assert not wish.checkpoint.exists()
    with outsize.load(str(model.pack.path), draft=f"mtp:{wish.output}", quiet=True) as drafted:
        (ours,) = drafted.generate("say 3", max_tokens=20)
    assert ours.text == model.generate("say 3", max_tokens=20)[0].text
    assert ours.drafted > 0
    with pytest.raises(OptionError, match="no checkpoint"):
        train(wish_of(model, tmp_path, resume=True))
    with pytest.raises(DataError, match="every prompt is longer"):
        train(wish_of(model, tmp_path), MtpRecipe(length=14))
    with pytest.raises(DataError, match="has no answer"):
        train(wish_of(model, tmp_path, own_answers=False))
    with pytest.raises(OptionError, match="auto, cpu or cuda"):
        join("tpu")


def test_experts_are_refused(open_tiny: Callable[..., Model]) -> None:
    with pytest.raises(UnsupportedError, match="knows dense models"):
        twin_of(open_tiny("olmoe", "bf16"))


def test_an_interrupt_saves(open_tiny: Callable[..., Model], tmp_path: Path) -> None:
    state = loop.start(task_of(twin_of(open_tiny("llama", "int8"))), "base")

    def stop(now: loop.Training) -> None:
        if now.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(state, tmp_path / "c", 100, stop)
    assert raw(tmp_path / "c")[1]["step"] == 3


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")
def test_a_killed_training_resumes_to_the_same_file(
    open_tiny: Callable[..., Model], tmp_path: Path
) -> None:
    """The command itself, killed after its first checkpoint."""
    model = open_tiny("llama", "int8")
    made = []
    for name, kill in (("whole", False), ("killed", True)):
        folder = tmp_path / name
        folder.mkdir()
        wish = wish_of(model, folder)
        words = [
            "adapt", "masks", wish.model, "--data", str(wish.data[0]), "-o", str(wish.output),
            "--steps", "40", "--k", "2", "--rank", "2", "--batch", "2", "--anchors", "4",
            "--every", "10", "-n", "12", "-q", "-t", "1",
        ]  # fmt: skip
        if kill:
            process = subprocess.Popen([sys.executable, "-m", "outsize.cli.main", *words])
            while not wish.checkpoint.is_file():
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
            if not wish.output.exists():
                assert outsize_here(*words, "--resume").returncode == 0
        else:
            assert outsize_here(*words).returncode == 0
        made.append(raw(wish.output))
    assert json.dumps(made[0][1]["recipe"]) == json.dumps(made[1][1]["recipe"])
    for name, value in made[0][0].items():
        assert torch.equal(value, made[1][0][name]), name
