"""Models whose feed-forwards read the token's embedding: trained from nothing, resumed to the bit, alone and
by two processes; run as they were trained; read out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import outsize
from outsize.adapt import loop
from outsize.adapt.memory import task as tasks
from outsize.adapt.memory.inspect import Reader, clusters, plane, token_ids
from outsize.adapt.memory.network import Shape, flex, forward, memory_norm, new_parameters
from outsize.adapt.memory.ranks import bases
from outsize.adapt.memory.task import MemoryRecipe, MemoryTask
from outsize.adapt.memory.train import MemoryOptions, config, train
from outsize.errors import DataError, OptionError, UnsupportedError
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.pack import fetch
from outsize.report.memory_page import page
from outsize.storage.records import Records
from tests.command import outsize as outsize_here
from tests.golden import memory_reference

SMALL = (2, 64, 2, 320)  # layers, width, heads, vocabulary
ENVIRONMENT = "import outsize.adapt.memory.task as t; t.CONFIGS['tiny'] = (2, 64, 2, 320); "
COMMAND = ENVIRONMENT + "from outsize.cli.main import main; main()"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tasks.CONFIGS, "tiny", SMALL)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(
        "\n".join(f"line {i} of {i * i % 97} words, and {i % 7} more" for i in range(900))
    )
    return path


RECIPE = {"steps": 6, "batch": 4, "length": 24, "rate": 5e-3}


def flags(text: Path, folder: Path, *more: str) -> list[str]:
    told = [f"--{name}={value}" for name, value in RECIPE.items()]
    return [
        "adapt",
        "memory",
        "--config",
        "tiny",
        "--data",
        str(text),
        "-o",
        str(folder),
        *told,
        "-q",
        *more,
    ]


def trained(text: Path, folder: Path, **more: object) -> dict[str, torch.Tensor]:
    recipe = MemoryRecipe(**{**RECIPE, **more})  # type: ignore[arg-type]
    train(MemoryOptions((text,), folder, every=2, device="cpu", quiet=True), recipe)
    return load_file(folder / "model.safetensors")


def test_it_learns_and_runs_as_it_was_trained(text: Path, tmp_path: Path) -> None:
    """The folder is a checkpoint: what outsize computes of it is what plain torch does."""
    for beta in (0, 3):
        folder = tmp_path / f"flex{beta}"
        recipe = MemoryRecipe(**{**RECIPE, "flex": beta})  # type: ignore[arg-type]
        options = MemoryOptions((text,), folder, every=2, device="cpu", quiet=True)
        training = train(options, recipe)
        assert training.figures["held_out_loss"] < np.log(SMALL[3]) - 0.5
        assert not options.checkpoint.exists()
        with pytest.raises(OptionError, match="has a model already"):
            train(options, recipe)
        want = memory_reference.logits(folder, list(range(3, 40)))
        with outsize.load(str(folder), encoding="fp32", quiet=True) as model:
            kv = model.transformer.new_kv()
            (out,) = full(model.transformer, [Span(0, list(range(3, 40)), 37)], [kv])
            torch.testing.assert_close(out.logits_KV, want, atol=1e-4, rtol=1e-4)
            assert (
                model.generate("line 3", max_tokens=4, raw=True, ignore_eos=True)[0].new_tokens == 4
            )


def test_the_network_is_the_plain_one(tmp_path: Path) -> None:
    """As trained, in all arms of MemoryLLM."""
    from safetensors.torch import save_file

    for shape in (flex(2, 64, 2, 320, 0), flex(2, 64, 2, 320, 2)):
        parameters = new_parameters(shape, 1)
        save_file(parameters, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config(shape, 24)))
        ids = torch.arange(5, 60)
        ours = forward(parameters, shape, ids[None])[0] @ parameters["model.embed_tokens.weight"].T
        theirs = memory_reference.logits(tmp_path, ids.tolist())
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_shapes_have_equal_totals() -> None:
    base = Shape(6, 256, 4, 4096, 672, is_base=True)
    for beta in range(4):
        made = flex(6, 256, 4, 4096, beta)
        assert abs(made.non_embedding / base.non_embedding - 1) < 0.03
        assert made.active == 6 * (4 * 256**2 + 3 * 256 * made.dense)
        assert abs(made.dense * 3 - beta * 256) <= 96
        sizes = sum(np.prod(s) for n, s in made.tensors().items() if len(s) == 2)
        assert sizes == made.non_embedding + 4096 * 256


def test_one_norm_for_all_layers(text: Path, tmp_path: Path) -> None:
    tensors = trained(text, tmp_path / "one", shared_norm=True)
    assert torch.equal(tensors[memory_norm(0)], tensors[memory_norm(1)])
    assert not torch.equal(tensors[memory_norm(0)], torch.ones(64, dtype=torch.bfloat16))


def test_the_base_is_a_llama(text: Path, tmp_path: Path) -> None:
    trained(text, tmp_path / "base", base=True, inner=96)
    with outsize.load(str(tmp_path / "base"), quiet=True) as model:
        assert model.pack.description.family == "llama"
        assert model.pack.description.ffn_width == 96


def test_all_arms_see_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.arange(1000) % 320
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(MemoryTask, "_loss", lambda self, ids, z: seen.append(ids))
    for more in ({}, {"flex": 1}, {"base": True}):
        recipe = MemoryRecipe(**{**RECIPE, **more})  # type: ignore[arg-type]
        task = MemoryTask(recipe, tokens, tokens, torch.device("cpu"), torch.float32)
        for step in range(3):
            task.loss(step, slice(0, None, 1))
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:6], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], seen[6:], strict=True))
    assert not torch.equal(seen[0], seen[1])


def test_resumed_after_a_kill_it_has_the_same_bits(text: Path, tmp_path: Path) -> None:
    want = trained(text, tmp_path / "whole")
    slow = ENVIRONMENT + (
        "import time; from outsize.adapt import loop; run = loop.Training.run_step\n"
        "def step(self):\n"
        "    time.sleep(60 * (self.step == 3)); run(self)\n"
        "loop.Training.run_step = step\n"
        "from outsize.cli.main import main; main()"
    )
    folder = tmp_path / "killed"
    words = [sys.executable, "-c", slow, *flags(text, folder, "--every", "2", "--device", "cpu")]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(words, env=env, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if (folder / "training.checkpoint").exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "training.checkpoint").exists()
    assert not (folder / "model.safetensors").exists()
    with pytest.raises(OptionError, match="has not ended; go on with --resume"):  # nothing is lost
        trained(text, folder)
    done = outsize_here(*flags(text, folder, "--every", "2", "--device", "cpu", "--resume"))
    assert done.returncode == 0, done.stderr
    found = load_file(folder / "model.safetensors")
    assert found.keys() == want.keys()
    assert all(torch.equal(found[k], want[k]) for k in want)
    other = outsize_here(*flags(text, folder, "--resume"))
    assert "there is no checkpoint" in other.stderr


def test_an_interrupt_in_a_step_waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the change of weights and its count: a whole step is saved, and goes on to the same bits."""
    tokens, path = torch.arange(1000) * 7 % 320, tmp_path / "c"
    recipe = MemoryRecipe(**RECIPE)  # type: ignore[arg-type]

    def new() -> MemoryTask:
        return MemoryTask(recipe, tokens, tokens, torch.device("cpu"), torch.float32)

    whole, broken = loop.start(new(), ""), loop.start(new(), "")
    loop.train(whole, tmp_path / "whole", 100, lambda _: None)
    change = broken.optimizer.step

    def interrupted() -> None:
        change()
        if broken.step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(broken.optimizer, "step", interrupted)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.train(broken, path, 100, lambda _: None)
    finally:
        signal.signal(signal.SIGINT, before)
    again = loop.resume(new(), path, "")
    assert again.step == 3
    loop.train(again, path, 100, lambda _: None)
    for name, want in whole.task.parameters.items():
        assert torch.equal(again.task.parameters[name], want)


