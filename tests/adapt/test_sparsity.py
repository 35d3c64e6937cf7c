"""`outsize adapt sparsity`: what it measures and writes, resumed to the bit, refused where it does not fit;
and what a user sees of paged neurons."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import outsize
from outsize.adapt.run import alone
from outsize.adapt.sparsity import reads, words
from outsize.adapt.sparsity import run as sparsity
from outsize.adapt.sparsity.run import SparsityOptions, run
from outsize.caching.replay.trace import read as read_trace
from outsize.engine import load as loading
from outsize.errors import (
    AdapterError,
    BudgetError,
    DataError,
    OptionError,
    PackError,
    UnsupportedError,
)
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.model.predictors import trained
from outsize.options import LoadOptions
from outsize.pack import fetch, neuron_file, store
from outsize.pack.kinds import neurons as kinds_of_neurons
from outsize.pack.neuron_file import KIND
from outsize.pack.outline import of_pack
from outsize.plan import decide, place
from outsize.plan import neurons as planned
from outsize.plan.make import make as make_plan
from outsize.plan.placement import BY_PROMPT, BY_ROUTER, MEMORY
from outsize.system import memory
from outsize.weights.neuron_spec import NeuronSpec, parse_neurons
from tests.command import outsize as outsize_here
from tests.golden import tiny


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
    folder = str(folder_of("llama"))
    fetch.pack(folder, quiet=True)
    return folder


@pytest.fixture(scope="module")
def made(model: str, text: Path, tmp_path_factory: pytest.TempPathFactory) -> sparsity.Made:
    output = tmp_path_factory.mktemp("made") / "some.safetensors"
    return run(options(model, text, output=output))


def options(model: str, text: Path, **more: Any) -> SparsityOptions:
    return SparsityOptions(model, (text,), quiet=True, tokens=1200, **more)


def test_what_is_written(made: sparsity.Made) -> None:
    about = made.about
    assert about.predictor == "svd"
    assert abs(about.fires - 0.5) < 0.1
    assert about.tokens > 100
    assert about.perplexity > 1
    assert about.cost.startswith("lossy: perplexity")
    assert len(made.table) == 1 + tiny.LAYERS + 3
    assert neuron_file.read(made.path, tiny.LAYERS).about == about


@pytest.mark.parametrize("predictor", ["svd:16", "trained:16", "gate:3", "gate:exact"])
@pytest.mark.parametrize("order", ["use", pytest.param("natural", marks=pytest.mark.slow)])
def test_predictors(
    model: str,
    text: Path,
    tmp_path: Path,
    predictor: str,
    order: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each writes a file that the engine runs, the same logits each time."""
    monkeypatch.setattr(trained, "STEPS", 50)
    some = options(model, text, output=tmp_path / "f", predictor=predictor, order=order, share=0.6)
    found = run(some)
    assert not found.about.exact
    rows = []
    for _ in range(2):
        with outsize.load(model, neurons=str(found.path), quiet=True, draft="none") as opened:
            kv = opened.transformer.new_kv()
            rows.append(full(opened.transformer, [Span(0, tiny.TOKENS[:9], 9)], [kv])[0].logits_KV)
    assert torch.equal(*rows)


