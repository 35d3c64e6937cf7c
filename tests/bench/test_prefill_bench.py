"""`outsize bench prefill`: every way is run on every length, and told apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from outsize.bench.prefill import sizes, ways
from outsize.errors import OptionError
from tests.command import outsize as run


def test_a_row_for_each_length_and_way(
    folder_of: Callable[[str], Path], tmp_path: Path, own_home: Path
) -> None:
    page, lazy = tmp_path / "page.html", "lazy:keep=.5,after=.4,mode=once"
    flags = ["--lengths", "64,300", "--repeats", "1", "--lazy", lazy, "--html", str(page), "-q"]
    done = run("bench", "prefill", str(folder_of("llama")), *flags, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    names = ["full", lazy, "cold", "warm, memory", "warm, disk"]
    assert [(r["tokens"], r["mode"]) for r in rows] == [(n, m) for n in (64, 300) for m in names]
    by = {(r["tokens"], r["mode"]): r for r in rows}
    assert by[300, "warm, memory"]["reused_tokens"] == by[300, "warm, disk"]["reused_tokens"] == 256
    assert by[300, "warm, disk"]["bytes_read"] > 0
    assert by[300, lazy]["computed_share"] < 0.9
    assert by[300, "full"]["computed_share"] == 1
    assert "<svg" in page.read_text()


def test_lengths_and_ways() -> None:
    assert sizes("1k,512,2K") == [512, 1024, 2048]
    assert ways("lazy:fast,lazy:keep=.5,after=.3,lazy") == [
        "lazy:fast",
        "lazy:keep=.5,after=.3",
        "lazy",
    ]
    assert ways("") == []
    with pytest.raises(OptionError, match="--lengths has 'long'; numbers of tokens are expected"):
        sizes("512,long")


def test_longer_than_the_context_or_the_text(
    folder_of: Callable[[str], Path], tmp_path: Path, own_home: Path
) -> None:
    model, text = str(folder_of("llama")), tmp_path / "t.txt"
    text.write_text("short")
    done = run("bench", "prefill", model, "--lengths", "4k", "-q")
    assert done.returncode == 2
    assert "--lengths goes to 4,096 tokens, the context holds 512" in done.stderr
    done = run("bench", "prefill", model, "--lengths", "100", "--prompts", str(text), "-q")
    assert done.returncode == 2
    assert "tokens, and the longest prompt 100; give a longer text" in done.stderr
