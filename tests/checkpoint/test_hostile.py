"""Foreign files are hostile until proven: a fixed-seed slice here, 2,000 with `-m slow`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from outsize.checkpoint import gguf, safetensors
from outsize.checkpoint.opening import open_checkpoint
from outsize.checkpoint.spec import parse
from outsize.errors import CheckpointError, SourceError, UnsupportedError
from tests.golden import tiny
from tests.golden.test_golden import write_gguf

ROOT = Path(__file__).parents[2]


def mutants(count: int, seed: int, what: str) -> dict[str, object]:
    """In a process of its own, so that its memory is its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile", str(count), str(seed), what],
        capture_output=True, text=True, cwd=ROOT, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, object] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("what", ["plain", "quantized"])
@pytest.mark.parametrize(
    ("count", "seed"), [(300, 1), pytest.param(2000, 7, marks=pytest.mark.slow)]
)
def test_mutants_give_only_our_errors(count: int, seed: int, what: str) -> None:
    result = mutants(count, seed, what)
    assert float(str(result["slowest_s"])) < 2
    assert int(str(result["memory_grown_mb"])) < 300
    assert "CheckpointError" in str(result["results"])


def test_truncation_anywhere_is_named(tmp_path: Path) -> None:
    data = write_gguf(tmp_path / "m.gguf", "llama").read_bytes()
    for length in (5, 23, 40, 700, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            gguf.load(tmp_path / "cut.gguf")


def test_header_length_beyond_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="a header of 4,611,686,018,427,387,904 bytes"):
        safetensors.parse(path)


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    header = json.dumps({
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
    }).encode()  # fmt: skip
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    with pytest.raises(CheckpointError, match="'a' and 'b' overlap"):
        safetensors.parse(path)


def test_shard_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    folder = tiny.write_folder(tmp_path / "m", "llama")
    index = {"weight_map": {"x": "../../etc/passwd"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is not in the folder"):
        safetensors.load(folder)


def test_unknown_architecture_is_named_with_the_known(tmp_path: Path) -> None:
    from outsize.family.find import recipe

    folder = tiny.write_folder(tmp_path / "m", "llama", model_type="lama")
    with pytest.raises(
        UnsupportedError, match=r"'lama' is not known; known are afm.*did you mean 'llama'"
    ):
        recipe(safetensors.load(folder))


def test_unsupported_type_is_named_with_its_tensor(tmp_path: Path) -> None:
    from outsize.family.find import recipe
    from outsize.pack.layout import plan

    folder = tiny.write_folder(tmp_path / "m", "llama")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"I32"', 1))
    checkpoint = safetensors.load(folder)
    with pytest.raises(UnsupportedError, match="has type I32, which outsize cannot read"):
        plan(checkpoint, recipe(checkpoint), "auto", False)


def test_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello, this is prose")
    with pytest.raises(SourceError, match="is not a model: it begins with b'hell'"):
        open_checkpoint(tmp_path / "notes.txt")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(SourceError, match="no such model"):
        parse(str(tmp_path / "nothing.gguf"))
    for text in ("hf:one", "package:x", "package:-r==1"):
        with pytest.raises(SourceError, match="write"):
            parse(text)
