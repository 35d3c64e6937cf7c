"""Which files of a folder or repository are the model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from outsize.checkpoint.choose import PREFERRED, Choice, Place, choose
from outsize.checkpoint.file_names import base_name, cut_files, quantization
from outsize.checkpoint.opening import open_checkpoint
from outsize.checkpoint.spec import parse
from outsize.errors import CheckpointError, SourceError, UnsupportedError, UserError
from tests.checkpoint.test_kinds import no_model
from tests.golden import tiny
from tests.golden.test_golden import write_gguf


def chosen(*names: str, wish: str = "", index: tuple[str, ...] = ()) -> Choice:
    def read(name: str) -> Mapping[str, object]:
        return {"weight_map": {str(i): shard for i, shard in enumerate(index)}}

    return choose(Place("hf:org/m", names, read, "add a name"), wish)


PARTS = tuple(f"Q4_K_M/m-Q4_K_M-0000{i}-of-00002.gguf" for i in (1, 2))
OTHERS = tuple(f"Q8_0/m-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2))


@pytest.mark.parametrize(
    ("names", "wish", "at"),
    [
        (("m.Q2_K.gguf", "m.Q4_K_M.gguf", "m.Q8_0.gguf"), "", "m.Q4_K_M.gguf"),
        (("m-UD-Q5_K_XL.gguf", "mmproj-F16.gguf"), "", "m-UD-Q5_K_XL.gguf"),
        (("m-IQ4_XS.gguf", "mmproj-BF16.gguf", "mmproj-F16.gguf"), "", "m-IQ4_XS.gguf"),
        (("m-IQ2_M.gguf", "m-Q3_K_S.gguf"), "", "m-Q3_K_S.gguf"),
        (("m-IQ2_M.gguf", "m-IQ4_XS.gguf", "m-Q6_K.gguf"), "", "m-IQ4_XS.gguf"),
        (("m-IQ4_XS.gguf", "m-Q4_0.gguf"), "", "m-Q4_0.gguf"),
        (("m-UD-IQ1_S.gguf", "m-UD-IQ3_XXS.gguf", "m-UD-Q2_K_XL.gguf"), "", "m-UD-IQ3_XXS.gguf"),
        (("m-TQ1_0.gguf", "m-TQ2_0.gguf"), "", "m-TQ2_0.gguf"),
        (("m.mmproj-Q8_0.gguf", "m.Q6_K.gguf", "m.imatrix.gguf"), "", "m.Q6_K.gguf"),
        (("m-UD-Q4_K_XL.gguf", "imatrix_unsloth.gguf"), "", "m-UD-Q4_K_XL.gguf"),
        (("m-Q4_K_M.gguf", "m-Q4_K_M-MTP.gguf", "m-draft-Q4_K_M.gguf"), "", "m-Q4_K_M.gguf"),
        (("m-F16.gguf", "m-F16-lora.gguf", "ggml-vocab-m.gguf"), "", "m-F16.gguf"),
        (("m-MTP-Q8_0.gguf", "m-MTP-Q4_K_M.gguf"), "", "m-MTP-Q4_K_M.gguf"),
        (("m.Q4_K_M.gguf", "m.i1-Q4_K_M.gguf"), "", "m.Q4_K_M.gguf"),
        (("m.Q4_K_M.gguf", "m.i1-Q4_K_M.gguf"), "i1-q4_k_m", "m.i1-Q4_K_M.gguf"),
        (("m-UD-Q4_K_XL.gguf", "m-Q4_K_M.gguf"), "ud-q4_k_xl", "m-UD-Q4_K_XL.gguf"),
        (("m-UD-Q4_K_XL.gguf", "m-Q4_K_M.gguf"), "Q4_K_XL", "m-UD-Q4_K_XL.gguf"),
        (("m-fp16.gguf", "m-Q2_K.gguf"), "F16", "m-fp16.gguf"),
        ((*PARTS, *OTHERS), "", PARTS[0]),
        ((*PARTS, *OTHERS), "Q8_0", OTHERS[0]),
        ((*PARTS, *OTHERS), "q8_0", OTHERS[0]),
        ((*PARTS, *OTHERS), OTHERS[1], OTHERS[0]),
        (("BF16/m-00001-of-00001.gguf", "m-Q8_0.gguf"), "bf16", "BF16/m-00001-of-00001.gguf"),
        (("m[1]-Q8_0.gguf", "m1-Q8_0.gguf"), "m[1]-Q8_0.gguf", "m[1]-Q8_0.gguf"),
        (("config.json", "tokenizer.json", "m-Q4_0.gguf"), "", "m-Q4_0.gguf"),
        (("config.json", "model.safetensors", "m-Q4_0.gguf"), "", ""),
        (("config.json", "model.safetensors", "m-Q4_0.gguf"), "Q4_0", "m-Q4_0.gguf"),
        (("sub/config.json", "sub/model.safetensors"), "sub", "sub"),
        (("sub/config.json", "sub/model.safetensors"), "sub/model.safetensors", "sub"),
        (
            ("config.json", "model.safetensors", "model.fp16.safetensors"),
            "model.fp16.safetensors",
            "model.fp16.safetensors",
        ),
    ],
)
def test_what_is_chosen(names: tuple[str, ...], wish: str, at: str) -> None:
    choice = chosen(*names, wish=wish)
    assert choice.at == at
    assert chosen(*choice.files, wish=wish) == choice  # of what was fetched, the same again


@pytest.mark.parametrize(
    ("names", "wish", "message"),
    [
        (("a.gguf", "b.gguf"), "", "hf:org/m holds 2 models; add a name: a.gguf, b.gguf"),
        (("a-Q4_K_M.gguf", "b-Q8_0.gguf"), "", "holds 2 models"),
        (("a-Q8_0.gguf", "b-Q8_0.gguf"), "Q8_0", "holds 2 models"),
        (("mmproj-F16.gguf",), "", "holds no language model but mmproj-F16.gguf"),
        (("m-Q8_0.gguf", "m-Q4_0.gguf"), "Q4_K_M", "'Q4_K_M'; there are.* m-Q"),
        (("m-Q8_0.gguf",), "m-q8_0.ggu", r"'m-q8_0\.ggu'; there are, for example, m-Q8_0\.gguf"),
        (("m-Q8_0.gguf",), "n-Q8_0.gguf", "no file, folder or quantization 'n-Q8_0.gguf'"),
        (("m.gguf", "notes.md"), "notes.md", r"notes\.md is not a model"),
        ((PARTS[1],), PARTS[1], "1 of 2 parts of .* are missing"),
        (("config.json", "pytorch_model.bin"), "", "pickle files .pytorch_model.bin., which can run"),
        (("adapter_config.json", "adapter_model.safetensors"), "", "is an adapter"),
        (("params.json", "consolidated.00.safetensors"), "", "Mistral's own layout"),
        (("config.json", "consolidated.safetensors", "x.json"), "", "Mistral's own layout"),
        (("config.json", "model.safetensors", "consolidated.safetensors"), "consolidated.safetensors",
         "Mistral's own layout"),
        (("a/config.json", "a/model.safetensors", "b/m.safetensors"), "", "in folders; add a name: a, b"),
        (("config.json", "a.safetensors", "b.safetensors"), "", "2 .safetensors files and no model"),
        (("config.json", "model-00001-of-00002.safetensors"), "", "'model-00002-of-00002.*' is not"),
        (("m.gguf.part1of2", "m.gguf.part2of2"), "",
         "cut by bytes; .*`cat m.gguf.part1of2 m.gguf.part2of2 > m.gguf`"),
        (("m.gguf-split-b", "m.gguf-split-a", "x-F16.gguf"), "m.gguf-split-b",
         "`cat m.gguf-split-a m.gguf-split-b > m.gguf`"),
    ],
)  # fmt: skip
def test_what_is_refused(names: tuple[str, ...], wish: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        chosen(*names, wish=wish)


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def test_what_is_fetched_of_a_safetensors_repository() -> None:
    """The shards of the index and the small files: nothing twice, nothing of another layout."""
    small = (
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
        "additional_chat_templates/tools.jinja", "model.safetensors.index.json",
    )  # fmt: skip
    doubles = (
        "consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "model.fp16.safetensors",
        "original/model.safetensors", "original/config.json", "onnx/model.onnx", "metal/model.bin",
        "pytorch_model.bin", "LICENSE", "README.md", "tf_model.h5", "onnx/tokenizer.json",
    )  # fmt: skip
    choice = chosen(*small, *SHARDS, *doubles, index=SHARDS)
    assert choice.at == ""
    assert set(choice.files) == {*small, *SHARDS}
    single = chosen(*small[:-1], "model.safetensors", *doubles)
    assert set(single.files) == {*small[:-1], "model.safetensors"}
    plain = chosen("config.json", *SHARDS, *doubles)  # shards without an index
    assert set(plain.files) == {"config.json", *SHARDS}
    below = chosen(*("a/" + n for n in (*small, *SHARDS)), "b/x", wish="a", index=SHARDS)
    assert set(below.files) == {"a/" + n for n in (*small, *SHARDS)}
    with pytest.raises(CheckpointError, match=r"'\.\./x\.safetensors', which .* names, is not in"):
        chosen(*small, *SHARDS, "../x.safetensors", index=("../x.safetensors",))


def test_names() -> None:
    assert quantization("a/m-UD-Q4_K_XL-00001-of-00003.gguf").prefix == "UD"
    for tag in PREFERRED:
        for name in (
            f"m-{tag}.gguf",
            f"m.{tag.lower()}.gguf",
            f"{tag}/m.gguf",
            f"m_{tag}-imat.gguf",
        ):
            assert quantization(name).tag == tag, name
    assert quantization("m-Q4_0_4_4.gguf").tag == "Q4_0_4_4"
    assert quantization("Phi-3-mini.gguf").tag == ""
    assert (
        len({base_name(f"{n}.gguf") for n in ("M-Q4_0", "m.i1-IQ2_XXS", "m-fp16", "M_Q4_K_M-imat")})
        == 1
    )
    for cut in (
        "x.gguf.part2of10",
        "x.gguf.part-00002",
        "x.gguf.00002",
        "x.gguf.ab",
        "x.safetensors.part2",
    ):
        assert cut_files(cut, []), cut
    for whole in ("x.gguf", "x.gguf.part", "x.gguf.1", "x.gguf.md", "x-00001-of-00002.gguf"):
        assert not cut_files(whole, []), whole
    pieces = [f"x.gguf.part{i}of11" for i in range(1, 12)]
    assert cut_files(pieces[4], reversed(pieces)) == pieces


@pytest.mark.parametrize("file", ["../x.gguf", "/etc/x.gguf", "a/../../x", "..", "a\\b", ""])
def test_names_stay_inside_the_repository(file: str) -> None:
    with pytest.raises(SourceError):
        parse("hf:org/m:" + file)


def split(folder: Path) -> list[Path]:
    write_gguf(folder / "m.gguf", "llama", split_max_tensors=12)
    return sorted(folder.glob("m-*.gguf"))


def shard(folder: Path) -> list[str]:
    """Two shards and an index in place of model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {SHARDS[0]: names[:9], SHARDS[1]: names[9:]}
    for name, some in halves.items():
        save_file({n: tensors[n] for n in some}, folder / name)
    index = {"weight_map": {n: name for name, some in halves.items() for n in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return list(SHARDS)


def blobs(folder: Path, files: list[Path]) -> list[Path]:
    """The files as the hub's cache keeps them: links to blobs that have other names."""
    store, links = folder / "blobs", folder / "snapshots" / "abc"
    store.mkdir()
    links.mkdir(parents=True)
    for i, file in enumerate(files):
        file.rename(store / f"{i:064x}")
        (links / file.name).symlink_to(store / f"{i:064x}")
    return [links / f.name for f in files]


def test_links_of_the_hubs_cache(tmp_path: Path) -> None:
    links = blobs(tmp_path, split(tmp_path))
    for link in links:
        assert open_checkpoint(Path(parse(str(link)).name)).files == tuple(links)
    (tmp_path / "renamed.gguf").symlink_to(links[0])
    (tmp_path / "part.gguf").symlink_to(split(tmp_path)[1])
    assert len(open_checkpoint(Path(parse(str(tmp_path / "part.gguf")).name)).files) == 3


@pytest.mark.parametrize("sharded", [False, True])
def test_a_safetensors_file_by_its_path(tmp_path: Path, sharded: bool) -> None:
    folder = tiny.write_folder(tmp_path / "m", "qwen2")
    if sharded:
        shard(folder)
    whole = open_checkpoint(folder)
    (folder / "consolidated.safetensors").write_bytes(b"not read")
    links = blobs(tmp_path, sorted(p for p in folder.iterdir() if p.is_file()))
    for link in links:
        if link.name.startswith("model") and link.suffix == ".safetensors":
            found = open_checkpoint(Path(parse(str(link)).name))
            assert found.tensors.keys() == whole.tensors.keys()
    (tmp_path / "alone").mkdir()
    alone = tmp_path / "alone" / "model.safetensors"
    alone.write_bytes(next(p for p in links if p.name.startswith("model")).read_bytes())
    with pytest.raises(SourceError, match=r"alone is not a model: config\.json"):
        open_checkpoint(alone)


@pytest.mark.parametrize(
    ("kind", "architecture", "message"),
    [
        ("adapter", "llama", "is a LoRA adapter"),
        ("mmproj", "clip", "is a projector"),
        ("", "clip", "is a projector"),
        ("imatrix", "llama", "is an importance matrix"),
        ("vocab", "llama", "is a vocabulary without weights"),
    ],
)
def test_ggufs_that_are_no_models(
    tmp_path: Path, kind: str, architecture: str, message: str
) -> None:
    other = no_model(tmp_path / "a-Q8_0.gguf", kind, architecture)
    with pytest.raises(
        UnsupportedError, match=rf"a-Q8_0\.gguf {message}.*; give the \.gguf of the model"
    ):
        open_checkpoint(other)
    if kind in ("adapter", "mmproj", "imatrix"):  # a folder says so before the names do
        write_gguf(tmp_path / "tiny.gguf", "llama")
        assert open_checkpoint(tmp_path).files == (tmp_path / "tiny.gguf",)


def test_a_folder_of_folders(tmp_path: Path) -> None:
    (tmp_path / "Q8_0").mkdir()
    write_gguf(tmp_path / "Q8_0" / "m-Q8_0.gguf", "llama", "Q8_0", split_max_tensors=12)
    assert len(open_checkpoint(tmp_path).files) == 3
    tiny.write_folder(tmp_path / "c" / "one", "qwen2")
    with pytest.raises(SourceError, match="models in folders; give the path of one: one"):
        open_checkpoint(tmp_path / "c")


def test_shards_joined_or_renamed_or_cut(tmp_path: Path) -> None:
    shards = split(tmp_path)
    joined, cut = tmp_path / "joined.gguf", tmp_path / "cut.gguf.part1of2"
    joined.write_bytes(b"".join(s.read_bytes() for s in shards))
    cut.write_bytes(shards[0].read_bytes()[:-500])
    (tmp_path / "cut.gguf.part2of2").write_bytes(shards[0].read_bytes()[-500:])
    whole = write_gguf(tmp_path / "whole.gguf", "llama").rename(tmp_path / "whole.gguf.00001")
    assert open_checkpoint(whole).tensors  # whatever its name says
    messages = {
        joined: "3 parts of a split model, joined with cat, .*llama-gguf-split --merge",
        cut: r"`cat cut\.gguf\.part1of2 cut\.gguf\.part2of2 > cut\.gguf`",
        tmp_path / "cut.gguf.part2of2": "cut by bytes",
        shards[1].rename(tmp_path / "m (2).gguf"): r"part 2 of 3 .* name it m-00002-of-00003\.gguf",
        shards[0]: r"1 of 3 parts are missing, the first is m-00002-of-00003\.gguf",
    }
    for path, message in messages.items():
        with pytest.raises(UserError, match=message) as e:
            open_checkpoint(path)
        assert not re.search("damaged|fetch it again", str(e.value))
    shards[1].write_bytes(shards[2].read_bytes())
    with pytest.raises(
        CheckpointError, match=r"m-00002.*: this is part 3 of 3 .* name it m-00003-of-00003"
    ):
        open_checkpoint(shards[0])


def test_shadows_of_files_and_links_to_themselves(tmp_path: Path) -> None:
    """What macOS leaves beside files on other disks, and what cannot be looked at."""
    write_gguf(tmp_path / "m.gguf", "llama")
    (tmp_path / "._m.gguf").write_bytes(b"\0\5\26\7Mac OS X")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert open_checkpoint(tmp_path).files == (tmp_path / "m.gguf",)
    folder = tiny.write_folder(tmp_path / "f", "llama")
    (folder / "._model.safetensors").write_bytes(b"\0\5\26\7Mac OS X")
    assert open_checkpoint(folder).files == (folder / "model.safetensors",)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert open_checkpoint(folder).files == (folder / "weights.safetensors",)


def test_an_odd_name_beside_a_model() -> None:
    assert (
        chosen("m-Q4_K_M.gguf", "x-00001-of-09999.gguf", "y-00001-of-00000.gguf").at
        == "m-Q4_K_M.gguf"
    )
