"""What downloads and packings that were ended leave: shown, removable, cleaned up before the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
from typer.testing import CliRunner

from outsize.cli.main import app
from outsize.errors import SourceError
from outsize.pack import fetch, leftovers, store
from tests.golden import tiny

# A download that never ends, by the command line; what would be fetched is half there.
ENDLESS = """
import sys, time
from pathlib import Path
from outsize.cli import main as cli
from outsize.pack import fetch as library
def fetch(spec, scratch, quiet, progress):
    (scratch / "half.whl").write_bytes(bytes(3_000_000))
    print("fetching", flush=True)
    time.sleep(60)
library.source.fetch = fetch
sys.argv = ["outsize", "pack", sys.argv[1]]
cli.main()
"""


@pytest.fixture
def packs(own_home: Path) -> Path:
    return own_home / "packs"


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(tiny.write_folder(tmp_path / "m", "llama"))


def started(model: str, ignored: int = 0) -> subprocess.Popen[str]:
    """It heeds signals, though a job in the background ignores interrupts, and one under nohup HUP, and what
    they start inherits that."""

    def heed() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number == ignored else signal.SIG_DFL)

    command = [sys.executable, "-c", ENDLESS, model]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heed)
    assert process.stdout is not None
    assert process.stdout.readline() == "fetching\n"
    return process


def ended(process: subprocess.Popen[str], number: int) -> int:
    process.send_signal(number)
    status = process.wait(30)
    process.communicate()
    return status


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_cleans_up(number: int, status: int, packs: Path, model: str) -> None:
    assert ended(started(model), number) == status
    assert not [p.name for p in packs.iterdir() if p.is_dir()]


def test_what_a_kill_leaves(packs: Path, model: str) -> None:
    process = started(model)
    (name,) = (p.name for p in packs.glob("*.fetch"))
    assert leftovers.leftovers(packs) == []  # it is being worked in
    with pytest.raises(SourceError, match="or a process is working in it"):
        store.remove(packs, name)
    ended(process, signal.SIGKILL)
    shown = CliRunner().invoke(app, ["list"])
    assert f"{name}: 3 MB, left by a run that was ended" in shown.stderr
    assert CliRunner().invoke(app, ["rm", name]).stdout == f"removed {name} (3 MB)\n"
    assert leftovers.leftovers(packs) == []
    ended(started(model), signal.SIGKILL)
    assert len(leftovers.leftovers(packs)) == 1
    fetch.pack(model, quiet=True)
    assert not list(packs.glob("*.fetch"))


def test_unfinished_packs_are_shown_too(packs: Path, model: str) -> None:
    half = packs / ".m-0123456789ab-auto.tmp-99"
    half.mkdir(parents=True)
    (half / "embed.records").write_bytes(bytes(2_000_000))
    with filelock.FileLock(packs / ".m-0123456789ab-auto.lock"):
        assert leftovers.leftovers(packs) == []
    assert [(one.path, one.size) for one in leftovers.leftovers(packs)] == [(half, 2_000_000)]
    fetch.pack(model, quiet=True)
    assert not half.exists()


def test_a_download_beside_another_is_left_alone(packs: Path, model: str) -> None:
    with leftovers.scratch(packs) as folder:
        fetch.pack(model, quiet=True)
        assert folder.is_dir()
    assert not folder.exists()


def test_ignored_signals_stay_ignored(packs: Path, model: str) -> None:
    """As under nohup."""
    process = started(model, ignored=signal.SIGHUP)
    os.kill(process.pid, signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    assert ended(process, signal.SIGTERM) == 143