@pytest.mark.slow
def test_two_processes_train_as_one(text: Path, tmp_path: Path) -> None:
    one = trained(text, tmp_path / "one", steps=2)
    words = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617",
        "--no-python", sys.executable, "-c", COMMAND,
        *flags(text, tmp_path / "two", "--device", "cpu", "--steps=2"),
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    two = load_file(tmp_path / "two" / "model.safetensors")
    for name, tensor in one.items():
        a, b = two[name].float(), tensor.float()
        near = torch.isclose(a, b, atol=4e-3, rtol=2e-2)
        # Where a gradient is as small as its rounding, AdamW goes a whole step to either side.
        assert float(near.float().mean()) > 0.995
        assert float((a - b).abs().max()) < 2.1 * 2 * float(RECIPE["rate"])


def test_a_table_of_what_was_trained(text: Path, tmp_path: Path) -> None:
    trained(text, tmp_path / "m", flex=1)
    done = outsize_here(
        "adapt",
        "memory",
        "--tables",
        str(tmp_path / "m"),
        "--bits",
        "8",
        "--data",
        str(text),
        "-q",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["table_bytes"] >= made["row_bytes"]
    with outsize.load(made["path"], quiet=True) as model:
        assert model.generate("line", max_tokens=3, raw=True, ignore_eos=True)[0].new_tokens == 3
    again = outsize_here(
        "adapt", "memory", "--tables", str(tmp_path / "m"), "--bits", "8", "--data", str(text), "-q"
    )
    assert "made before" in again.stdout


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "give --tables MODEL"),
        (["--config", "tiny", "--tables", "x"], "give --tables MODEL"),
        (["--config", "tiny", "--data", "x", "-o", "y", "--rank", ".5"], "--rank is of --tables"),
        (["--tables", "x", "--steps", "3"], "--steps is of --config"),
        (["--config", "tiny", "--data", "x"], "-o names no folder"),
        (["--config", "tiny", "-o", "y"], "data names no text"),
        (["--config", "huge", "--data", "x", "-o", "y"], "known are mini, tiny, small"),
        (["--config", "tiny", "--data", "x", "-o", "y", "--flex", "4"], "flex is 4"),
        (["--config", "tiny", "--data", "x", "-o", "y", "--length", "1"], "length is 1"),
        (["--tables", "x", "--bits", "7"], "bits is 7"),
        (["--tables", "x", "--rank", "1.5"], "rank is 1.5"),
    ],
)
def test_what_cannot_be_is_one_sentence(words: list[str], match: str) -> None:
    done = outsize_here("adapt", "memory", *words, "-q")
    assert done.returncode != 0
    assert match in done.stderr
    assert "Traceback" not in done.stderr


