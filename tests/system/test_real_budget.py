"""Budgets against real bytes: the most that a process had, which runs a model of some 100 MB."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from typer.testing import CliRunner

import outsize
from outsize.bench.synthetic import gguf, shapes
from outsize.cli import main as cli
from outsize.errors import AdapterError, BudgetError
from outsize.pack import fetch
from outsize.pack.format import Pack
from outsize.pack.outline import of_pack
from outsize.plan import place
from outsize.system import memory as budget
from tests.drafts import write_lora

pytest.importorskip("gguf")
MB = 1_000_000
MAIN = shapes.Size(10, 768, 3072, 12, 4, 16_000, 1024)
SMALL = shapes.Size(4, 512, 1536, 8, 4, 16_000, 1024)
MIXED = shapes.Size(6, 512, 384, 8, 4, 8_000, 512, experts=24, used=4)
CHILD = """
import json, sys
import outsize
from outsize.options import LoadOptions
from outsize.plan import decide
from outsize.plan.warmup import runtime_bytes
from outsize.system import memory as budget
how = json.loads(sys.argv[1])
model, more, opens = how.pop("model"), how.pop("more"), how.pop("opens", 1)
later, prompt = how.pop("later", {}), "a b " * how.pop("words", 120)
load_options = LoadOptions(**how)
least = decide.foresee(model, load_options, 1 << 40, runtime_bytes(decide.compiled(load_options)))[1].least
open_models = []
for i in range(opens):
    if i % 2 == 0 and i:  # every other time both are closed
        for m in open_models: m.close()
    m = outsize.load(model, memory=least + more, **how)
    open_models.append(m)
    for name, path in later.items():
        m.load_adapter(name, path)
    for adapter in [*m.adapters, None][:1]:
        (reply,) = m.generate(prompt, raw=True, max_tokens=4, adapter=adapter)
    assert reply.new_tokens
    m.conversation().count([{"role": "user", "content": "x"}]) if m.pack.chat_templates else None
print(json.dumps({"peak": budget.peak(), "budget": least + more, "given_up": m.given_up,
                  "streamed": m.placement.streamed, "fixed": dict(m.placement.fixed)}))
"""


@pytest.fixture(scope="module")
def pack_of(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pack]:
    """The pack of a synthetic model, made once."""
    folder, made = tmp_path_factory.mktemp("synthetic"), dict[shapes.Size, Pack]()

    def make(size: shapes.Size, family: str = "llama") -> Pack:
        if size not in made:
            path = folder / f"{len(made)}.gguf"
            gguf.write(path, family, size, 1)
            made[size] = fetch.pack(str(path), quiet=True)
            path.unlink()
        return made[size]

    return make


def ran(model: Pack, more: int, **how: Any) -> dict[str, Any]:
    """What a process tells that runs with `more` bytes than the least."""
    told = {"model": str(model.path), "more": more, "context": 512, "quiet": True, **how}
    command = [sys.executable, "-c", CHILD, json.dumps(told)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    print(told, found)
    return found


@pytest.fixture(scope="module")
def loras(pack_of: Callable[..., Pack], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two adapters of rank 128: 55 MB in memory each, and files of twice that."""
    d, folder = pack_of(MAIN).description, tmp_path_factory.mktemp("loras")
    return {name: str(write_lora(d, folder / name, 1, 128)) for name in "ab"}


@pytest.mark.parametrize("more", [10 * MB, 200 * MB])
def test_adapters_keep_the_budget(
    more: int, pack_of: Callable[..., Pack], loras: dict[str, str]
) -> None:
    found = ran(pack_of(MAIN), more, adapters=loras)
    assert found["peak"] <= found["budget"]
    assert found["fixed"]["adapter a"] > 30 * MB
    assert bool(found["streamed"]) == (more < 20 * MB)


def test_an_adapter_given_later_takes_the_place_of_weights(
    pack_of: Callable[..., Pack], loras: dict[str, str]
) -> None:
    found = ran(pack_of(MAIN), 80 * MB, later={"a": loras["a"]})
    assert found["peak"] <= found["budget"]
    assert found["given_up"] > 0


