"""Fixtures: a home of its own for every run, and tiny models."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import pytest

import outsize
from outsize.draft.spec import parse_draft
from outsize.engine import load as loading
from outsize.engine.model import Model
from outsize.kernels.backend import Backend
from outsize.kernels.find import native_in
from outsize.kernels.plain import PLAIN
from outsize.pack import fetch
from outsize.pack.outline import of_pack
from outsize.plan import decide, place
from outsize.plan.drafts import with_drafting
from outsize.system import memory as budget
from tests import IS_WORKER
from tests.golden import tiny


def pytest_xdist_auto_num_workers() -> int | None:
    """A process a core, up to eight. (`-n 0`: all in this one; `-n 3`: as said.)"""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return min(8, len(allowed(0)))


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """This process's home. Kernels are compiled once a run, for all processes of it."""
    folder = tmp_path_factory.mktemp("home")
    kept = {k: v for k, v in os.environ.items() if k.startswith("OUTSIZE_")}
    for name in kept:
        del os.environ[name]
    os.environ |= {"OUTSIZE_HOME": str(folder), "OUTSIZE_CONFIG": str(folder / "config.toml")}
    if IS_WORKER:  # alone, the first test that needs kernels builds them
        shared = tmp_path_factory.getbasetemp().parent / "kernels"
        with filelock.FileLock(shared.with_suffix(".lock")):
            native_in(shared / "native")
        link_kernels(shared, folder)
    yield folder
    os.environ |= kept


def link_kernels(compiled: Path, home: Path) -> None:
    """Hand compiled kernels on to another home. (There are none without a compiler.)"""
    if (compiled / "native").is_dir():
        shutil.copytree(compiled / "native", home / "native", copy_function=os.link)


@pytest.fixture
def own_home(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home in which there is nothing but compiled kernels."""
    folder = tmp_path / "home"
    native_in(home / "native")
    link_kernels(home, folder)
    monkeypatch.setenv("OUTSIZE_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's tiny safetensors folder."""
    base = tmp_path_factory.mktemp("models")

    def make(family: str) -> Path:
        path = base / family
        return path if path.exists() else tiny.write_folder(path, family)

    return make


@pytest.fixture(scope="session")
def open_tiny(folder_of: Callable[[str], Path], home: Path) -> Iterator[Callable[..., Model]]:
    """Open a family's tiny model, once for each way of opening it."""
    opened: dict[tuple[object, ...], Model] = {}

    def make(family: str = "llama", encoding: str = "bf16", native: bool = True) -> Model:
        key = (family, encoding, native)
        if key not in opened:
            opened[key] = outsize.load(
                str(folder_of(family)), encoding=encoding, native=native, quiet=True
            )
        return opened[key]

    yield make
    for model in opened.values():
        model.close()


@pytest.fixture
def open_paged(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Model]]:
    """Open a family's tiny model with nothing held that can be streamed."""
    monkeypatch.setattr(loading, "runtime_bytes", lambda *_: 0)
    monkeypatch.setattr(budget, "resident", lambda *_: 0)
    monkeypatch.setattr(place, "TOKENIZER_PEAK", 0)
    monkeypatch.setattr(place, "TOKENIZER_FACTOR", 0)
    opened: list[Model] = []

    def make(family: str, draft: str = "auto", native: bool = True) -> Model:
        outline = of_pack(fetch.pack(str(folder_of(family)), quiet=True))
        spec = parse_draft(draft)
        if spec.kind == "model":
            smaller = of_pack(fetch.pack(spec.source, quiet=True))
            outline = decide.with_all(outline, {}, smaller, None)
        outline = outline if spec.kind == "auto" else with_drafting(spec, outline)
        least = place.least_bytes(outline, 0, 0, 256)
        opened.append(
            outsize.load(
                str(folder_of(family)),
                memory=least,
                context=256,
                draft=draft,
                native=native,
                quiet=True,
            )
        )
        return opened[-1]

    yield make
    for model in opened:
        model.close()


@pytest.fixture(scope="session", params=["python", "native"])
def reading(request: pytest.FixtureRequest, home: Path) -> Backend:
    """Who reads records: threads of Python, or of the compiled kernels."""
    if request.param == "python":
        return PLAIN
    found = native_in(home / "native")
    return found if found is not None else pytest.skip("no C compiler here")
