"""What is opened is a regular file, and read within bounds: sizes, depths, kinds of files, numbers."""

from __future__ import annotations

import io
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

import outsize
from outsize.bench import speculate
from outsize.caching.replay import trace
from outsize.checkpoint import bounded, read_json
from outsize.checkpoint import lora as adapters
from outsize.checkpoint import tokenizer as tokenizers
from outsize.checkpoint.checkpoint import TokenizerSpec
from outsize.checkpoint.opening import open_checkpoint
from outsize.errors import (
    AdapterError,
    CheckpointError,
    DataError,
    OptionError,
    OutsizeError,
    TemplateError,
    TraceError,
)
from outsize.text import prompt_file, template
from outsize.text.tokens import Tokens
from outsize.text.untrusted import Marks
from tests.bench.test_cache_bench import HEADER, made, write
from tests.golden import tiny

ROOT = Path(__file__).parents[2]
SHORT = (
    "gguf-string-1G", "gguf-string-200G", "gguf-array0-1G", "gguf-empty-strings", "gguf-wide-strings",
    "gguf-sparse", "big-vocabulary", "config.json-lists-40M", "config.json-text-40M",
    "tokenizer.json-tokens-40M", "model.safetensors-objects-40M", "model.safetensors.index.json-keys-40M",
    "adapter_model.safetensors-lists-40M", "adapter_config.json-numbers-100M", "trace-bomb", "trace-shape",
    "prompts-bomb", "prompts-deep",
)  # fmt: skip


def sizes(*names: str) -> dict[str, dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile_sizes", *names],
        capture_output=True, text=True, cwd=ROOT, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, dict[str, object]] = json.loads(done.stdout)
    return result


def test_files_of_real_sizes_in_300_mb() -> None:
    result = sizes(*SHORT)
    sound = {name for name, said in result.items() if said["result"] == "sound"}
    assert sound == {"gguf-sparse", "big-vocabulary"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_files_of_real_sizes_in_300_mb() -> None:
    assert len(sizes()) > 200


# --- kinds of files ---------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def server(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


KINDS: dict[str, Callable[[Path], None]] = {
    "a pipe": pipe,
    "a folder": Path.mkdir,
    "a device": lambda p: p.symlink_to("/dev/zero"),
    "a socket": server,
}


def open_adapter(path: Path) -> object:
    save_file({"x": torch.zeros(1)}, path.with_name("adapter_model.safetensors"))
    return adapters.load(path.with_name("adapter_model.safetensors"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("m.gguf", open_checkpoint),
        ("m.bin", open_checkpoint),
        ("a.safetensors", adapters.load),
        ("adapter_config.json", open_adapter),
        ("config.json", read_json.read_json),
    ],
)
def test_only_regular_files_are_opened(
    kind: str, name: str, call: Callable[[Path], object], tmp_path: Path
) -> None:
    KINDS[kind](tmp_path / name)
    if kind == "a folder" and name != "adapter_config.json" and name != "config.json":
        with pytest.raises(OutsizeError):  # a folder may be a model
            call(tmp_path / name)
        return
    with pytest.raises(OutsizeError, match=f"{name}: {kind}, not a regular file"):
        call(tmp_path / name)


@pytest.mark.parametrize("kind", ["a folder", "a device"])
@pytest.mark.parametrize(
    ("call", "error"),
    [
        (trace.read, TraceError),
        (lambda p: prompt_file.read([p]), DataError),
        (lambda p: speculate.read(p, 0), OptionError),
    ],
)
def test_texts_are_read_within_bounds(
    kind: str, call: Callable[[Path], object], error: type[Exception], tmp_path: Path
) -> None:
    KINDS[kind](tmp_path / "text")
    with pytest.raises(error, match=r"text(:| cannot be read|, line 1: a line of more than)"):
        call(tmp_path / "text")


def test_a_text_that_is_too_long_in_all(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("a\n" * 10)
    assert len([*bounded.text_lines(tmp_path / "t", DataError)]) == 10
    with pytest.raises(
        DataError, match="line 4: a line of more than 8,388,608 bytes, or more than 6"
    ):
        list(bounded.text_lines(tmp_path / "t", DataError, limit=6))


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    """As in a hub's cache whose blobs were removed."""
    gone = r"a link to .*/blobs/1, which is not there"
    folder = tiny.write_folder(tmp_path / "m", "llama")
    (tmp_path / "lone.gguf").symlink_to(tmp_path / "blobs" / "1")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"):
        kept = (folder / name).read_bytes() if (folder / name).is_file() else None
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "blobs" / "1")
        with pytest.raises(CheckpointError, match=gone):
            open_checkpoint(folder)
        (folder / name).unlink()
        if kept is not None:
            (folder / name).write_bytes(kept)
    open_checkpoint(folder)
    with pytest.raises(OutsizeError, match=gone):
        outsize.load(str(tmp_path / "lone.gguf"), quiet=True)
    with pytest.raises(OutsizeError, match=gone):
        open_checkpoint(tmp_path)


# --- values -----------------------------------------------------------------------------------------

DEEP = '{"a":' * 60_000 + "0" + "}" * 60_000
DEEPER_THAN_WALKED = '{"prompt":' * 100 + '"x"' + "}" * 100


@pytest.mark.parametrize("text", [DEEP, DEEPER_THAN_WALKED])
def test_deep_json_is_refused_wherever_it_is(text: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    calls: list[tuple[Callable[[], object], type[Exception]]] = [
        (lambda: read_json.read_json(path), CheckpointError),
        (lambda: prompt_file.read([path]), DataError),
        (lambda: speculate.read(path, 0), OptionError),
        (lambda: tokenizers.from_json(text), CheckpointError),
    ]
    for call, error in calls:
        with pytest.raises(error):
            call()
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", {adapters.KEY: text})
    with pytest.raises(AdapterError, match="nested"):
        adapters.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": math.nan}, {"lora_alpha": math.inf}, {"lora_alpha": 1e39}, {"lora_alpha": 10**400},
        {"lora_alpha": True, "r": 0}, {"r": -1}, {"r": 10**400}, {"lora_alpha": "8"}, {"r": None},
    ],
)  # fmt: skip
def test_scales_of_adapters_are_numbers(change: dict[str, object], tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(4, 8)}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="lora_alpha"):
        _ = adapters.load(tmp_path).scale


