"""Notebooks, containers, network mounts: what users of other programs reported (docs/reports.md)."""

from __future__ import annotations

import copy
import errno
import gc
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import outsize
from outsize import log
from outsize.cli import settings
from outsize.cli.main import app
from outsize.engine.model import Model
from outsize.errors import AdapterError, OptionError
from outsize.pack import fetch, store, write
from outsize.text import template
from tests.golden import tiny


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def system_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")
def test_a_model_that_is_dropped_leaves_nothing_behind(open_paged: Callable[..., Model]) -> None:
    """As in a notebook, where a cell is run again: nobody closed it, whether it was asked or not, was in the
    middle of a reply, or had a chat. Or a load failed late."""
    first = open_paged("llama")
    source, memory = str(first.pack.path), first.placement.budget

    def opened(**more: Any) -> Model:
        return outsize.load(source, memory=memory, context=256, quiet=True, **more)

    def asked() -> None:
        opened().generate("hi", max_tokens=2)

    def in_a_reply() -> None:
        next(iter(opened().stream("hi", max_tokens=9)))

    def in_a_chat() -> None:
        next(opened().conversation(max_tokens=9).say("hi"))

    def failed() -> None:
        with pytest.raises(AdapterError):
            opened(adapters={"a": "/nowhere"})

    for use in (opened, asked, in_a_reply, in_a_chat, failed):
        use()
        gc.collect()
        before = open_files(), system_threads()
        for _ in range(3):
            use()
        gc.collect()
        assert (open_files(), system_threads()) == before, use.__name__


def test_the_callers_random_numbers_stay(open_tiny: Callable[..., Model]) -> None:
    """Without a seed, one is drawn: it was drawn by seeding the caller's generator anew."""
    model = open_tiny()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    seeds = {model.generate("hi", max_tokens=1)[0].options["seed"] for _ in range(3)}
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert len(seeds) == 3


INTERPRETER = """#!/bin/sh
[ "$LD_LIBRARY_PATH" = /where/libpython/is ] || {{ echo "libpython3.so: cannot open" >&2; exit 127; }}
unset LD_LIBRARY_PATH
exec {python} "$@"
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a script as interpreter")
def test_an_interpreter_that_needs_the_loaders_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pythons of clusters and build services find their own library by LD_LIBRARY_PATH."""
    script = tmp_path / "python3"
    script.write_text(INTERPRETER.format(python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setattr(template, "pythons", lambda: iter([str(script)]))
    monkeypatch.setattr(template, "_worker", template.Worker())
    monkeypatch.setenv("LD_LIBRARY_PATH", "/where/libpython/is")
    monkeypatch.setenv("SECRET", "kept here")
    assert template.render("{{ messages[0].content }}", [[{"content": "hi"}]], {}) == ["hi"]
    template._worker.close()


def pack_slowly(
    source: str, monkeypatch: pytest.MonkeyPatch, first: Callable[[], object]
) -> list[Path]:
    """Two packings at once: the second, which does `first`, begins and ends in the middle of the other."""
    begun, go = threading.Event(), threading.Event()
    record, made = write._write_record, list[Path]()

    def slow(*args: Any) -> int:
        if threading.current_thread() is other:
            begun.set()
            assert go.wait(20)
        return record(*args)

    monkeypatch.setattr(write, "_write_record", slow)
    other = threading.Thread(target=lambda: made.append(fetch.pack(source, quiet=True).path))
    other.start()
    try:
        assert begun.wait(20)
        first()
        made.append(fetch.pack(source, quiet=True).path)
    finally:
        go.set()
        other.join(20)
    return made


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
@pytest.mark.usefixtures("own_home")
def test_locks_that_everyone_is_granted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lustre, GPFS and NFS without lockd: the second process deleted the first one's work."""
    import fcntl

    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    source = str(tiny.write_folder(tmp_path / "m", "llama"))
    made = pack_slowly(source, monkeypatch, lambda: None)
    assert len(made) == 2
    assert len(set(made)) == 1
    hidden = [p for p in made[0].parent.iterdir() if ".tmp-" in p.name]
    assert not hidden
    with outsize.load(source, quiet=True) as model:
        assert model.pack.path == made[0]


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK])
@pytest.mark.usefixtures("own_home")
def test_locks_that_are_refused(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    made = fetch.pack(str(tiny.write_folder(tmp_path / "m", "llama")), quiet=True)
    assert store.remove(made.path.parent, made.path.name) > 0


@pytest.mark.parametrize("name", ["x" * 240, "\u6a21\u578b" * 40])
@pytest.mark.usefixtures("own_home")
def test_long_names_of_models(name: str, tmp_path: Path) -> None:
    """The pack's name is longer than the model's, and is counted in bytes."""
    made = fetch.pack(str(tiny.write_folder(tmp_path / name, "llama")), quiet=True)
    assert made.path.name.startswith(name[:20])
    assert len(os.fsencode(made.path.name)) < 110


@pytest.mark.usefixtures("own_home")
def test_no_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container whose root is read-only: a model that is here needs none, others say what to do."""

    def none(*_: object, **__: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    source = str(tiny.write_folder(tmp_path / "m", "llama"))
    monkeypatch.setattr(tempfile, "gettempdir", none)
    assert fetch.outline(source, quiet=True).description.family == "llama"
    with pytest.raises(OptionError, match=r"No usable temporary.*; set TMPDIR to one"):
        fetch.outline("package:nothing==1", quiet=True)


def test_a_config_file_with_a_byte_order_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.toml").write_bytes(b"\xef\xbb\xbfmax_tokens = 3\r\n")
    monkeypatch.setenv("OUTSIZE_CONFIG", str(tmp_path / "config.toml"))
    assert settings.default_map(app)["run"]["max_tokens"] == 3


def test_a_model_is_not_copied(open_tiny: Callable[..., Model]) -> None:
    """As caches of web frameworks and pools of processes would."""
    for make in (copy.copy, copy.deepcopy, lambda m: m.__reduce_ex__(4)):
        with pytest.raises(OptionError, match=r"cannot be pickled or copied.*load it there"):
            make(open_tiny())


ENDING = """
import sys, threading, outsize
model, begun = outsize.load(sys.argv[1], quiet=True), threading.Event()
def serve():
    while True:
        for _ in model.stream([{"role": "user", "content": "hi"}], max_tokens=40):
            begun.set()
threading.Thread(target=serve, daemon=True).start()
assert begun.wait(20)
"""


def test_the_end_of_the_interpreter_while_a_thread_answers(
    folder_of: Callable[[str], Path],
) -> None:
    """Servers compute in daemon threads: the process was ended by SIGABRT, or the thread said that the
    template's process had been killed."""
    command = [sys.executable, "-c", ENDING, str(folder_of("llama"))]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")


class Log:
    """What some programs put in the place of stderr."""

    def write(self, text: str) -> int:
        return len(text)


@pytest.mark.parametrize("place", [None, Log()])
@pytest.mark.usefixtures("own_home")
def test_no_console(
    place: Log | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A windowed program or a service has no stderr; a log has no isatty. What is for people stays off
    stdout."""
    source = str(tiny.write_folder(tmp_path / "m", "llama"))
    monkeypatch.setattr(sys, "stderr", place)
    with outsize.load(source) as model:
        assert model.generate("hi", max_tokens=1)[0].new_tokens == 1
    log.warn("unseen")
    assert capsys.readouterr().out == ""