def test_data_that_are_too_short(tmp_path: Path) -> None:
    few, short = tmp_path / "few.txt", tmp_path / "short.txt"
    few.write_text("aaa " * 100)
    with pytest.raises(DataError, match="and 320 are due; give more text"):
        trained(few, tmp_path / "few")
    short.write_text("".join(chr(33 + i * 7 % 90) + chr(33 + i * i % 90) for i in range(900)))
    with pytest.raises(DataError, match=r"tokens; .* are the least"):
        trained(short, tmp_path / "short", length=600)


def test_a_folder_that_cannot_be_one(text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "within"):
        with pytest.raises(OptionError, match=r"cannot be written: [A-Z].*; name another"):
            trained(text, folder)
    assert (tmp_path / "file").read_text() == "mine"


def test_ranks_go_where_they_count() -> None:
    """A layer whose values have few directions gives its numbers to the other."""
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(500, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    two = torch.randn(500, 64, generator=generator)
    moments = [x.T @ x for x in (one, two)]
    uniform = bases(moments, 0.5, 16, False)
    shared = bases(moments, 0.5, 16, True)
    assert [b.shape[1] for b in uniform] == [32, 32]
    assert [b.shape[1] for b in shared] == [16, 48]

    def lost(found: list[torch.Tensor]) -> float:
        return sum(
            float((x - x @ b @ b.T).norm() ** 2) for x, b in zip((one, two), found, strict=True)
        )

    assert lost(shared) < 0.7 * lost(uniform)
    for b in shared:
        torch.testing.assert_close(b.T @ b, torch.eye(b.shape[1]), atol=1e-5, rtol=0)


def test_reading_tokens_out(text: Path, tmp_path: Path) -> None:
    tensors = trained(text, tmp_path / "m")
    pack = fetch.pack(str(tmp_path / "m"), encoding="fp32", quiet=True)
    with Records(pack) as records:
        reader = Reader(pack, records)
        (token,) = token_ids(reader, ["line"])[:1]
        w = {k: v.float() for k, v in tensors.items()}
        x = torch.nn.functional.rms_norm(
            w["model.embed_tokens.weight"], (64,), w[memory_norm(1)], 1e-5
        )
        p = "model.layers.1.mlp."
        c = torch.nn.functional.silu(x @ w[f"{p}gate_proj.weight"].T) * (
            x @ w[f"{p}up_proj.weight"].T
        )
        torch.testing.assert_close(reader.coefficients(1, range(320)), c, atol=1e-5, rtol=1e-4)
        (key,) = reader.keys(1, token, 1, 3)
        size = c[token].abs() * w[f"{p}down_proj.weight"].norm(dim=0)
        assert key.key == int(size.argmax())
        memory = torch.cat([reader.values(i, range(320)) for i in range(2)], 1)
        cosine = torch.nn.functional.cosine_similarity(memory, memory[token][None])
        cosine[token] = -2
        near = reader.nearest(token, 3, lambda _: None)
        assert near[0][0] == reader.text(int(cosine.argmax()))
        assert near[0][1] == pytest.approx(float(cosine.max()), abs=1e-3)
        assert reader.text(0) == "<|endoftext|>"
        assert len({reader.text(i) for i in range(320)}) == 320  # bytes of letters, too
        with pytest.raises(OptionError, match="has no tokens"):
            token_ids(reader, [""])
    done = outsize_here(
        "inspect", str(tmp_path / "m"), "line", "--html", str(tmp_path / "v.html"), "-q"
    )
    assert done.returncode == 0, done.stderr
    assert "nearest:" in done.stdout
    assert "layer   1" in done.stdout
    html = (tmp_path / "v.html").read_text()
    assert html.count('"tokens"') == 1
    assert "http" not in html.replace("http-equiv", "")
    done = outsize_here("inspect", str(tmp_path / "m"), "-q")
    assert "no token is named" in done.stderr


def test_clusters_find_what_is_apart() -> None:
    generator = torch.Generator().manual_seed(1)
    centres = 20 * torch.randn(4, 8, generator=generator)
    points = centres.repeat_interleave(25, 0) + torch.randn(100, 8, generator=generator)
    labels = clusters(points, 4).view(4, 25)
    assert all(len(set(row.tolist())) == 1 for row in labels)
    assert len(set(labels[:, 0].tolist())) == 4
    assert torch.equal(plane(points).amin(0), torch.zeros(2))


def test_the_page_shows_strangers_texts_as_text() -> None:
    made = page("a<b", 1, ["</script><script>alert(1)</script>", "DATA"], [0, 1], [(0, 0), (1, 1)])
    assert made.count("</script>") == 2
    assert "a&lt;b" in made


def test_another_kind_of_model_cannot_be_read_out(folder_of: object) -> None:
    pack = fetch.pack(str(folder_of("llama")), quiet=True)  # type: ignore[operator]
    with Records(pack) as records, pytest.raises(UnsupportedError, match="is a llama model; keys"):
        Reader(pack, records)
