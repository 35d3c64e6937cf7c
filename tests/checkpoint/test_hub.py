"""Models of the hub: planned from their hub, fetched, and found in its cache without a network."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from outsize.checkpoint.hub import Remote, fetch_headers, fetch_hub, hub_patterns, local_name
from outsize.checkpoint.opening import open_checkpoint
from outsize.checkpoint.spec import parse
from outsize.errors import (
    CheckpointError,
    FetchError,
    HashError,
    OutsizeError,
    SourceError,
    UnsupportedError,
    UserError,
)
from outsize.pack import fetch, store
from tests.checkpoint.test_choose import shard
from tests.checkpoint.test_kinds import no_model
from tests.golden import tiny
from tests.golden.test_golden import write_gguf


class Hub:
    """A repository in a folder, in place of the network: `fetched` is what was downloaded whole."""

    def __init__(self, base: Path) -> None:
        self.repo, self.cache = base / "repo", base / "snapshot"
        self.repo.mkdir()
        self.fetched: list[str] = []
        self.offline = False

    def names(self) -> list[str]:
        if self.offline:
            raise OfflineModeIsEnabled("offline")
        return sorted(
            p.relative_to(self.repo).as_posix() for p in self.repo.rglob("*") if p.is_file()
        )

    def bring(self, name: str) -> str:
        self.fetched.append(name)
        (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.repo / name, self.cache / name)
        return str(self.cache / name)

    def info(self, **options: object) -> object:
        siblings = [(n, (self.repo / n).stat().st_size) for n in self.names()]
        return SimpleNamespace(
            sha="abc", siblings=[SimpleNamespace(rfilename=n, size=size) for n, size in siblings]
        )

    def snapshot(self, repo: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
        if local_files_only:
            if not self.cache.exists():
                raise LocalEntryNotFoundError("nothing cached")
            return str(self.cache)
        for name in self.names():
            if any(fnmatch.fnmatchcase(name, p) for p in allow_patterns):
                self.bring(name)
        return str(self.cache)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path)
    api = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(api, "list_repo_files", lambda self, repo: made.names())
    monkeypatch.setattr(api, "model_info", lambda self, repo, **options: made.info(**options))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: made.bring(name))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **o: None)
    monkeypatch.setattr(
        Remote,
        "read",
        lambda self, start, stop: (made.repo / self.name).read_bytes()[start:stop],
    )
    return made


def single(repo: Path) -> None:
    write_gguf(repo / "m[1]-Q8_0.gguf", "llama", "Q8_0")
    write_gguf(repo / "m[1]-F16.gguf", "llama")
    no_model(repo / "mmproj-F16.gguf", "mmproj", "clip")


def split(repo: Path) -> None:
    for quant in ("Q8_0", "Q4_0"):
        (repo / quant).mkdir()
        write_gguf(repo / quant / f"m-{quant}.gguf", "llama", quant, split_max_tensors=12)
    (repo / "config.json").write_text("{}")


def folder(repo: Path) -> None:
    tiny.write_folder(repo, "qwen2")
    (repo / "original").mkdir()
    for name in (
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "original/model.safetensors",
    ):
        (repo / name).write_bytes(b"not to be read")


def below(repo: Path) -> None:
    (repo / "sub").mkdir()
    folder(repo / "sub")


@pytest.mark.parametrize(
    ("make", "wish", "weights"),
    [
        (single, "", ["m[1]-Q8_0.gguf"]),
        (single, ":f16", ["m[1]-F16.gguf"]),
        (single, ":m[1]-F16.gguf", ["m[1]-F16.gguf"]),
        (split, "", [f"Q4_0/m-Q4_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]),
        (split, ":q8_0", [f"Q8_0/m-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]),
        (split, ":Q8_0/", [f"Q8_0/m-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]),
        (split, ":Q8_0/m-Q8_0-00002-of-00003.gguf",
         [f"Q8_0/m-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]),
        (folder, "", ["model.safetensors"]),
        (below, ":sub", ["sub/model.safetensors"]),
        (below, ":sub/model.safetensors", ["sub/model.safetensors"]),
    ],
)  # fmt: skip
def test_plan_and_run_and_cache_find_the_same(
    hub: Hub, make: Callable[[Path], None], wish: str, weights: list[str], tmp_path: Path
) -> None:
    make(hub.repo)
    spec = parse("hf:org/repo" + wish)
    planned = open_checkpoint(fetch_headers(spec, tmp_path / "headers"))
    assert hub.fetched == []
    run = open_checkpoint(fetch_hub(spec, True))
    assert [f for f in hub.fetched if f.endswith(("gguf", "safetensors"))] == weights
    assert [f.relative_to(hub.cache).as_posix() for f in run.files] == weights
    assert not [f for f in hub.fetched if "original" in f]
    hub.offline = True
    for path in (fetch_hub(spec, True), fetch_headers(spec, tmp_path / "offline")):
        assert open_checkpoint(path).files == run.files
    assert [(t.name, t.kind, t.shape) for t in planned.tensors.values()] == [
        (t.name, t.kind, t.shape) for t in run.tensors.values()
    ]


def test_the_shards_of_the_index_are_fetched(hub: Hub, tmp_path: Path) -> None:
    folder(hub.repo)
    names = shard(hub.repo)
    run = open_checkpoint(fetch_hub(parse("hf:org/repo"), True))
    assert [f.name for f in run.files] == names
    assert not {"consolidated.safetensors", "model.fp16.safetensors"} & set(hub.fetched)
    planned = open_checkpoint(fetch_headers(parse("hf:org/repo"), tmp_path / "headers"))
    assert planned.tensors.keys() == run.tensors.keys()


def test_what_cannot_be_run_is_not_fetched(hub: Hub, tmp_path: Path) -> None:
    """`run` and `plan` say the same, and nothing but headers has come."""

    def refusals(name: str) -> set[str]:
        said = set()
        for call in (fetch.pack, fetch.outline):
            with pytest.raises(UserError) as e:
                call(name, quiet=True)
            said.add(str(e.value).replace(str(tmp_path), ""))
        assert hub.fetched == []
        return said

    write_gguf(hub.repo / "m-Q4_0.gguf", "llama", "Q4_0")
    no_model(hub.repo / "n-Q8_0.gguf", "adapter")
    assert refusals("hf:org/repo") == {
        "hf:org/repo holds 2 models; add one's name, folder or quantization after a colon: "
        "m-Q4_0.gguf, n-Q8_0.gguf"
    }
    assert "is a LoRA adapter" in refusals("hf:org/repo:n-Q8_0.gguf").pop()
    assert "m-Q4_0.gguf" in refusals("hf:org/repo:m-Q4_1.gguf").pop()
    assert "'Q5_K_M'; there are" in refusals("hf:org/repo:Q5_K_M").pop()
    raw = (hub.repo / "m-Q4_0.gguf").read_bytes()
    (hub.repo / "n-Q8_0.gguf").unlink()
    (hub.repo / "m-Q4_0.gguf").write_bytes(raw.replace(b"llama", b"lamma", 1))
    assert "'lamma' is not known" in refusals("hf:org/repo").pop()


def test_a_type_is_refused_before_the_download(hub: Hub) -> None:
    raw = no_model(hub.repo / "m.gguf", "model").read_bytes()
    at = raw.index(b"\x01\x00\x00\x00\x00\x00\x00\x00x") + 9 + 4 + 16
    (hub.repo / "m.gguf").write_bytes(raw[:at] + (41).to_bytes(4, "little") + raw[at + 4 :])
    with pytest.raises(UnsupportedError, match="tensor 'x' has type Q1_0"):
        fetch.pack("hf:org/repo", quiet=True)
    assert hub.fetched == []


def test_a_quantized_repository_is_refused_before_the_download(hub: Hub) -> None:
    tiny.write_folder(hub.repo, "qwen2")
    awq = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    (hub.repo / "config.json").write_text(json.dumps(tiny.config("qwen2") | awq))
    with pytest.raises(UnsupportedError, match=r"quantized with AWQ \(4 bits\)"):
        fetch.pack("hf:org/repo", quiet=True)
    assert hub.fetched == []


def test_nothing_cached_and_no_network(hub: Hub) -> None:
    hub.offline = True
    with pytest.raises(FetchError, match="cannot fetch hf:org/repo: offline; check the name"):
        fetch_hub(parse("hf:org/repo"), True)
    hub.offline = False
    single(hub.repo)
    fetch_hub(parse("hf:org/repo"), True)
    hub.offline = True
    with pytest.raises(SourceError, match=r"only the hub's cache can be read,.* 'Q4_K_M'"):
        fetch_hub(parse("hf:org/repo:Q4_K_M"), True)


EVIL = ("../evil.gguf", "/tmp/evil.gguf", "a/../../evil.gguf", "a\\..\\evil.gguf", "..", "x\0.gguf")


def test_names_that_lead_out_of_the_repository(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub lists them, and the index names one: nothing is written outside of the folder."""
    tiny.write_folder(hub.repo, "qwen2")
    real = hub.names()
    data = {"model.safetensors.index.json": {"weight_map": {"x": "../../evil.safetensors"}}}
    (hub.repo / "model.safetensors.index.json").write_text(
        json.dumps(data["model.safetensors.index.json"])
    )
    evil = [*EVIL, "../../evil.safetensors"]
    sizes = dict.fromkeys(evil, 100) | {n: (hub.repo / n).stat().st_size for n in [*real, *data]}
    siblings = [SimpleNamespace(rfilename=n, size=size) for n, size in sizes.items()]
    info = SimpleNamespace(sha="abc", siblings=siblings)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo, **o: info)
    inner = tmp_path / "outer" / "inner"
    with pytest.raises(OutsizeError, match="is not in the folder"):
        fetch_headers(parse("hf:org/repo"), inner)
    for name in evil:
        with pytest.raises(OutsizeError):
            fetch_headers(parse("hf:org/repo:" + name), inner)
        with pytest.raises(CheckpointError, match="leads out of its repository"):
            local_name(inner, name)
    assert not list(tmp_path.rglob("evil*"))
    assert not Path("/tmp/evil.gguf").exists()


