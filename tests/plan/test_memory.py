"""`--memory`: sizes, the plan, the same answer at every budget, and what happened is what was planned."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import outsize
from outsize.bench import speculate
from outsize.bench.synthetic import shapes
from outsize.draft import spec
from outsize.engine import load as loading
from outsize.engine.batch import Batch
from outsize.engine.model import Model
from outsize.errors import BudgetError, ContextError, OptionError
from outsize.family.find import families
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.options import LoadOptions
from outsize.pack import fetch
from outsize.pack.outline import Outline, of_checkpoint, of_pack
from outsize.plan import decide, place
from outsize.plan import make as planning
from outsize.plan.drafts import with_drafting
from outsize.plan.placement import MEMORY, Placement
from outsize.plan.warmup import runtime_bytes
from outsize.report import plan_text
from outsize.report.plan_page import page
from outsize.system import memory as budget
from tests.command import outsize as command
from tests.golden import tiny

SOME = ("llama", "gemma3", "gpt_oss")  # one of each kind: plain, with windows, with experts


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if interpreter and libraries took no memory: a tiny model's budget is then all weights."""
    monkeypatch.setattr(loading, "runtime_bytes", lambda *_: 0)
    monkeypatch.setattr(planning, "runtime_bytes", lambda *_: 0)
    monkeypatch.setattr(budget, "resident", lambda *_: 0)
    monkeypatch.setattr(place, "TOKENIZER_PEAK", 0)
    monkeypatch.setattr(place, "TOKENIZER_FACTOR", 0)
    monkeypatch.setattr(place, "IN_FLIGHT", 1)
    monkeypatch.setattr(place, "IN_FLIGHT_LEAST", 1)


def outline_of(folder: Path) -> Outline:
    return of_pack(fetch.pack(str(folder), quiet=True))


def steps_down(outline: Outline, context: int, count: int) -> list[int]:
    """Budgets from everything to the least."""
    low = place.least_bytes(outline, 0, 0, context)
    high = low + 3 * outline.size + 1_000_000
    return [high - (high - low) * i // (count - 1) for i in range(count)]


def logits(model: Model) -> torch.Tensor:
    """Of a prompt in two spans, steps, and a batch of a long and a short span."""
    t, kv, rows = model.transformer, model.transformer.new_kv(), []
    at = 0
    for length in (20, 5, 1, 1):
        span = Span(at, tiny.TOKENS[at : at + length], length)
        rows.append(full(t, [span], [kv])[0].logits_KV)
        at += length
    both = [Span(0, tiny.TOKENS[:30], 2), Span(0, tiny.TOKENS[3:9], 3)]
    rows += [out.logits_KV for out in full(t, both, [t.new_kv(), t.new_kv()])]
    return torch.cat(rows)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("family", "encoding"),
    [
        pytest.param(f, e, marks=() if e == "auto" or f in SOME else pytest.mark.slow)
        for f in families()
        for e in ("bf16", "int4", "auto")
    ],
)
def test_the_same_bits_in_any_memory(
    family: str, encoding: str, folder_of: Callable[[str], Path]
) -> None:
    source = str(folder_of(family))
    with outsize.load(source, encoding=encoding, quiet=True) as model:
        wanted = logits(model)
    outline = of_pack(fetch.pack(source, encoding=encoding, quiet=True))
    shares = set()
    for size in steps_down(outline, 64, 60)[-3:]:
        how = {"memory": size, "context": 64, "encoding": encoding, "quiet": True}
        with outsize.load(source, **how) as model:  # type: ignore[arg-type]
            assert torch.equal(logits(model), wanted)
            shares.add(sum(b for _, tier, b in model.placement.groups if tier != MEMORY))
    # Of Gemma 4's three layers most have a table of their own, and its rows fit the fewest slots.
    assert max(shares) > (0.2 if family == "gemma4" else 0.5) * outline.size


