"""`outsize bench parallel`: rows of ways and links, bytes by formula, cuts that are searched for and kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from outsize.bench import parallel
from outsize.bench.parallel import ParallelOptions
from outsize.cli.main import app
from outsize.engine.ranks.leader import CUTS_FILE, table_key
from outsize.errors import OptionError
from outsize.home import home
from outsize.options import LoadOptions
from outsize.pack import fetch
from outsize.parallel.cuts import read_table
from tests.golden import tiny

FAMILY = "llama+wide"


@pytest.fixture(autouse=True)
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_rows(folder_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    options = ParallelOptions(
        ways="tensor:cut=sum;runahead:cuts=even", links="1Gbit/s,0.05ms",
        prompt_tokens=96, new_tokens=5, repeats=1, search="96",
    )  # fmt: skip
    load = LoadOptions(ranks=2, memory="1GB", quiet=True, chunk=32)
    parallel.show(str(folder_of(FAMILY)), options, load, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["ranks"] == 2
    first, second = found["rows"]
    assert first["how"] == parallel.MODEL_OF_A_LINK
    frame = 64 * 8  # what a step is told by
    assert first["messages_a_token"] == tiny.LAYERS + 1
    assert first["sent_bytes_a_token"] == tiny.LAYERS * 2 * tiny.WIDTH + frame
    assert second["messages_a_token"] == 0
    (cuts,) = found["cuts"]
    assert sum(cuts["searched_cuts"]) == 3
    assert cuts["searched_s"] <= cuts["even_s"]


def test_searched_cuts_are_kept(
    folder_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """For the link that there is; a model of one leaves nothing."""
    name = str(folder_of(FAMILY))
    options = ParallelOptions("runahead", "none", 64, 2, 1, "64,128")
    parallel.show(name, options, LoadOptions(ranks=2, memory="1GB", quiet=True, chunk=32), False)
    shown = capsys.readouterr().out
    assert "as it is" in shown
    assert "a prompt of 128: searched" in shown
    table = read_table(home() / CUTS_FILE, table_key(fetch.pack(name, quiet=True), 2))
    assert table is not None
    assert sorted(table.shares) == [64, 128]
    assert all(sum(s) == pytest.approx(1.0) for s in table.shares.values())


def test_bad_input(folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(OptionError, match=r"RATE\[,LATENCY\] is expected"):
        ParallelOptions(links="fast")
    with pytest.raises(OptionError, match="'tensr' is not known"):
        ParallelOptions(ways="tensr")
    with pytest.raises(OptionError, match="lengths in tokens are expected"):
        ParallelOptions(search="many")
    with pytest.raises(OptionError, match="nothing to share"):
        parallel.show(str(folder_of(FAMILY)), ParallelOptions(), LoadOptions(), False)
    asked = ["bench", "parallel", str(folder_of(FAMILY)), "--ranks", "2", "--links", "fast"]
    ran = CliRunner().invoke(app, asked)
    assert ran.exit_code != 0