@pytest.mark.parametrize("scale", ['"8"', "1e39", "NaN", "null", "-Infinity"])
def test_scales_of_our_adapters_are_numbers(scale: str, tmp_path: Path) -> None:
    about = {adapters.KEY: f'{{"scale": {scale}, "base": "x"}}'}
    save_file({"0.q.A": torch.zeros(4, 8)}, tmp_path / "a.safetensors", about)
    with pytest.raises(AdapterError, match="a number up to 65,536"):
        _ = adapters.load(tmp_path / "a.safetensors").scale


@pytest.mark.parametrize(
    "row",
    ["0,1,inf,0,0,1,0.5", "0,1,nan,0,0,1,0.5", "inf,1,99,0,0,1,0.5", "0,1,99,0,0,1.5,0.5",
     "0,1,99,0,0,1,inf", "0,1,99,0,0,1,nan", "0,1,1e300,0,0,1,0.5", "0,1,99.5,0,0,1,0.5"],
)  # fmt: skip
def test_numbers_of_traces(row: str, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"a\.csv:\d+: "):
        trace.read(write(tmp_path / "a.csv", [*made(), row]))


def test_shapes_of_traces(tmp_path: Path) -> None:
    header = HEADER.replace("n_layer=3", "n_layer=60000").replace("n_expert=8", "n_expert=60000")
    with pytest.raises(TraceError, match="60,000 layers of 60,000 experts; up to 262,144"):
        trace.read(write(tmp_path / "a.csv", made(), header))


# --- tokenizers and templates -----------------------------------------------------------------------


def pieces(*texts: str, kind: int = 1) -> TokenizerSpec:
    arrays = {
        "model": "llama", "tokens": list(texts), "scores": np.zeros(len(texts)),
        "token_type": np.array([kind] * len(texts)),
    }  # fmt: skip
    return TokenizerSpec(arrays=arrays)


def test_merges_take_no_more_than_linear_work() -> None:
    """Pieces all of whose parts are pieces: as many merges as characters, and much more work."""
    nested = pieces(*(c * n for c in map(chr, range(0x400, 0x400 + 40)) for n in range(1, 340)))
    with pytest.raises(CheckpointError, match=r"2,305,\d{3} cuts|cuts, over the limits"):
        tokenizers.check(nested)
    sound = pieces(*(c * n for c in "abc" for n in range(1, 50)))
    assert tokenizers.build(sound).encode("aaaa").ids


