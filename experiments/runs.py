"""What measurements share: fresh processes under a memory cap, pairs of runs in turn, and JSON lines."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OUTSIZE = "-c", "from outsize.cli.main import main; main()"
PEERS = Path(__file__).parent / "peers"
LLAMA, ACCELERATE = str(PEERS / "llamacpp.py"), str(PEERS / "offload.py")
LLAMA_SERVER = str(PEERS / "llamaserver.py")
HIDDEN = False, argparse.SUPPRESS  # of a flag that a script gives to itself
WRAP = "", "a command that caps what follows it at {bytes} of memory, page cache included"
Row = dict[str, Any]


def arguments(doc: str | None, /, *names: str, **flags: Any) -> argparse.Namespace:
    """What a script was told: `names` in turn ("models+": one or more), and flags by what they are where they
    are left out, which is also their type; a type itself: must be given. (default, help) says more."""
    shape = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=doc, formatter_class=shape)
    p.add_argument("-o", "--output", type=Path, help="a file (or folder) for the results")
    for name in names:
        p.add_argument(name.rstrip("+?"), nargs=name[-1] if name[-1] in "+?" else None)
    for name, told in flags.items():
        default, more = told if isinstance(told, tuple) else (told, None)
        flag = "--" + name.replace("_", "-")
        if default is False:
            p.add_argument(flag, action="store_true", help=more)
        elif isinstance(default, type):
            p.add_argument(flag, type=default, required=True, help=more)
        elif isinstance(default, list):
            p.add_argument(flag, nargs="*", type=type(default[0]), default=default, help=more)
        else:
            p.add_argument(flag, type=type(default), default=default, help=more)
    return p.parse_args()


def fresh(
    *command: str, wrap: str = "", cap: int = 0, python: str = "", limit_s: float | None = None
) -> Row:
    """The JSON object in the last line of a Python process of its own, or its error; and how it ended (124:
    not in time; 137: killed; `kills`, where the command that caps memory tells of them)."""
    prefix = shlex.split(wrap.format(bytes=cap)) if wrap and cap else []
    whole = [*prefix, python or sys.executable, *command]
    try:
        done = subprocess.run(whole, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"cap": cap, "status": 124, "error": f"not done after {limit_s} s"}
    last = (done.stdout.strip().splitlines() or [""])[-1]
    found = json.loads(last) if last.startswith("{") else {"error": done.stderr.strip()[-600:]}
    kills = re.findall(r"oom_kills=(\d+)", done.stderr)
    return {"cap": cap, "status": done.returncode, "kills": kills} | found


def good(row: Row) -> Row:
    """Of a run that must not fail."""
    if "error" in row:
        raise SystemExit(row["error"])
    return row


def recorded(output: Path | None, about: Row | None = None) -> list[Row]:
    """Rows that a file has by now, of which all of `about` is true."""
    lines = output.read_text().splitlines() if output is not None and output.exists() else []
    return [row for row in map(json.loads, lines) if (about or {}).items() <= row.items()]


def record(row: Row, output: Path | None = None) -> None:
    """One JSON object a line: shown, and added to a file."""
    line = json.dumps(row)
    print(line, flush=True)
    if output is not None:
        with output.open("a") as f:
            f.write(line + "\n")


def told_all(result: Row | list[Row], output: Path | None) -> None:
    """One JSON object or list: shown, and all that is in a file."""
    print(json.dumps(result))
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n")


def compared(ours: Sequence[float], theirs: Sequence[float]) -> Row:
    """Medians of both, and of the ratios pair by pair."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    if not ratios:
        return {"ours": None, "theirs": None, "ratio": None}
    return {
        "ours": statistics.median(ours), "theirs": statistics.median(theirs),
        "ratio": round(statistics.median(ratios), 3), "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3), "ours_all": list(ours), "theirs_all": list(theirs),
    }  # fmt: skip


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """Beside so many programs that want a core each, for an hour at the most."""
    loop = "import time\nend = time.time() + 3600\nwhile time.time() < end: pass"
    running = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()