@pytest.mark.usefixtures("bare")
def test_what_happened_is_what_was_planned(folder_of: Callable[[str], Path]) -> None:
    source = folder_of("qwen3")
    outline = outline_of(source)
    for size in steps_down(outline, 64, 60)[-2:]:
        with outsize.load(str(source), memory=size, context=64, quiet=True) as model:
            plan, t = model.placement, model.transformer
            for header in outline.tables[1:]:  # all but the embedding
                cache = next((c for c in t.loaded.caches if c.table.header == header), None)
                slots = 0 if cache is None else sum(v is not None for v in cache._views)
                assert slots <= len(plan.shares[header.name].pinned) + plan.shares[header.name].ring
            kv = t.new_kv()
            full(t, [Span(0, tiny.TOKENS[:20])], [kv])
            before = model.traffic.misses
            full(t, [Span(20, [1])], [kv])
            planned = sum(
                len(outline.table(n).keys) - len(s.pinned)
                for n, s in plan.shares.items()
                if n != "embed"
            )
            assert model.traffic.misses - before == planned


@pytest.mark.usefixtures("bare")
def test_a_prompt_reads_each_record_once(folder_of: Callable[[str], Path]) -> None:
    """However long, and however many prompts there are."""
    source = folder_of("qwen3")
    outline = outline_of(source)
    size = place.least_bytes(outline, 0, 0, 64)
    with outsize.load(str(source), memory=size, context=64, quiet=True) as model:
        t, misses = model.transformer, []
        for spans in ([20], [60], [60, 60, 3]):
            before = model.traffic.misses
            full(t, [Span(0, tiny.TOKENS[:1] * n) for n in spans], [t.new_kv() for _ in spans])
            misses.append(model.traffic.misses - before)
    assert misses == [misses[0]] * 3