def test_interrupted_and_resumed_is_the_same(
    made: sparsity.Made, model: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, fit = tmp_path / "again.safetensors", sparsity.fit
    count = iter(range(9))

    def broken(*given: Any) -> Any:
        if next(count) == 2:
            raise KeyboardInterrupt
        return fit(*given)

    monkeypatch.setattr(sparsity, "fit", broken)
    with pytest.raises(KeyboardInterrupt):
        run(options(model, text, output=output))
    monkeypatch.undo()
    with pytest.raises(AdapterError, match="share"):
        run(options(model, text, output=output, share=0.7, resume=True))
    with pytest.raises(OptionError, match="is of a run that has not ended; go on with --resume"):
        run(options(model, text, output=output))
    run(options(model, text, output=output, resume=True))
    one, two = load_file(made.path), load_file(output)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(OptionError, match="no checkpoint"):
        run(options(model, text, output=output, resume=True))


def test_chunks(
    model: str, text: Path, tmp_path: Path, made: sparsity.Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The price of a read is measured where none is given, kept, and what layers are fitted by, also by a run
    that goes on; at no price, the very file and logits of importance alone."""
    count, fit = iter(range(9)), sparsity.fit

    def broken(*given: Any) -> Any:
        if next(count) == 2:
            raise KeyboardInterrupt
        return fit(*given)

    monkeypatch.setattr(sparsity, "gap_of", lambda *_: 1.25)
    monkeypatch.setattr(sparsity, "fit", broken)
    given = {"output": tmp_path / "f", "choose": "chunks", "predictor": "svd:16"}
    with pytest.raises(KeyboardInterrupt):
        run(options(model, text, **given))
    monkeypatch.undo()
    monkeypatch.setattr(sparsity, "gap_of", lambda *_: 99.0)
    found = run(options(model, text, resume=True, **given))
    monkeypatch.undo()
    assert (found.about.choose, found.about.gap) == ("chunks", 1.25)
    file = neuron_file.read(found.path, tiny.LAYERS)
    assert bool((file.numbers(neuron_file.GAPS) > 0).all())
    assert 0 < found.about.runs < made.about.runs
    assert abs(found.about.fires - 0.5) < 0.1
    assert "bundles are chosen by chunks" in found.table[-3]
    pack = fetch.pack(model, quiet=True)
    for path, told, policy in (
        (found.path, "", "window"), (found.path, ",eviction=lru", "lru"), (made.path, "", "lfu"),
    ):  # fmt: skip
        paged = planned.search(LoadOptions(neurons=f"{path}{told}"), pack, "m")
        banks = planned.banks_of(paged)
        assert banks is not None
        assert banks[1] == policy
    free = run(options(model, text, output=tmp_path / "g", choose="chunks:0"))
    one, two = load_file(made.path), load_file(free.path)
    gaps = two.pop("gaps")
    assert not bool(gaps.any())
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    rows = []
    for path in (made.path, free.path, found.path):
        with outsize.load(model, neurons=str(path), quiet=True, draft="none") as opened:
            kv = opened.transformer.new_kv()
            rows.append(full(opened.transformer, [Span(0, tiny.TOKENS[:9], 9)], [kv])[0].logits_KV)
            assert ("in chunks" in opened.transformer.neurons) == (path != made.path)
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_the_price_of_a_read_is_measured(made: sparsity.Made) -> None:
    assert 0 <= made.about.gap <= reads.MOST
    assert 0 < made.about.runs <= made.about.count / 2


def test_a_file_of_before_chunks(made: sparsity.Made, model: str, tmp_path: Path) -> None:
    """It says nothing of choices and reads: by importance, and no read is priced."""
    path, about = tmp_path / "old.safetensors", dict(made.about.to_json())
    for name in ("choose", "gap", "runs"):
        del about[name]
    save_file(load_file(made.path), path, {"outsize": json.dumps(about)})
    found = neuron_file.read(path, tiny.LAYERS).about
    assert (found.choose, found.gap, found.runs) == ("importance", 0.0, 0.0)
    rows = []
    for each in (path, made.path):
        with outsize.load(model, neurons=str(each), quiet=True, draft="none") as opened:
            kv = opened.transformer.new_kv()
            rows.append(full(opened.transformer, [Span(0, tiny.TOKENS[:9], 9)], [kv])[0].logits_KV)
        said = make_plan(model, LoadOptions(neurons=str(each), quiet=True), None).cost.neuron_reads
        assert (said is None) == (each == path)
    assert torch.equal(*rows)


def in_groups(tensors: dict[str, torch.Tensor], endings: tuple[str, ...]) -> None:
    """Rows of these matrices fire or rest 32 at a time."""
    generator = torch.Generator().manual_seed(0)
    for name, w in tensors.items():
        if name.endswith(endings):
            common = torch.randn(tiny.FFN // 32, 1, tiny.WIDTH, generator=generator)
            own = torch.randn(tiny.FFN // 32, 32, tiny.WIDTH, generator=generator)
            tensors[name] = (common + 0.05 * own).flatten(0, 1).to(w.dtype)


def relu_folder(folder: Path, family: str) -> Path:
    """Models with ReLU whose neurons fire or rest 32 at a time: some of their bundles do."""
    key = {"falcon": "activation", "opt": "activation_function"}.get(family, "hidden_act")
    tiny.write_folder(folder, family)
    config = json.loads((folder / "config.json").read_text()) | {key: "relu"}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    in_groups(tensors, ("gate_proj.weight", "fc1.weight", "dense_h_to_4h.weight"))
    for name, w in tensors.items():
        if name.endswith(("fc1.bias", "gate_proj.bias")):
            tensors[name] = w - 0.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "family", [pytest.param("llama", marks=pytest.mark.slow), "llama+biases", "opt", "falcon"]
)
def test_a_relu_model_is_exact(family: str, text: Path, tmp_path: Path, home: Path) -> None:
    """Its gate, or where there is none its up, says which neurons are off: the dense model's logits, and
    fewer neurons."""
    folder = str(relu_folder(tmp_path / "relu", family))
    given = options(folder, text, output=tmp_path / "f", predictor="gate:exact", order="natural")
    found = run(given)
    assert found.about.exact
    assert found.about.missed == 0
    assert 0.2 < found.about.fires < 0.9
    rows, spans = [], [(0, 12), (12, 13), (13, 14)]
    for neurons in ("off", str(found.path)):
        with outsize.load(folder, neurons=neurons, quiet=True) as opened:
            kv, t = opened.transformer.new_kv(), opened.transformer
            some = [
                full(t, [Span(a, tiny.TOKENS[a:b], b - a)], [kv])[0].logits_KV for a, b in spans
            ]
            rows.append(torch.cat(some))
            (reply,) = opened.generate(["a b"], max_tokens=3)
            assert not reply.lossy
    assert torch.equal(*rows)
    packs = fetch.pack(folder, quiet=True).path.parent
    name = fetch.pack(folder, quiet=True).path.name
    assert list(packs.glob(f"{name}.neurons*"))
    store.remove(packs, name)
    assert not list(packs.glob(f"{name}*"))


def test_resident_mode(made: sparsity.Made, model: str) -> None:
    """All in memory: the dense model's answer, and it is said that it depends on that."""
    given = f"{made.path},mode=resident,eviction=window"
    assert parse_neurons(given) == NeuronSpec(str(made.path), "window", "resident")
    texts = []
    for neurons in ("off", given):
        with outsize.load(model, neurons=neurons, quiet=True, draft="none") as opened:
            (reply,) = opened.generate(["The cat"], max_tokens=6)
            texts.append(reply.text)
    assert texts[0] == texts[1]
    assert "and what is in memory" in str(reply.options["neurons"])


def test_what_a_reply_says(made: sparsity.Made, model: str) -> None:
    with outsize.load(model, neurons=str(made.path), quiet=True) as opened:
        (reply,) = opened.generate(["The cat"], max_tokens=4)
    assert reply.lossy
    assert "by svd, lossy: perplexity" in str(reply.options["neurons"])
    found = outsize_here("run", "-m", model, "-n", "3", "--neurons", str(made.path), "The cat")
    assert found.returncode == 0
    assert "lossy: perplexity" in found.stderr
    assert "neuron bundles:" in found.stderr
    found = outsize_here("plan", model, "--neurons", str(made.path), "--json")
    plan = json.loads(found.stdout)
    assert any(row["group"] == "neurons-0" for row in plan["placement"])
    assert "they do not pay" in plan["notes"][0]
    found = outsize_here("plan", model, "--neurons", str(made.path))
    assert "neurons-0 (" in found.stdout


def test_the_command(model: str, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "f.safetensors"
    given = ["--data", str(text), "--tokens", "1200", "-o", str(output), "--predictor", "gate:4"]
    found = outsize_here("adapt", "sparsity", model, *given, "--share", "0.9", "--order", "natural")
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == 1 + tiny.LAYERS + 3
    assert f"use it with --neurons {output}" in found.stderr
    found = outsize_here("adapt", "sparsity", model, *given, "--share", "2")
    assert found.returncode == 2
    assert "share is 2" in found.stderr


def test_auto_takes_the_file_beside_the_pack_where_it_pays(
    made: sparsity.Made, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = fetch.pack(model, quiet=True)
    beside = pack.path.with_name(pack.path.name + neuron_file.SUFFIX)
    beside.write_bytes(made.path.read_bytes())
    try:
        with outsize.load(model, neurons="auto", quiet=True) as opened:
            assert not opened.transformer.neurons  # all fits in memory
        monkeypatch.setattr(decide.neurons, "expected_bytes", lambda o, p: -1)
        with outsize.load(model, neurons="auto", quiet=True) as opened:
            assert opened.transformer.neurons
        with outsize.load(model, neurons="auto", draft=f"mtp:{beside}", quiet=True):
            raise AssertionError("a drafter that is none")
    except AdapterError:
        pass
    finally:
        beside.unlink()


def test_trace_and_replay(made: sparsity.Made, model: str, tmp_path: Path) -> None:
    prompts, output = tmp_path / "p.txt", tmp_path / "t.csv"
    prompts.write_text("The cat sat\nOn the mat\n")
    given = ["--prompts", str(prompts), "-o", str(output), "-n", "4", "--neurons", str(made.path)]
    found = outsize_here("trace", model, *given)
    assert found.returncode == 0, found.stderr
    trace = read_trace(output)
    assert trace.experts == made.about.count
    assert trace.events
    found = outsize_here(
        "bench", "cache", str(output), "--capacity", "50%", "--eviction", "window,lfu,belady"
    )
    assert found.returncode == 0, found.stderr
    assert "window" in found.stdout
    found = outsize_here("trace", model, *given[:6])
    assert "no neurons are paged" in found.stderr


@pytest.mark.parametrize(
    ("more", "error", "match"),
    [
        ({"share": 1.5}, OptionError, "share"),
        ({"share": 0.0}, OptionError, "nothing would be computed"),
        ({"predictor": "svd:9x"}, OptionError, "whole number"),
        ({"predictor": "gate:7"}, OptionError, "bits or exact"),
        ({"predictor": "sdv"}, UnsupportedError, "did you mean 'svd'"),
        ({"predictor": "choose"}, UnsupportedError, "known are gate, svd, trained"),
        ({"order": "random"}, OptionError, "known are use, natural"),
        ({"bundle": 7}, UnsupportedError, "do not divide"),
        ({"bundle": 0}, OptionError, "bundle"),
        ({"choose": "chunks:-2"}, OptionError, "choose is"),
    ],
)
def test_bad_options(
    model: str, text: Path, more: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        run(options(model, text, **more))


def test_places(
    model: str, text: Path, tmp_path: Path, made: sparsity.Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be written, or another process writes, is refused before anything is measured; and a file
    that is named as a word of --neurons is measured all the same."""
    with pytest.raises(OptionError, match="is a folder; name a file in it"):
        run(options(model, text, output=tmp_path))
    with pytest.raises(OptionError, match="is no folder that can be written, as f in it is to be"):
        run(options(model, text, output=tmp_path / "none" / "f"))
    with (
        alone(tmp_path / "f"),
        pytest.raises(OptionError, match="another process"),
    ):
        run(options(model, text, output=tmp_path / "f"))
    monkeypatch.chdir(tmp_path)
    about = run(options(model, text, output=Path("off"))).about
    assert (about.perplexity_before, about.perplexity) == (
        made.about.perplexity_before,
        made.about.perplexity,
    )
    assert about.perplexity != about.perplexity_before


def test_what_cannot_be(
    model: str, text: Path, folder_of: Callable[[str], Path], tmp_path: Path, made: sparsity.Made
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="0 tokens"):
        run(options(model, tmp_path / "empty.txt"))
    with pytest.raises(DataError, match="read more --tokens"):
        words.words(fetch.pack(model, quiet=True), (text,), 100)
    with pytest.raises(UnsupportedError, match="--experts"):
        run(options(str(folder_of("olmoe")), text))
    with pytest.raises(OptionError, match="mixture of experts"):
        outsize.load(str(folder_of("olmoe")), neurons=str(made.path), quiet=True)
    with pytest.raises(AdapterError, match="another pack"):
        outsize.load(str(folder_of("mistral")), neurons=str(made.path), quiet=True)
    with pytest.raises(AdapterError, match="another pack"):  # the same weights, packed otherwise
        outsize.load(model, encoding="int8", neurons=str(made.path), quiet=True)
    for bad, error in (
        ("", OptionError),
        ("x,eviction=belady", OptionError),
        ("off,eviction=lru", OptionError),
        ("off,mode=resident", OptionError),
        ("x,mode=window", OptionError),
        ("x,mode=resident,mode=predicted", OptionError),
    ):
        with pytest.raises(error):
            parse_neurons(bad)
    with pytest.raises(UnsupportedError, match="did you mean 'window'"):
        parse_neurons("x,eviction=windw")


def test_a_model_that_adds_otherwise(
    made: sparsity.Made, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """What is added to the stream is scaled there: whatever a file says, its neurons are not paged."""
    pack, path = fetch.pack(str(folder_of("granite")), quiet=True), tmp_path / "f"
    assert pack.description.residual_scale != 1
    whose = {"identity": pack.source.identity, "layout": pack.source.layout}
    save_file(load_file(made.path), path, {"outsize": json.dumps(made.about.to_json() | whose)})
    with pytest.raises(UnsupportedError, match="neurons are not paged"):
        planned.search(LoadOptions(neurons=str(path)), pack, "m")


def test_damaged_files(made: sparsity.Made, model: str, tmp_path: Path) -> None:
    """A file that lies about itself gives one of our errors."""
    about, tensors = made.about.to_json(), load_file(made.path)
    path = tmp_path / "bad.safetensors"

    def refused(match: str, wrong: dict[str, object], **changed: torch.Tensor) -> None:
        said = {"outsize": json.dumps({**about, **wrong})}
        save_file({**tensors, **changed}, path, said)
        with pytest.raises(AdapterError, match=match):
            outsize.load(model, neurons=str(path), quiet=True)

    refused("says nothing of neurons", {"kind": "mtp"})
    refused("another outsize", {"version": 99})
    refused("damaged", {"share": 2.0})
    refused("damaged", {"bundle": 0})
    refused("chooses by 'chance'", {"choose": "chance"})
    refused("of gaps", {"gap": -1.0})
    refused("of runs", {"runs": 1e9})
    chunks = {"choose": "chunks"}
    refused("'gaps' has shape", chunks)
    refused("less than nothing", chunks, gaps=torch.full((tiny.LAYERS,), -1.0))
    refused("not finite", chunks, gaps=torch.full((tiny.LAYERS,), torch.inf))
    refused(
        "damaged",
        {"matrices": {"0.a": {"encoding": "int8", "num_rows": -1, "width": 4, "offset": 0}}},
    )
    refused(
        "damaged",
        {"matrices": {"0.a": {"encoding": "zip", "num_rows": 1, "width": 4, "offset": 0}}},
    )
    refused("neurons a layer|is due", {"count": about["count"] + 1})  # type: ignore[operator]
    refused("not finite", {}, thresholds=torch.full((tiny.LAYERS,), torch.nan))
    refused("shape", {}, thresholds=torch.zeros(99))
    refused("does not fit", {"predictor": "gate:3"})
    refused("of order", {"order": "../x"})  # it names a folder
    refused("of predictors", {"predictor": "svd:\x1b[2J"})
    refused(
        "'thresholds' has shape",
        {"vectors": {**made.about.vectors, "thresholds": 1}},
        thresholds=torch.zeros(1),
    )
    refused("not in bytes", {}, **{"0.a.codes": tensors["0.a.codes"].float()})
    assert "\x1b" not in replace(made.about, text="a\x1b[2J").cost
    path.write_bytes(made.path.read_bytes()[:99])
    with pytest.raises(AdapterError):
        outsize.load(model, neurons=str(path), quiet=True)
    assert KIND == "neurons"


def test_exact_is_what_says_so_and_is(made: sparsity.Made, model: str, tmp_path: Path) -> None:
    """Not what a file claims of another predictor, or model; nor neurons whose down was re-encoded."""
    path, tensors = tmp_path / "f", load_file(made.path)
    save_file(tensors, path, {"outsize": json.dumps(made.about.to_json() | {"exact": True})})
    with pytest.raises(AdapterError, match="misses nothing"):
        outsize.load(model, neurons=str(path), quiet=True)
    assert made.about.order
    assert replace(made.about, exact=True).cost.startswith("lossy: perplexity")
    assert replace(made.about, exact=True, order="").cost == "exact"


def test_damaged_neurons(model: str, text: Path, tmp_path: Path) -> None:
    found = run(options(model, text, output=tmp_path / "f", order="natural"))
    pack = fetch.pack(model, quiet=True).path
    folder = pack.with_name(f"{pack.name}.neurons-32")
    records = folder / "neurons-0.records"
    whole = records.read_bytes()
    records.write_bytes(b"\x01" + whole[1:])
    with pytest.raises(PackError, match="does not match its checksum"):
        outsize.load(model, neurons=str(found.path), quiet=True)
    records.write_bytes(whole[:-4096])
    with pytest.raises(PackError, match="adapt sparsity"):
        outsize.load(model, neurons=str(found.path), quiet=True)
    records.write_bytes(whole)
    header = folder / "neurons.json"
    header.write_text(header.read_text().replace("neurons-0", "neurons-1"))
    with pytest.raises(PackError, match="checksum"):
        outsize.load(model, neurons=str(found.path), quiet=True)
    run(options(model, text, output=tmp_path / "f", order="natural"))  # makes them again
    outsize.load(model, neurons=str(found.path), quiet=True).close()


def test_in_the_least_memory(
    made: sparsity.Made, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan gives bundles few slots, feed-forwards are for prompts alone, and the answer is the same."""
    with outsize.load(model, neurons=str(made.path), quiet=True, draft="none") as opened:
        (expected,) = opened.generate(["The cat sat on"], max_tokens=12)
    monkeypatch.setattr(loading, "runtime_bytes", lambda *_: 0)
    monkeypatch.setattr(memory, "resident", lambda *_: 0)
    monkeypatch.setattr(place, "TOKENIZER_PEAK", 0)
    monkeypatch.setattr(place, "TOKENIZER_FACTOR", 0)
    monkeypatch.setattr(place, "IN_FLIGHT_LEAST", 1)  # else all of so small a model is read ahead
    monkeypatch.setattr(kinds_of_neurons, "LEAST", 2)
    pack = fetch.pack(model, quiet=True)
    given = LoadOptions(neurons=str(made.path))
    found = planned.search(given, pack, "tiny")
    assert found is not None
    outline = planned.with_neurons(of_pack(pack), found)
    least = place.least_bytes(outline, 0, 0, 256)
    little, more = (place.place(outline, size, 0, 0, 256) for size in (least, least + (1 << 20)))
    tiers = {group: tier for group, tier, _ in little.groups if tier not in (MEMORY, BY_ROUTER)}
    assert tiers["ffn-0"] == BY_PROMPT
    assert little.shares["neurons-0"].ring < len(outline.table("neurons-0").keys)
    assert planned.expected_bytes(outline, little) > planned.expected_bytes(outline, more)
    with outsize.load(
        model, memory=least, context=256, neurons=str(made.path), quiet=True, draft="none"
    ) as opened:
        (reply,) = opened.generate(["The cat sat on"], max_tokens=12)
        assert not opened.transformer.paged_layers[1].is_resident
    assert reply.text == expected.text
    assert reply.experts is not None
    assert reply.experts["misses"] > 0
    with pytest.raises(BudgetError):
        outsize.load(model, memory=least // 2, context=256, neurons=str(made.path), quiet=True)
