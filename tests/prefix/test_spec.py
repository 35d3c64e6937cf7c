"""What --prefix-cache says, and what is refused before anything is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import outsize
from outsize.errors import OptionError
from outsize.prefix import folder
from outsize.prefix.spec import DAILY, PrefixSpec, parse_prefix
from tests.command import outsize as run


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("off", PrefixSpec("off")),
        ("memory", PrefixSpec("memory")),
        ("disk", PrefixSpec("disk", None, DAILY)),
        ("disk:20GB", PrefixSpec("disk", 20 * 10**9)),
        ("disk:1MiB,writes=5GB", PrefixSpec("disk", 1 << 20, 5 * 10**9)),
        ("disk,writes=1k", PrefixSpec("disk", None, 1000)),
    ],
)
def test_what_it_says(text: str, spec: PrefixSpec) -> None:
    assert parse_prefix(text) == spec


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ram", r"prefix_cache is 'ram'; known are off, memory or disk\[:SIZE\]"),
        ("", "known are off"),
        ("memory:4GB", "only disk takes sizes"),
        ("off,writes=4GB", "only disk takes sizes"),
        ("disk:much", "'much', which is no size"),
        ("disk:0", "give more, or prefix_cache=off"),
        ("disk,reads=4GB", "has 'reads=4GB'; known is writes=SIZE"),
        ("disk,writes=", "'', which is no size"),
    ],
)
def test_what_it_cannot_say(text: str, problem: str, folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(OptionError, match=problem):
        outsize.load(str(folder_of("llama")), prefix_cache=text, quiet=True)


def test_more_than_the_disk_has(own_home: Path, folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(
        OptionError, match=r"may take 9,000,000\.0 GB, and the disk of .* has .* free"
    ):
        outsize.load(str(folder_of("llama")), prefix_cache="disk:9000TB", quiet=True)


def test_a_folder_of_another_version_until_it_is_cleared(own_home: Path) -> None:
    there = folder.prepare(PrefixSpec("disk"))[0]
    (there / folder.MARK).write_text("7\n")
    with pytest.raises(
        OptionError, match=r"another version of outsize .format '7', this one has 1"
    ):
        folder.prepare(PrefixSpec("disk"))
    assert "removed 0 blocks" in run("cache", "clear").stderr
    folder.prepare(PrefixSpec("disk"))


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners of files here")
def test_a_folder_of_another_user(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.prepare(PrefixSpec("disk"))
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    with pytest.raises(OptionError, match=r"belongs to another user .number "):
        folder.prepare(PrefixSpec("disk"))


def test_a_folder_that_cannot_be_made(own_home: Path) -> None:
    folder.folder_of().parent.mkdir(parents=True, exist_ok=True)
    folder.folder_of().write_text("a file")
    with pytest.raises(OptionError, match="cannot be made"):
        folder.prepare(PrefixSpec("disk"))


def test_lossy_experts_keep_nothing(folder_of: Callable[[str], Path]) -> None:
    """What a prompt's keys and values are depends on what was in memory."""
    lossy = {"experts": "lru,misses=drop", "quiet": True}
    with pytest.raises(OptionError, match="leave one of them out"):
        outsize.load(str(folder_of("qwen3_moe")), prefix_cache="memory", **lossy)
    with outsize.load(str(folder_of("qwen3_moe")), **lossy) as model:
        assert model.scheduler.prefixes is None
    with outsize.load(
        str(folder_of("qwen3_moe")), prefix_cache="disk", defaults=["prefix_cache"], **lossy
    ) as model:
        assert model.scheduler.prefixes is None


def test_for_one_prompt_memory_is_of_no_use() -> None:
    done = run("run", "--prefix-cache", "memory", "hello")
    assert done.returncode == 2
    assert "is forgotten with this one prompt; give disk" in done.stderr