def test_names_with_glob_characters_match_themselves(hub: Hub) -> None:
    names = ["m[12]-Q8_0.gguf", "m1-Q8_0.gguf", "m?.gguf", "m*.gguf"]
    for name in names:
        patterns = hub_patterns(parse("hf:org/repo:" + name), names)
        assert [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns)] == [name]


def test_one_hash_is_of_one_file(hub: Hub, tmp_path: Path) -> None:
    """Also of a folder's only one; a pack that was made before is held to it, too."""
    folder(hub.repo)
    right = hashlib.sha256((hub.repo / "model.safetensors").read_bytes()).hexdigest()
    for _ in range(2):
        with pytest.raises(HashError, match="was asked for"):
            fetch.pack("hf:org/repo#sha256=" + 64 * "0", quiet=True)
        made = fetch.pack("hf:org/repo#sha256=" + right.upper(), quiet=True)
        assert made.source.sha256 == right
    store.remove(made.path.parent, made.path.name)
    shard(hub.repo)
    for _ in range(2):
        with pytest.raises(SourceError, match=r"one file, and .* are in 2"):
            fetch.pack("hf:org/repo#sha256=" + right, quiet=True)
        made = fetch.pack("hf:org/repo", quiet=True)
    store.remove(made.path.parent, made.path.name)
    single(hub.repo)
    with pytest.raises(OutsizeError, match="was asked for"):
        fetch.pack("hf:org/repo:F16#sha256=" + 64 * "0", quiet=True)
