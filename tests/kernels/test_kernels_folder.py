"""Compiled kernels are code: they are run only from a folder of one's own, and only as they were built; where
there is no such folder a process builds its own, and says so."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import outsize
from outsize import log
from outsize.errors import PackError
from outsize.kernels import build
from outsize.kernels.find import native_in
from outsize.pack import fetch

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C compiler on this machine")


@pytest.fixture
def compiled(home: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Instead of compiling, copies what was compiled before; where to, in order."""
    assert native_in(home / "native") is not None
    (known,) = (home / "native").glob("*.so")
    made: list[Path] = []

    def copy(cc: str, flags: tuple[str, ...], path: Path) -> str:
        made.append(path)
        shutil.copy(known, path)
        return ""

    monkeypatch.setattr(build, "_compile", copy)
    build._own.cache_clear()
    return made


def file_in(folder: Path) -> Path:
    (path,) = folder.glob("*.so")
    return path


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_the_folder_is_the_users_alone(tmp_path: Path, compiled: list[Path]) -> None:
    folder, before = tmp_path / "native", os.umask(0)
    try:
        for _ in range(3):
            assert native_in(folder, pytest.fail) is not None
    finally:
        os.umask(before)
    assert len(compiled) == 1, "kept"
    assert mode(folder) == 0o700
    assert not mode(file_in(folder)) & 0o022


def test_what_is_not_as_it_was_built_is_not_run(tmp_path: Path, compiled: list[Path]) -> None:
    folder = tmp_path / "native"
    native_in(folder)
    file, whole = file_in(folder), file_in(folder).read_bytes()

    def cut() -> None:
        file.unlink()  # this process runs it
        file.write_bytes(whole[: len(whole) // 2])

    def open_to_others() -> None:
        file.chmod(0o777)

    def linked() -> None:
        file.rename(tmp_path / "elsewhere.so")
        file.symlink_to(tmp_path / "elsewhere.so")

    def without_hash() -> None:
        file.with_suffix(".sha256").unlink()

    for number, change in enumerate((cut, open_to_others, linked, without_hash), 2):
        change()
        assert native_in(folder, pytest.fail) is not None
        assert len(compiled) == number, change.__name__
        assert file.read_bytes() == whole
        assert not file.is_symlink()


def test_a_folder_that_others_could_write_to_is_emptied(
    tmp_path: Path, compiled: list[Path]
) -> None:
    folder = tmp_path / "native"
    native_in(folder)
    folder.chmod(0o777)
    assert native_in(folder, pytest.fail) is not None
    assert len(compiled) == 2
    assert mode(folder) == 0o700


@pytest.mark.parametrize("whose", ["a link", "another user's"])
def test_a_folder_of_others_is_left_alone(
    whose: str, tmp_path: Path, compiled: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, notes = tmp_path / "native", list[str]()
    native_in(folder)
    if whose == "a link":
        folder.rename(tmp_path / "real")
        folder.symlink_to(tmp_path / "real")
    else:
        monkeypatch.setattr(build, "_trusted", lambda: (os.geteuid() + 1,))
    for _ in range(3):
        assert native_in(folder, notes.append) is not None
    assert len(compiled) == 2, "once for this process"
    assert not compiled[1].exists()
    assert set(notes) == {
        f"compiled kernels cannot be kept ({folder}: it "
        + ("is a link" if whose == "a link" else "belongs to another user")
        + "), so that each process compiles them anew, which takes some seconds; set OUTSIZE_HOME to a "
        "folder of yours"
    }


@pytest.fixture
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home where nothing can be made, for root neither: a file is in its place."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OUTSIZE_HOME", str(tmp_path / "file" / "home"))
    log.warn_once.cache_clear()
    return tmp_path / "file" / "home"


def test_without_a_home_a_pack_runs_at_full_speed(
    folder_of: Callable[[str], Path],
    compiled: list[Path],
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pack = fetch.pack(str(folder_of("llama")), quiet=True).path
    request.getfixturevalue("no_home")
    for _ in range(2):
        with outsize.load(str(pack)) as model:
            assert model.transformer.backend.name == "native"
            assert model.generate("a", raw=True, max_tokens=2)[0].new_tokens == 2
    said = [s for s in capsys.readouterr().err.splitlines() if "kernels" in s]
    assert len(said) == 1, said
    assert "each process compiles them anew" in said[0]
    assert "Not a directory" in said[0]
    assert len(compiled) == 1


def test_without_a_home_or_a_compiler_slowness_is_said_once(
    folder_of: Callable[[str], Path],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pack = fetch.pack(str(folder_of("llama")), quiet=True).path
    request.getfixturevalue("no_home")
    monkeypatch.setattr(build, "compiler", lambda: None)
    for _ in range(2):
        outsize.load(str(pack)).close()
    said = [s for s in capsys.readouterr().err.splitlines() if "kernels" in s]
    assert said == [
        "warning: there are no compiled kernels (no C compiler was found): runs are many times slower; "
        "install gcc or clang"
    ]


def test_without_a_compiler_kernels_built_before_are_used(
    tmp_path: Path, compiled: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an image: built with one, run without."""
    native_in(tmp_path / "native")
    monkeypatch.setattr(build, "compiler", lambda: None)
    assert native_in(tmp_path / "native", pytest.fail) is not None


def test_an_installation_without_the_c_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left out by a packager, or in a zip file: every command, `doctor` too, ended with the file's name."""
    monkeypatch.setattr(build, "HEADER", tmp_path / "numbers.h")
    build._key.cache_clear()
    said: list[str] = []
    assert native_in(tmp_path / "native", said.append) is None
    assert "numbers.h: No such file" in said[0]
    assert "install outsize again" in said[0]


def test_without_a_home_no_pack_is_made(
    folder_of: Callable[[str], Path], no_home: Path, compiled: list[Path]
) -> None:
    with pytest.raises(
        PackError, match=r"no pack can be made in .*packs: Not a directory; set OUTSIZE_HOME"
    ):
        fetch.pack(str(folder_of("llama")), quiet=True)


def test_without_a_home_the_machine_is_measured_all_the_same(
    no_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from outsize.plan import machine, probe

    monkeypatch.setattr(probe, "DISK_BYTES", 1 << 20)
    monkeypatch.setattr(probe, "memory_bandwidth", lambda *_: 1e9)
    monkeypatch.setattr(probe, "matmul_speed", lambda *_: 1e9)
    monkeypatch.setattr(machine, "COUNTS", (1,))
    monkeypatch.setattr(machine, "SIZES", (128 << 10,))
    found = machine.known(no_home, lambda text: None)
    assert found.disk[0][2] > 0
