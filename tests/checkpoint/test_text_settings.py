"""Where text begins and ends, and what templates there are, from every file that says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, processors

import outsize
from outsize.checkpoint.chat_templates import MAX_TEMPLATE
from outsize.checkpoint.checkpoint import TokenizerSpec
from outsize.checkpoint.tokenizer import build
from outsize.checkpoint.tokenizer_settings import of_folder, of_gguf, sidecars
from outsize.errors import CheckpointError
from tests.golden import tiny

SPECIAL = ["<s>", "</s>", "<|im_end|>", "<|eot_id|>", "<|end|>"]
S, E, IM_END, EOT, END = range(3, 8)


def folder(path: Path, special: list[str] = SPECIAL[:2], start: str = "", **files: Any) -> Path:
    """A folder with a tokenizer of three pieces and these special tokens; other files by their stems."""
    path.mkdir(exist_ok=True)
    made = Tokenizer(models.BPE({"a": 0, "b": 1, "#": 2}, []))
    made.add_special_tokens(special)
    if start:
        pairs = [(start, made.token_to_id(start))]
        template = processors.TemplateProcessing(single=f"{start} $A", special_tokens=pairs)
        made.post_processor = processors.Sequence([processors.ByteLevel(), template])
    made.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def read(path: Path, **config: Any) -> TokenizerSpec:
    return of_folder(path, config)


def test_ends_are_the_union_of_all_that_name_one(tmp_path: Path) -> None:
    path = folder(
        tmp_path, ["<s>", "</s>", "<x>", "<y>", "<z>"],
        generation_config={"eos_token_id": [5, 4]}, tokenizer_config={"eos_token": {"content": "<y>"}},
    )  # fmt: skip
    assert read(path, eos_token_id=4, text_config={"eos_token_id": [7]}).eos == (6, 5, 4, 7)


@pytest.mark.parametrize(
    "name", ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>", "<|end|>"]
)
def test_known_ends_that_nobody_names(tmp_path: Path, name: str) -> None:
    assert read(folder(tmp_path, ["<s>", "</s>", name]), eos_token_id=4).eos == (4, 5)


def test_harmonys_end_of_a_message_is_no_end_of_text(tmp_path: Path) -> None:
    path = folder(tmp_path, ["<|end|>", "<|return|>", "<|call|>"])
    assert read(path, eos_token_id=4).eos == (4, 5)


def test_a_class_default_that_is_a_piece_of_text_is_no_end(tmp_path: Path) -> None:
    path = folder(tmp_path, generation_config={"eos_token_id": E})
    assert read(path, eos_token_id=2).eos == (E,)  # 2 is "#"
    assert read(folder(tmp_path / "only", []), eos_token_id=2).eos == (2,)  # if it is all there is


def test_the_start_token_is_the_post_processors(tmp_path: Path) -> None:
    path = folder(tmp_path, start="<s>", tokenizer_config={"bos_token": "</s>"})
    spec = read(path, bos_token_id=E)
    assert (spec.bos, spec.add_bos) == (S, True)
    assert spec.names["bos_token"] == "</s>"  # of templates: the tokenizer's own name


def test_the_start_token_where_the_tokenizer_puts_none(tmp_path: Path) -> None:
    path = folder(tmp_path, tokenizer_config={"add_bos_token": True, "bos_token": "<s>"})
    assert (read(path).bos, read(path).add_bos) == (S, True)
    named = read(folder(tmp_path / "no"), bos_token_id=S)
    assert (named.bos, named.add_bos) == (S, False)


def test_names_for_templates(tmp_path: Path) -> None:
    path = folder(
        tmp_path, SPECIAL,
        tokenizer_config={"eos_token": "<|eot_id|>", "bos_token": None, "pad_token": {"content": "<s>"}},
        generation_config={"eos_token_id": [E, IM_END]},
    )  # fmt: skip
    spec = read(path, bos_token_id=S)
    assert spec.names == {"eos_token": "<|eot_id|>", "pad_token": "<s>"}  # null is null
    bare = read(folder(tmp_path / "bare"), bos_token_id=S, eos_token_id=E)
    assert bare.names == {"bos_token": "<s>", "eos_token": "</s>"}
    older = folder(tmp_path / "old", special_tokens_map={"bos_token": "<s>"}, tokenizer_config={})
    assert read(older).names["bos_token"] == "<s>"


def test_special_tokens_that_only_their_names_make_special(tmp_path: Path) -> None:
    path = folder(
        tmp_path, ["<s>"],
        tokenizer_config={"eos_token": "a", "extra_special_tokens": ["b"], "additional_special_tokens": 5},
    )  # fmt: skip
    spec = read(path, eos_token_id=2)
    assert spec.eos == (0,)  # not "#", a class default
    assert {i: t["special"] for i, t in spec.added_tokens.items()} == {"0": True, "1": True}  # type: ignore[index]
    assert build(spec).encode("ab", add_special_tokens=False).ids == [0, 1]
    assert build(spec).decode([0, 2], skip_special_tokens=True) == "#"
    old = folder(
        tmp_path / "old",
        ["<s>"],
        added_tokens={"</x>": 4},
        special_tokens_map={"eos_token": "</x>"},
    )
    assert read(old).eos == (4,)
    assert build(read(old)).token_to_id("</x>") == 4


def test_templates_of_folders(tmp_path: Path) -> None:
    path = folder(tmp_path, tokenizer_config={"chat_template": "one"})
    assert read(path).templates == {"default": "one"}
    several = [
        {"name": "default", "template": "d"},
        {"name": "tool_use", "template": "t"},
        {"name": 1},
    ]
    folder(tmp_path, tokenizer_config={"chat_template": several})
    assert read(path).templates == {"default": "d", "tool_use": "t"}
    (path / "chat_template.json").write_text('{"chat_template": "p"}')
    assert read(path).templates["default"] == "d"
    (path / "chat_template.jinja").write_text("j")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "rag.jinja").write_text("r")
    assert read(path).templates == {"default": "j", "rag": "r"}
    names = {p.name for p in sidecars(path)}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.json", "chat_template.jinja",
                     "rag.jinja"}  # fmt: skip
    (path / "chat_template.jinja").write_text("x" * (MAX_TEMPLATE + 1))
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: 262,145 bytes"):
        read(path)


def test_settings_of_another_kind(tmp_path: Path) -> None:
    path = folder(
        tmp_path, ["<s>", "</s>"], generation_config={"eos_token_id": "b", "bos_token_id": 2**40},
        tokenizer_config={"added_tokens_decoder": {"²": {"content": "x"}}, "bos_token": ["x"]},
    )  # fmt: skip
    spec = read(path, eos_token_id=[True, -1, None, {"a": 1}, E, 10**30])
    assert (spec.bos, spec.eos) == (None, (E,))
    for bad in (5, {"default": "x"}, ["x"]):
        folder(tmp_path, tokenizer_config={"chat_template": bad})
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: 'chat_template' is"):
            read(path)
    odd = json.loads((path / "tokenizer.json").read_text())
    odd["post_processor"] = {"single": [{"SpecialToken": {"id": ["x"]}}], "special_tokens": []}
    (path / "tokenizer.json").write_text(json.dumps(odd))
    folder_spec = of_gguf({"tokenizer.ggml.tokens": [["a"]], "tokenizer.ggml.eos_token_id": 0})
    assert folder_spec.eos == ()


TOKENS = ["a", "b", "#", *SPECIAL]


def gguf(**arrays: Any) -> TokenizerSpec:
    """Of metadata keys without their prefix."""
    types = np.array([1, 1, 1, 3, 3, 3, 3, 3])
    base = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": TOKENS[: arrays.pop("size", 5)],
        "token_type": types,
    }
    extra = {k: arrays.pop(k) for k in [k for k in arrays if "." in k]}
    return of_gguf({f"tokenizer.ggml.{k}": v for k, v in (base | arrays).items()} | extra)


def test_ends_of_ggufs() -> None:
    assert gguf(eos_token_id=E).eos == (E,)
    assert gguf(eos_token_id=E, eot_token_id=S).eos == (E, S)
    assert gguf(eos_token_id=E, eos_token_ids=np.array([E, 2])).eos == (E, 2)
    assert gguf(eos_token_id=E, size=8).eos == (E, EOT, IM_END, END)
    assert gguf(eos_token_id=99).eos == ()


def test_start_tokens_of_ggufs() -> None:
    for arrays, starts in (
        ({"pre": "llama-bpe"}, True), ({"pre": "tekken"}, True), ({"pre": "qwen2"}, False),
        ({"model": "llama"}, True), ({"model": "llama", "add_bos_token": False}, False),
        ({"add_bos_token": True}, True),
    ):  # fmt: skip
        assert gguf(bos_token_id=S, **arrays).add_bos is starts
    assert gguf(bos_token_id=99).bos is None


def test_names_and_templates_of_ggufs() -> None:
    spec = gguf(
        bos_token_id=S, eos_token_id=E, padding_token_id=E, unknown_token_id=99,
        **{"tokenizer.chat_template.tool_use": "t", "tokenizer.chat_template": "d"},
    )  # fmt: skip
    assert spec.names == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    assert spec.templates == {"default": "d", "tool_use": "t"}
    assert gguf(**{"tokenizer.chat_template.rag": "r"}).templates == {"rag": "r"}


def test_the_post_processors_start_token_begins_raw_texts_and_scores(
    home: Path, tmp_path: Path
) -> None:
    """As Llama 3's, whose files say so nowhere else."""
    path = tiny.write_folder(tmp_path / "m", "llama")
    made = Tokenizer.from_file(str(path / "tokenizer.json"))
    pairs = [("<s>", made.token_to_id("<s>"))]
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=pairs)
    made.save(str(path / "tokenizer.json"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (path / name).unlink(missing_ok=True)
    with outsize.load(str(path), quiet=True) as model:
        assert model.score("ab").tokens[0] == made.token_to_id("<s>")
        (reply,) = model.generate("ab", raw=True, max_tokens=1)
        assert reply.prompt_tokens == len(model.tokens.encode("ab")) + 1