@pytest.mark.parametrize("more", [10 * MB, 200 * MB])
def test_a_draft_model_keeps_the_budget(more: int, pack_of: Callable[..., Pack]) -> None:
    found = ran(pack_of(MAIN), more, draft=f"model:{pack_of(SMALL).path}")
    assert found["peak"] <= found["budget"]
    assert found["fixed"]["draft model"] > pack_of(SMALL).size


def test_hidden_states_that_stay_behind_keep_the_budget(pack_of: Callable[..., Pack]) -> None:
    found = ran(pack_of(MAIN), 10 * MB, prefill="lazy:fast,mode=revive", context=1024, words=250)
    assert found["peak"] <= found["budget"]
    assert found["streamed"]


def test_several_opens_in_one_process_keep_the_budget(pack_of: Callable[..., Pack]) -> None:
    """Of the same budget; two are open at once in between."""
    found = ran(pack_of(MAIN), 300 * MB, opens=3)
    assert found["peak"] <= found["budget"]


def test_a_closed_model_keeps_no_weights(pack_of: Callable[..., Pack]) -> None:
    """A mask drafter held on to the network: each opening found less room than the one before."""
    with outsize.load(str(pack_of(SMALL).path), quiet=True, draft="ngram") as model:
        parts = weakref.ref(model.transformer)
        model.drafting.draft_stats.mtp = cast("Any", SimpleNamespace(embed=model.transformer.embed))
    gc.collect()
    assert parts() is None


def test_what_a_mixture_gives_up_returns_to_the_system(pack_of: Callable[..., Pack]) -> None:
    pack = pack_of(MIXED, "qwen3_moe")
    with outsize.load(str(pack.path), context=64, quiet=True, draft="none") as model:
        (wanted,) = model.generate("a b a b", raw=True, max_tokens=6)
        giveable = place.giveable(of_pack(pack), model.placement)
        budget.trim()
        before = budget.resident()
        freed = model.transformer.memory.shrink(1 << 40)
        assert freed >= 0.9 * giveable > 20 * MB
        assert before - budget.resident() >= 0.9 * freed
        assert model.generate("a b a b", raw=True, max_tokens=6)[0].text == wanted.text


def test_plan_and_run_agree_on_what_is_loaded(
    pack_of: Callable[..., Pack], loras: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the plan, and a refusal before anything is read."""
    model, draft = str(pack_of(MAIN).path), f"model:{pack_of(SMALL).path}"
    made = CliRunner().invoke(
        cli.app,
        ["plan", model, "-c", "64", "--draft", draft, "--json", "-q", "--memory", "2GB",
         *(word for name, path in loras.items() for word in ("--adapter", f"{name}={path}"))],
    )  # fmt: skip
    planned = json.loads(made.stdout)
    how: dict[str, Any] = {"context": 64, "draft": draft, "adapters": loras, "quiet": True}
    with outsize.load(model, memory="2GB", **how) as opened:
        fixed = opened.placement.fixed
        for name in ("adapter a", "adapter b", "draft model"):
            assert planned["fixed"][name] == fixed[name]
        assert 0 <= fixed["adapter a"] - opened.adapters["a"].nbytes < MB
    monkeypatch.setattr(
        "outsize.engine.load.weights.load", lambda *_: pytest.fail("weights were read")
    )
    monkeypatch.setattr(
        "outsize.engine.load.tokens", lambda *_: pytest.fail("a tokenizer was read")
    )
    with pytest.raises(BudgetError, match=r"adapter a \d+, adapter b \d+, draft model \d+.*got"):
        outsize.load(model, memory="60MB", **how)
    with pytest.raises(AdapterError, match=r"cannot be read|not a readable"):
        outsize.load(model, memory="2GB", adapters={"x": "/nowhere"}, quiet=True)


def test_a_template_has_a_process_and_a_row(folder_of: Callable[[str], Path]) -> None:
    outline = of_pack(fetch.pack(str(folder_of("llama")), quiet=True))
    with_it, without = (
        place.place(replace(outline, has_template=told), 1 << 31, 0, 0, 64)
        for told in (True, False)
    )
    assert with_it.fixed["template process"] > 10 * MB
    assert with_it.process == without.process
    assert (
        with_it.planned
        == with_it.process + with_it.fixed["reserve"] + with_it.fixed["template process"]
    )
