"""Notebooks, containers, network mounts: what users of others reported, tried here (docs/reports.md)."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import outsize
from outsize.api import Model
from outsize.decode import template
from outsize.errors import AdapterError


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