def test_long_names_of_control_tokens() -> None:
    """They are looked for in every text, by a pattern of all of them."""
    for spec in (
        pieces("a" * 300_000, kind=3),
        pieces(*(f"<{i:0>200}>" for i in range(2000)), kind=3),
    ):
        with pytest.raises(CheckpointError, match=r"special tokens have .* at most 262,144"):
            tokenizers.check(spec)
    marks = Marks(["<s>", "<" + "x" * 100_000 + ">"])
    assert marks.mark("a<s") == "a\ufdd0<s\ufdd1"
    assert marks.mark("a" * 10) == "a" * 10


class Panic(BaseException):
    """As pyo3's PanicException, which is no Exception."""


class Panicking:
    """A tokenizer that panics at every text and token."""

    model = normalizer = None
    encode_special_tokens = False

    def get_added_tokens_decoder(self) -> dict[int, object]:
        return {}

    def encode(self, *args: object, **options: object) -> object:
        raise Panic("index out of bounds")

    decode = no_truncation = encode


def test_a_panic_of_the_tokenizers_library_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens(Panicking(), None, False)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="cannot encode this text: index out of bounds"):
        tokens.encode("a")
    with pytest.raises(CheckpointError, match="cannot make text of its tokens: index out of"):
        tokens.decode([1])

    monkeypatch.setattr(tokenizers.tokenizer_json, "made", lambda text: Panicking())
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not usable: index out of"):
        tokenizers.from_json(tiny.tokenizer().to_str())


def test_tokens_beyond_the_embedding(home: Path, tmp_path: Path) -> None:
    """As Gemma 3's <image_soft_token>, whose text model has no row for it."""
    folder = tiny.write_folder(tmp_path / "m", "llama")
    whole: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    vocab = Tokenizer.from_str(json.dumps(whole)).get_vocab_size()
    assert vocab <= tiny.VOCAB
    for i in range(vocab, tiny.VOCAB + 1):
        whole["added_tokens"].append(
            {"id": i, "content": f"<x{i}>", "special": True, "normalized": False,
             "single_word": False, "lstrip": False, "rstrip": False}
        )  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    with outsize.load(str(folder), quiet=True) as model:
        assert model.generate(f"a<x{tiny.VOCAB - 1}>", raw=True, special=True, max_tokens=1)
        with pytest.raises(OptionError, match=r"'<x288>', token 288 .* embedding has 288 rows"):
            model.generate(f"a<x{tiny.VOCAB}>", raw=True, special=True, max_tokens=1)
        assert model.generate(f"a<x{tiny.VOCAB}>", raw=True, max_tokens=1)  # a text like another


CHATTY = """
import json, sys
sys.stdin.readline()
sys.stdout.write('{"texts": ["')
for _ in range(100_000):
    sys.stdout.write("x" * 100_000)
"""


def test_what_a_template_says_is_read_within_bounds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever runs in the rendering process: the parent stops reading."""
    (tmp_path / "child.py").write_text(CHATTY)
    monkeypatch.setattr(template, "CHILD", tmp_path / "child.py")
    monkeypatch.setattr(template, "_worker", template.Worker())
    monkeypatch.setattr(template, "MAX_LINE", 1 << 20)
    with pytest.raises(TemplateError, match="made more than 8,388,608 characters"):
        template.render("x", [[{"role": "user", "content": "a"}]], {})


def test_a_template_that_makes_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "MAX_TEXT", 1000)
    monkeypatch.setattr(template, "MAX_LINE", 6000)
    chat = [[{"role": "user", "content": "a"}]]
    with pytest.raises(TemplateError, match="more than 1,000 characters"):
        template.render("{{ 'x' * 2000 }}", chat, {})
    with pytest.raises(TemplateError, match="more than 1,000 characters"):
        template.render("{{ '\N{GRINNING FACE}' * 600 }}", chat, {})
    assert template.render("{{ 'x' * 900 }}", chat, {}) == ["x" * 900]


def test_nothing_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    with bounded.open_regular(tmp_path / "x") as f:
        assert isinstance(f, io.BufferedReader)
        assert f.read() == b"abc"
    with pytest.raises(CheckpointError, match="3 bytes, at most 2 are read"):
        bounded.read_regular(tmp_path / "x", 2)
