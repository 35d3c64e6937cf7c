"""A pack stands for all that decides an answer: a corrected file is seen at the next run, and weights are
encoded again only where they have to be."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import outsize
from outsize.checkpoint.read_json import MAX_JSON
from outsize.errors import CheckpointError, OptionError, SourceError
from outsize.pack import fetch, store, write
from outsize.pack.format import Pack, write_header
from outsize.pack.source import Source
from tests.golden import tiny
from tests.golden.test_golden import write_gguf


@pytest.fixture
def packs(own_home: Path) -> Path:
    return own_home / "packs"


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of each table that is written."""
    done: list[str] = []
    real = write._write_table

    def counted(table, folder, tick):  # type: ignore[no-untyped-def]
        done.append(table.header.name)
        return real(table, folder, tick)

    monkeypatch.setattr(write, "_write_table", counted)
    return done


def change_json(path: Path, **changes: object) -> None:
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | changes))


def changed_tokenizer(folder: Path) -> None:
    made = tiny.tokenizer()
    made.add_special_tokens(["<more>"])
    made.save(str(folder / "tokenizer.json"))


CHANGES: dict[str, tuple[Callable[[Path], object], Callable[[Pack], object], object]] = {
    "chat_template.jinja": (
        lambda f: (f / "chat_template.jinja").write_text("new"),
        lambda p: p.chat_templates.get("default"), "new",
    ),
    "its removal": (
        lambda f: (f / "chat_template.jinja").unlink(), lambda p: p.chat_templates.get("default"), None
    ),
    "generation_config.json, which there was not": (
        lambda f: change_json(f / "generation_config.json", eos_token_id=[258]), lambda p: p.eos, (258, 257)
    ),
    "tokenizer_config.json": (
        lambda f: change_json(f / "tokenizer_config.json", eos_token="<s>"),
        lambda p: p.special_tokens["eos_token"], "<s>",
    ),
    "config.json: an end": (
        lambda f: change_json(f / "config.json", eos_token_id=259), lambda p: p.eos, (259,)
    ),
    "config.json: arithmetic": (
        lambda f: change_json(f / "config.json", rms_norm_eps=1e-3), lambda p: p.description.norm_eps, 1e-3
    ),
    "a template of another name": (
        lambda f: ((f / "additional_chat_templates").mkdir(),
                   (f / "additional_chat_templates" / "rag.jinja").write_text("r")),
        lambda p: p.chat_templates["rag"], "r",
    ),
    "tokenizer.json": (changed_tokenizer, lambda p: p.tokenizer_crc, None),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_file_is_seen_without_encoding_anything(
    what: str, packs: Path, encodings: list[str], tmp_path: Path
) -> None:
    change, read, wanted = CHANGES[what]
    folder = tiny.write_folder(tmp_path / "m", "llama")
    first = fetch.pack(str(folder), quiet=True)
    assert fetch.pack(str(folder), quiet=True).path == first.path
    encodings.clear()
    change(folder)
    second = fetch.pack(str(folder), quiet=True)
    if what == "tokenizer.json":
        assert second.tokenizer_crc != first.tokenizer_crc
    else:
        assert read(second) == wanted
    assert encodings == []
    assert [p.name for p in packs.glob("[!.]*")] == [second.path.name]  # the old one is gone
    with outsize.load(str(folder), quiet=True, verify="always") as model:
        assert model.generate("a", raw=True, max_tokens=2)[0].new_tokens == 2


def test_changed_weights_are_encoded_again(
    packs: Path, encodings: list[str], tmp_path: Path
) -> None:
    folder = tiny.write_folder(tmp_path / "m", "llama")
    first = fetch.pack(str(folder), quiet=True)
    encodings.clear()
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert fetch.pack(str(folder), quiet=True).path != first.path
    assert encodings


def test_a_config_that_changes_what_records_hold(
    packs: Path, encodings: list[str], tmp_path: Path
) -> None:
    """Heads of another size: the same tensors, with rows in another order."""
    folder = tiny.write_folder(tmp_path / "m", "llama")
    first = fetch.pack(str(folder), quiet=True)
    encodings.clear()
    change_json(folder / "config.json", num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    second = fetch.pack(str(folder), quiet=True)
    assert (first.description.head_dim, second.description.head_dim) == (32, 64)
    assert encodings


def test_a_copy_with_another_template_is_another_model(
    packs: Path, encodings: list[str], tmp_path: Path
) -> None:
    one = tiny.write_folder(tmp_path / "m", "llama")
    two = tmp_path / "elsewhere"
    shutil.copytree(one, two)
    (two / "chat_template.jinja").write_text("other")
    first = fetch.pack(str(one), quiet=True)
    encodings.clear()
    second = fetch.pack(str(two), quiet=True)
    assert encodings == []
    assert (first.chat_templates.get("default"), second.chat_templates.get("default")) == (
        tiny.TEMPLATE,
        "other",
    )
    assert fetch.pack(str(one), quiet=True).chat_templates["default"] == tiny.TEMPLATE  # both stay
    assert os.path.samefile(first.path / "embed.records", second.path / "embed.records")
    store.remove(packs, first.path.name)
    with outsize.load(str(two), quiet=True, verify="always") as model:
        assert model.generate("a", raw=True, max_tokens=2)[0].new_tokens == 2


def test_two_encodings_of_a_model_stay(packs: Path, tmp_path: Path) -> None:
    folder = tiny.write_folder(tmp_path / "m", "llama")
    made = [fetch.pack(str(folder), encoding=e, quiet=True) for e in ("auto", "bf16", "fp32")]
    assert {p.name for p in packs.glob("[!.]*")} == {p.path.name for p in made}
    assert fetch.pack(str(folder), quiet=True) == made[0]


def test_a_pack_that_another_process_removes_meanwhile(
    packs: Path, encodings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.write_folder(tmp_path / "m", "llama")
    first = fetch.pack(str(folder), quiet=True)
    encodings.clear()
    real = store.same_records

    def then_gone(home: Path, source: Source) -> Pack | None:
        found = real(home, source)
        shutil.rmtree(first.path)
        return found

    monkeypatch.setattr(store, "same_records", then_gone)
    (folder / "chat_template.jinja").write_text("new")
    assert fetch.pack(str(folder), quiet=True).chat_templates["default"] == "new"
    assert encodings
    with pytest.raises(SourceError, match="no pack named"):
        store.remove(packs, first.path.name)


def test_files_beside_the_weights_are_bounded(packs: Path, tmp_path: Path) -> None:
    folder = tiny.write_folder(tmp_path / "m", "llama")
    with open(folder / "added_tokens.json", "wb") as f:
        f.truncate(MAX_JSON + 1)
    with pytest.raises(CheckpointError, match=r"added_tokens\.json: 67,108,865 bytes"):
        fetch.pack(str(folder), quiet=True)


def test_only_models_of_the_hub_are_refreshed(tmp_path: Path) -> None:
    folder = tiny.write_folder(tmp_path / "m", "llama")
    with pytest.raises(OptionError, match="only models of the hub"):
        fetch.pack(str(folder), quiet=True, refresh=True)


def test_records_are_copied_where_they_cannot_be_linked(
    packs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*args: object) -> None:
        raise OSError("no links here")

    folder = tiny.write_folder(tmp_path / "m", "llama")
    fetch.pack(str(folder), quiet=True)
    monkeypatch.setattr(os, "link", no_links)
    (folder / "chat_template.jinja").write_text("new")
    with outsize.load(str(folder), quiet=True, verify="always") as model:
        assert model.pack.chat_templates["default"] == "new"


def test_a_gguf_is_told_by_its_bytes(packs: Path, encodings: list[str], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama")
    first = fetch.pack(str(path), quiet=True)
    encodings.clear()
    os.utime(path, (1, 1))
    assert fetch.pack(str(path), quiet=True).path == first.path
    (tmp_path / "config.json").write_text("{}")  # beside a GGUF it decides nothing
    assert fetch.pack(str(path), quiet=True).path == first.path
    assert encodings == []


def test_files_of_one_size_and_time(packs: Path, tmp_path: Path) -> None:
    """As in images of file systems, where every file was last changed in 1970."""
    folder = tiny.write_folder(tmp_path / "m", "llama")
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    fetch.pack(str(folder), quiet=True)
    other = tmp_path / "other.safetensors"
    shutil.copy(folder / "model.safetensors", other)
    for path in (other, folder / "model.safetensors"):
        os.utime(path, (1, 1))
    before = fetch.pack(str(folder), quiet=True).source.files
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(other)
    assert fetch.pack(str(folder), quiet=True).source.files != before
    template = folder / "chat_template.jinja"
    template.write_text("x" * len(tiny.TEMPLATE))
    os.utime(template, (1, 1))
    assert fetch.pack(str(folder), quiet=True).chat_templates["default"] == "x" * len(tiny.TEMPLATE)


def test_the_newest_pack_of_a_model_whose_newest_revision_is_not_whole(
    packs: Path, tmp_path: Path
) -> None:
    repo, made = tmp_path / "hub" / "models--org--tiny", {}
    (repo / "refs").mkdir(parents=True)
    for revision in ("bbb", "aaa"):
        folder = tiny.write_folder(repo / "snapshots" / revision, "llama")
        (folder / "chat_template.jinja").write_text(revision)
        made[revision] = fetch.pack(str(folder), quiet=True)
        header = replace(made[revision], source=replace(made[revision].source, spec="hf:org/tiny"))
        write_header(header, made[revision].path)
    (repo / "refs" / "main").write_text("ccc")  # of which only a template was fetched
    found = store.find(packs, "hf:org/tiny", "auto", is_path=False)
    assert found is not None
    assert found.chat_templates["default"] == "aaa"
    (repo / "refs" / "main").write_text("bbb")
    found = store.find(packs, "hf:org/tiny", "auto", is_path=False)
    assert found is not None
    assert found.chat_templates["default"] == "bbb"


def test_a_newer_revision_in_the_hubs_cache(
    packs: Path, encodings: list[str], tmp_path: Path
) -> None:
    """What `hf download` brought is seen by the next run, though it asks nobody."""
    repo = tmp_path / "hub" / "models--org--tiny"
    old, new = repo / "snapshots" / "aaa", repo / "snapshots" / "bbb"
    tiny.write_folder(old, "llama")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("aaa")
    pack = fetch.pack(str(old), quiet=True)
    assert not pack.source.is_superseded()
    (repo / "refs" / "main").write_text("bbb")
    assert not pack.source.is_superseded()  # it is not whole yet
    shutil.copytree(old, new)
    assert pack.source.is_superseded()
    assert not fetch.pack(str(new), quiet=True).source.is_superseded()


def test_packs_of_an_earlier_version_are_made_anew(packs: Path, tmp_path: Path) -> None:
    folder = tiny.write_folder(tmp_path / "m", "llama")
    pack = fetch.pack(str(folder), quiet=True)
    header = json.loads((pack.path / "pack.json").read_text())
    header["pack"]["version"] = 1
    (pack.path / "pack.json").write_text(json.dumps(header))
    assert fetch.pack(str(folder), quiet=True).path == pack.path
