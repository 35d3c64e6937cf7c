"""Arguments of the wrong kind: one sentence that names the argument, what it was given, and what it takes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import outsize
from outsize.engine.model import Model
from outsize.errors import OutsizeError, SourceError, UserError
from outsize.options import Options
from outsize.pack import fetch
from tests.drafts import write_peft

LONG = "a" * 300  # longer than a name may be
SAYS = r".*is.*expected"

OPTIONS: list[tuple[str, object]] = [
    ("max_tokens", "many"), ("max_tokens", 1.5), ("max_tokens", True), ("max_tokens", -1),
    ("max_tokens", None),
    ("temperature", "hot"), ("temperature", float("nan")), ("temperature", -0.1),
    ("temperature", False),
    ("temperature", 1j), ("top_k", 2.0), ("top_k", -1), ("top_p", "0.5"), ("top_p", 2), ("min_p", None),
    ("repeat_penalty", 0),
    ("repeat_penalty", [1]), ("seed", "x"), ("seed", 1.0), ("seed", -1), ("seed", True),
    ("stop", 5), ("stop", b"x"), ("stop", [1]), ("stop", {"a": 1}), ("system", 5), ("system", b"x"),
    ("raw", "yes"), ("raw", 1), ("raw", None), ("special", 0), ("adapter", 5), ("adapter", [5]),
    ("adapter", b"x"), ("template_args", 5), ("template_args", [1]), ("template_args", {1: 2}),
]  # fmt: skip
LOAD: list[tuple[str, object]] = [
    ("memory", "lots"), ("memory", None), ("memory", True), ("memory", -5), ("memory", 0), ("memory", 1.5e9),
    ("memory", [1]), ("context", "512"), ("context", 512.0), ("context", True), ("context", -5),
    ("threads", 2.0), ("threads", "2"), ("threads", True), ("threads", -1), ("encoding", 5),
    ("encoding", None), ("verify", 1), ("verify", None), ("force", "no"), ("native", 1), ("quiet", None),
    ("experts", 5), ("experts", b"lru"), ("draft", None), ("draft", 3), ("draft", "masks:a\0b"),
    ("adapters", "a=b"), ("adapters", ["a"]), ("adapters", {1: "x"}), ("adapters", {"a": 5}),
    ("adapters", {"a": "x\0y"}), ("adapters", {"a": LONG}), ("adapters", {"a": "~nobody-here/x"}),
    ("recorder", 5), ("before", "x"),
]  # fmt: skip
CALLS: list[tuple[str, Callable[[Model], object]]] = [
    ("prompts", lambda m: m.generate(None)),  # type: ignore[arg-type]
    ("prompts", lambda m: m.generate(5)),  # type: ignore[arg-type]
    ("prompts", lambda m: m.generate(b"x")),
    ("prompts", lambda m: m.generate({"role": "user", "content": "x"})),  # type: ignore[arg-type]
    ("a prompt", lambda m: m.generate(["x", None])),  # type: ignore[list-item]
    ("a prompt", lambda m: m.generate([b"x"])),  # type: ignore[list-item]
    ("a prompt", lambda m: m.generate([{"role": "user", "content": "x"}])),  # type: ignore[list-item]
    ("a prompt", lambda m: m.stream(None)),  # type: ignore[arg-type]
    ("a prompt", lambda m: m.stream(5)),  # type: ignore[arg-type]
    ("a prompt", lambda m: m.stream(b"x")),  # type: ignore[arg-type]
    ("a prompt", lambda m: m.chat({"role": "user", "content": "x"})),  # type: ignore[arg-type]
    ("a prompt", lambda m: m.count(None)),  # type: ignore[arg-type]
    ("text", lambda m: m.score(None)),  # type: ignore[arg-type]
    ("text", lambda m: m.score(b"x")),  # type: ignore[arg-type]
    ("text", lambda m: m.conversation().say(None)),  # type: ignore[arg-type]
    ("a token", lambda m: m.score_tokens(["a"])),  # type: ignore[list-item]
    ("name", lambda m: m.load_adapter(5, "x")),  # type: ignore[arg-type]
    ("path", lambda m: m.load_adapter("a", None)),  # type: ignore[arg-type]
    ("path", lambda m: m.load_adapter("a", b"x")),  # type: ignore[arg-type]
    ("path", lambda m: m.load_adapter("a", LONG)),
    ("path", lambda m: m.load_adapter("a", "x\0y")),
]
SAID: list[Callable[[Model], object]] = [  # refused in other words
    lambda m: m.chat([5]),  # type: ignore[list-item]
    lambda m: m.chat([{"content": "x"}]),
    lambda m: m.chat([{"role": 5, "content": "x"}]),
    lambda m: m.chat([{"role": "user", "content": 5}]),
    lambda m: m.chat([{"role": "user", "content": b"x"}]),
    lambda m: m.chat([{"role": "user", "content": [5]}]),
    lambda m: m.chat([{"role": "user", "content": "x", "more": {1, 2}}]),
    lambda m: m.conversation(overflow=5),  # type: ignore[arg-type]
    lambda m: m.score_tokens([]),
    lambda m: m.generate("", raw=True),
    lambda m: m.generate("x", adapter=LONG),
]


@pytest.fixture
def model(open_tiny: Callable[..., Model]) -> Model:
    return open_tiny("llama", "fp32")


@pytest.mark.parametrize(("name", "value"), OPTIONS, ids=repr)
def test_options(name: str, value: object, model: Model) -> None:
    with pytest.raises(UserError, match=f"^{name}{SAYS}"):
        Options().with_changes({name: value})
    with pytest.raises(UserError, match=f"^{name}{SAYS}"):
        model.conversation(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value"), LOAD, ids=repr)
def test_load(name: str, value: Any, folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(UserError) as e:
        outsize.load(folder_of("llama"), **({"quiet": True} | {name: value}))
    assert str(e.value).startswith(name)


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_calls(number: int, model: Model) -> None:
    name, call = CALLS[number]
    with pytest.raises(UserError, match=f"^{name}{SAYS}"):
        call(model)


@pytest.mark.parametrize("number", range(len(SAID)))
def test_calls_that_are_refused_in_other_words(number: int, model: Model) -> None:
    with pytest.raises(UserError):
        SAID[number](model)


@pytest.mark.parametrize(
    "name",
    [
        None,
        5,
        b"x",
        ["x"],
        "a\0b",
        LONG,
        "x/" * 3000,
        f"hf:{LONG}/{LONG}",
        f"package:{LONG}==1",
        "",
    ],
)
def test_names_of_models(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(OutsizeError) as e:
        outsize.load(name, quiet=True)
    assert "\n" not in str(e.value)


def test_a_name_that_is_too_long_is_told_short() -> None:
    with pytest.raises(
        SourceError, match=r"'a{80}\.\.\.' cannot be looked up \(File name too long\)"
    ):
        fetch.find(LONG * 20)


def test_paths_of_pathlib(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_of("llama"), tmp_path / "model"))
    made = fetch.pack(folder, quiet=True)
    assert fetch.find(folder) is not None
    assert fetch.outline(folder, quiet=True).name == made.path.name
    with outsize.load(folder, quiet=True) as model:
        first = model.generate("abc", max_tokens=3, raw=True)[0].text
        written = write_peft(model, tmp_path / "a", 1)
    with outsize.load(made.path, adapters={"a": written}, quiet=True) as model:
        assert model.generate("abc", max_tokens=3, raw=True)[0].text == first
        assert model.generate("abc", max_tokens=3, raw=True, adapter="a")[0].new_tokens == 3
        model.load_adapter("b", written)


def test_numbers_of_numpy(folder_of: Callable[[str], Path]) -> None:
    with outsize.load(
        folder_of("llama"),
        context=np.int64(64),
        memory=np.int64(4 << 30),
        quiet=True,  # type: ignore[arg-type]
    ) as model:
        how = {"max_tokens": np.int32(3), "temperature": np.float32(0.5), "seed": np.int64(3)}
        reply = model.generate("abc", raw=True, **how)[0]  # type: ignore[arg-type]
        assert reply.new_tokens == 3
        assert type(reply.options["max_tokens"]) is int
        assert type(reply.options["temperature"]) is float
        assert model.score_tokens(np.array([5, 6, 7]).tolist())


def test_a_prompt_may_hold_any_character(model: Model) -> None:
    assert model.generate("a\0b", raw=True, max_tokens=2)[0].prompt_tokens == len("a\0b") + len(
        model.tokens.start
    )