@pytest.mark.usefixtures("bare")
def test_too_little(folder_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    source = str(folder_of("llama"))
    least = place.least_bytes(outline_of(folder_of("llama")), 0, 0, 64)
    with pytest.raises(BudgetError, match=r"needs at least \d+ MB for 64 tokens .*scratch.* got"):
        outsize.load(source, memory=least - 1, context=64)
    with outsize.load(source, memory=least // 2, context=64, force=True) as model:
        assert model.generate("hi", raw=True, max_tokens=3)[0].new_tokens >= 1
    assert "warning: forced: " in capsys.readouterr().err
    with pytest.raises(ContextError, match="holds from 2 to 512"):
        outsize.load(source, context=513)


@pytest.mark.usefixtures("bare")
def test_pressure_from_outside_shrinks(
    folder_of: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(budget, "WATCH_S", 0.0)
    with outsize.load(str(folder_of("qwen3")), quiet=True, context=64) as model:
        wanted = model.generate("a b c", raw=True, max_tokens=12)[0].text
        held = sum(part.is_resident for part in model.transformer.paged_layers)
        monkeypatch.setattr(budget, "shortage", lambda: 50_000)
        assert model.generate("a b c", raw=True, max_tokens=12)[0].text == wanted
        left = sum(part.is_resident for part in model.transformer.paged_layers)
        assert left < held
        assert model.given_up > 0
        assert model.traffic.misses > 0
    assert "of weights are read from disk from now on" in capsys.readouterr().err


@pytest.mark.usefixtures("bare")
def test_a_prompts_scratch_is_lent_between_prompts(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts and single tokens in turn: the same bits as with all in memory, and slots for tokens alone."""
    monkeypatch.setattr(place, "lent_bytes", lambda *_: 200_000)
    source, tokens = folder_of("qwen3"), tiny.TOKENS[:20]
    size = place.least_bytes(outline_of(source), 0, 0, 64)

    def run(memory: str | int) -> Iterator[torch.Tensor]:
        with outsize.load(str(source), memory=memory, context=64, quiet=True) as model:
            t = model.transformer
            lent = [c for c in t.loaded.caches if c.lends]
            assert bool(lent) == (memory == size)
            for turn in range(3):
                kv = t.new_kv()
                yield full(t, [Span(0, tokens)], [kv])[0].logits_KV
                assert not any(c._borrowed for c in lent)
                for at in range(20, 24):
                    yield full(t, [Span(at, [at])], [kv])[0].logits_KV
                    assert all(c._borrowed for c in lent) or turn == 2
                    if at == 21:  # a batch computes in more, and gets it back
                        two = [Span(0, [5]), Span(0, [6])]
                        full(t, two, [t.new_kv(), t.new_kv()])
                        assert not any(c._borrowed for c in lent)
                if turn == 1:
                    t.memory.shrink(1)  # what was lent goes first, and does not come back
                    assert not any(c._borrowed for c in lent)

    for ours, theirs in zip(run(size), run("auto"), strict=True):
        assert torch.equal(ours, theirs)


def test_lent_slots_fit_into_the_scratch() -> None:
    for family, size in (("llama", "0.5b"), ("llama", "7b")):
        outline = synthetic_outline(family, size)
        least = place.least_bytes(outline, 0, 0, 2048)
        made = place.place(outline, least + outline.size // 2, 0, 0, 2048)
        lent = sum(s.lent * outline.table(n).stride for n, s in made.shares.items())
        assert 0 < lent <= made.fixed["scratch"] / 1.8
        whole = place.place(outline, 100 * outline.size, 0, 0, 2048)
        assert not any(s.lent for s in whole.shares.values())


@pytest.mark.usefixtures("bare")
def test_a_batch_goes_in_waves_where_memory_is_short(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder_of("llama")
    size = place.least_bytes(outline_of(source), 0, 0, 64)
    prompts = [f"prompt {i}" for i in range(6)]
    with outsize.load(str(source), quiet=True) as model:
        wanted = [r.text for r in model.generate(prompts, raw=True, max_tokens=20)]
    with outsize.load(str(source), memory=size, context=64, quiet=True) as model:
        assert model.placement.kv_tokens < 6 * 28
        most, original = list[int](), Batch.step

        def counting(self: Batch) -> object:
            ran = original(self)
            most.append(self.stored)
            return ran

        monkeypatch.setattr(Batch, "step", counting)
        assert [r.text for r in model.generate(prompts, raw=True, max_tokens=20)] == wanted
        assert 28 < max(most) <= model.placement.kv_tokens


def test_a_model_leaves_nothing_behind(folder_of: Callable[[str], Path]) -> None:
    source = str(folder_of("llama"))
    outsize.load(source, quiet=True).close()
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        outsize.load(source, quiet=True).close()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files


MANY_LENGTHS = """
import sys, outsize
from outsize.system import memory as budget
sizes = []
with outsize.load(sys.argv[1], encoding="int8", quiet=True, draft="none") as m:
    for n in range(20, 240, 3):
        m.score_tokens([5] * n)
        budget.trim()
        sizes.append(budget.resident())
print(max(sizes[37:]) - max(sizes[:37]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="others do not say what a trimmed heap holds")
def test_prompts_of_many_lengths_take_no_more_memory(folder_of: Callable[[str], Path]) -> None:
    """A compiled product for each length was kept: 18 MB for 37 of them."""
    command = [sys.executable, "-c", MANY_LENGTHS, str(folder_of("llama"))]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 4_000_000


@pytest.mark.usefixtures("own_home")
def test_a_failed_load_leaves_nothing_behind(tmp_path: Path) -> None:
    made = fetch.pack(str(tiny.write_folder(tmp_path / "m", "qwen2")), quiet=True)
    path = made.path / "ffn-0.records"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.unlink()  # other packs share it
    path.write_bytes(data)
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(outsize.errors.PackError, match=r"record 0 at byte 0 of ffn-0\.records"):
        outsize.load(str(made.path), quiet=True)
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files


def test_sizes() -> None:
    assert budget.parse("900MB") == 900_000_000
    assert budget.parse("1.5GiB") == int(1.5 * (1 << 30))
    assert budget.parse(12345) == 12345
    assert budget.parse("50%") == int(budget.total() * 0.5)
    now = budget.free()
    assert 0.85 * now < budget.parse("auto") < now
    for bad in ("lots", "0", "0%", "101%", "-1GB", "x%", 0, -5):
        with pytest.raises(OptionError):
            budget.parse(bad)


def test_a_shortage_is_told_before_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "limits", lambda: [(500_000_000, 1_000_000), (1 << 40, 1 << 40)])
    assert budget.shortage() == 4_000_000


@settings(max_examples=60, deadline=None)
@given(
    # OPT is in no GGUF; of Gemma 4 a file's tensor says what rotates.
    family=st.sampled_from([f for f in families() if f not in ("opt", "gemma4")]),
    number=st.integers(0, 2),
    share=st.floats(0.0, 1.2),
    context=st.sampled_from([None, 64, 500]),
)
def test_placements_keep_their_budget(
    family: str, number: int, share: float, context: int | None
) -> None:
    """For any budget that is enough, what is planned is at most it; more memory never streams more."""
    mixed = family in tiny.MIXTURES
    sizes = ("tiny-moe", "7b-a1b", "30b-a3b") if mixed else ("tiny", "0.5b", "7b")
    outline = synthetic_outline(family, sizes[number])
    chosen = context or min(1024, outline.description.context)
    least = place.least_bytes(outline, 250_000_000, 10_000_000, chosen)
    at = int(least + share * outline.size)
    made = place.place(outline, at, 250_000_000, 10_000_000, context)
    assert made.planned <= at
    assert made.least <= at
    more = place.place(outline, at + outline.size // 10, 250_000_000, 10_000_000, made.context)
    assert more.streamed <= made.streamed
    for t in outline.tables:
        share_of = made.shares[t.name]
        assert len(set(share_of.pinned)) == len(share_of.pinned) <= len(t.keys)
        if t.kind == "experts":
            assert 0 < share_of.ring <= len(t.keys)
            continue
        needs = t.name != "embed" or outline.description.tied
        assert share_of.ring or len(share_of.pinned) == len(t.keys) or not needs


def test_half_residency_is_half(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The least budget in which a share of the weights is held; with drafts, theirs comes on top."""
    outline = synthetic_outline("llama", "0.5b")

    def foresee(
        model: str, load_options: LoadOptions, size: int, runtime: int
    ) -> tuple[Outline, Placement]:
        return outline, decide.decide(outline, load_options, 4_000_000_000, runtime, 9_000_000)

    monkeypatch.setattr(decide, "foresee", foresee)
    runtime = runtime_bytes(
        decide.compiled(LoadOptions())
    )  # differs by MB from one measurement to the next
    monkeypatch.setattr(speculate, "runtime_bytes", lambda _: runtime)
    wanted = speculate.SpeculateOptions(tmp_path, draft="none", held=0.5, context=1024)
    found = int(speculate.memory_for("m", wanted))
    drafted = int(speculate.memory_for("m", replace(wanted, draft="ngram")))
    drafts = with_drafting(spec.parse_draft("ngram"), outline)
    assert abs(drafted - found - drafts.drafting) < 2_000_000
    streamed = [
        place.place(outline, size, runtime, 9_000_000, 1024).streamed
        for size in (found + 2_000_000, found - 20_000_000)
    ]
    assert streamed[0] <= outline.size / 2 < streamed[1]


def test_shares_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    def wanted(**told: Any) -> speculate.SpeculateOptions:
        return speculate.SpeculateOptions(tmp_path, **told)

    for refused, words in (
        (wanted(each=True), "give --held below 1"),
        (wanted(each=True, memory="1GB"), "give --held below 1"),
        (wanted(held=0.5, memory="1GB"), "two budgets"),
        (wanted(held=0.0), "above 0 and up to 1"), (wanted(held=1.5), "above 0 and up to 1"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=words):
            refused.check()
        with pytest.raises(OptionError, match=words):
            speculate.show("m", refused, True)
    wanted(held=0.5, each=True).check()


def synthetic_outline(family: str, size: str) -> Outline:
    """From shapes alone: no such file is ever written."""
    from outsize.checkpoint.checkpoint import Checkpoint, Tensor, TokenizerSpec
    from outsize.checkpoint.ggml import BY_NAME

    made = shapes.recipe(family, shapes.SIZES[size])
    tensors = {}
    for name, shape, kind in shapes.tensors(made):
        block = BY_NAME[kind]
        nbytes = torch.Size(shape).numel() // block.length * block.size
        tensors[name] = Tensor(name, block, shape, Path("none"), 0, nbytes)
    architecture = shapes.ARCHITECTURES.get(family, family)
    keys = shapes.gguf_values(family, shapes.SIZES[size])
    spec = TokenizerSpec(json=tiny.tokenizer().to_str())
    checkpoint = Checkpoint("gguf", architecture, keys, tensors, spec, ())
    return of_checkpoint(checkpoint, f"{family}-{size}", "auto", True)


def test_the_plan_before_packing_is_the_plan_after(tmp_path: Path) -> None:
    source = str(tiny.write_folder(tmp_path / "m", "gemma3"))
    before = fetch.outline(source)
    assert not before.is_packed
    after = of_pack(fetch.pack(source, quiet=True))
    assert [(t.name, t.stride, t.keys) for t in before.tables] == [
        (t.name, t.stride, t.keys) for t in after.tables
    ]
    assert before.description == after.description


def test_plan_command(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    source, html = str(folder_of("llama")), tmp_path / "plan.html"
    done = command("plan", source, "--memory", "2GB", "--json", "--html", str(html))
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    for name in ("least_bytes", "tokens_per_s", "first_token_s", "placement", "fixed", "curve"):
        assert made[name], name
    assert made["planned_bytes"] <= 2_000_000_000
    text = html.read_text()
    assert text.startswith("<!doctype html>")
    assert "<script" not in text
    assert "http" not in re.sub(r"http://www.w3.org\S*", "", text)
    shown = command("plan", source, "--memory", "2GB").stdout
    assert "least that works" in shown
    assert "; `outsize doctor` measures it again" in shown
    refused = command("plan", source, "--memory", "20MB")
    assert refused.returncode == 2
    assert "needs at least" in refused.stderr


def test_a_plan_of_a_model_on_the_hub(tmp_path: Path) -> None:
    """Headers alone travel: of the weights, nothing."""
    folder = tiny.write_folder(tmp_path / "org" / "m", "qwen2")
    weights = folder / "model.safetensors"
    served: list[tuple[str, int]] = []

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

        def do_GET(self) -> None:
            name = self.path.split("?")[0].rsplit("/", 1)[-1]
            if self.path.startswith("/api/models/org/m"):
                files = [{"rfilename": p.name, "size": p.stat().st_size} for p in folder.iterdir()]
                body = json.dumps({"id": "org/m", "siblings": files}).encode()
                self.send_response(200)
            else:
                whole = (folder / name).read_bytes()
                first, last = re.findall(r"\d+", self.headers["Range"])
                body = whole[int(first) : int(last) + 1]
                served.append((name, len(body)))
                self.send_response(206)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(  # the hub's library reads its environment once
            [sys.executable, "-m", "outsize.cli.main", "plan", "hf:org/m", "--memory", "4GB", "--json"],
            capture_output=True, text=True, env=os.environ | endpoint, timeout=200,
        )  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["placement"]
    assert sum(size for name, size in served if name == weights.name) < 0.2 * weights.stat().st_size


def test_reports(folder_of: Callable[[str], Path]) -> None:
    made = planning.make(str(folder_of("llama")), LoadOptions(memory="2GB", quiet=True), 100)
    lines = plan_text.short(made.outline, made.placement, made.cost)
    assert "all weights in memory" in lines[-1]
    assert made.cost.first_token_s > 0
    assert page(made.to_json()).count("<circle") == planning.POINTS + 1


def test_free_memory_is_returned_after_long_spans_only(
    open_tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer = open_tiny("llama").transformer
    trims: list[int] = []
    monkeypatch.setattr(budget, "trim", lambda: trims.append(1))
    has = [1 << 40]
    monkeypatch.setattr(budget, "resident", lambda: has[0])
    monkeypatch.setattr(transformer.memory, "_ceiling", 1 << 41)
    kv, short, long = transformer.new_kv(), Span(0, [1, 2, 3]), Span(0, list(range(20)))

    def trimmed(span: Span) -> int:
        before = len(trims)
        full(transformer, [span], [kv])
        return len(trims) - before

    assert (trimmed(short), trimmed(long)) == (0, 0), "under the ceiling"
    monkeypatch.setattr(transformer.memory, "_ceiling", 1)
    assert (trimmed(short), trimmed(long)) == (0, 1)
    assert (trimmed(short), trimmed(long)) == (0, 0), (
        "what cannot be returned is not tried for again"
    )
    has[0] += 8 << 20
    assert (trimmed(short), trimmed(long)) == (0, 1), "but what has come since is"


def test_the_first_lines_tell_of_experts(
    folder_of: Callable[[str], Path], bare: None, capsys: pytest.CaptureFixture[str]
) -> None:
    outline = outline_of(folder_of("olmoe"))
    made = place.place(outline, place.least_bytes(outline, 0, 0, 64), 0, 0, 64)
    assert "of the experts" in plan_text.short(outline, made, None)[1]
    whole = place.place(outline, 1 << 33, 0, 0, 64)
    assert len(plan_text.short(outline, whole, None)) == 1
