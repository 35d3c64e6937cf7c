"""The server alone, load by load: `python -m experiments.serve.loads MODEL [--only NAMES] [-o FILE.jsonl]`.

Each is a run of `outsize bench serve`, whose rows are kept with the figure's name and the command. What is
compared runs in turn: with the model in process, request by request; numbers of streams, turn by turn.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from experiments.runs import OUTSIZE, arguments, record
from outsize.plan import probe

# By figure: the flags, but for the model.
FIGURES = {
    "http": "--loads one,batch --in-process --requests 9 --streams 8 --context 1024",
    "idle": "--loads idle --in-process --context 1024",
    "chat": "--loads one,idle --chat --in-process --requests 20 --context 1024",
    "gaps": "--loads many --streams 8 --requests 24 --new-tokens 256 --repeats 5 --context 1024",
    "long": "--loads long --repeats 5 --streams 8 --context 4608",
    "prefix": "--loads prefix --chat --repeats 3 --streams 2 --context 4096",
    "disconnects": "--loads disconnects --chat --streams 8 --context 1024",
    "overload": "--loads overload --streams 8 --context 1024 --serve '--max-queue 32'",
    "hostile": "--loads hostile --chat --streams 8 --context 1024",
    "bits": "--loads bits --streams 16 --context 1024",
}
LIMIT_S = 1800.0


def run(figure: str, model: str, more: list[str], output: Path | None) -> None:
    """One figure; a row of its own where the command fails."""
    words = ["bench", "serve", model, *shlex.split(FIGURES[figure]), *more]
    told = {
        "figure": figure,
        "command": shlex.join(["outsize", *words[:2], Path(model).name, *words[3:]]),
    }
    told["processor"] = probe.processor()
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, *OUTSIZE, *words, "--json", "-q", "--limit", str(LIMIT_S)],
        capture_output=True, text=True,
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not rows:
        rows = [{"error": done.stderr.strip()[-600:], "status": done.returncode}]
    for row in rows:
        record(told | row, output)
    print(f"{figure}: {time.monotonic() - started:.0f} s", file=sys.stderr)


def main() -> None:
    a = arguments(
        __doc__, "model", only=("", f"of {', '.join(FIGURES)}; comma-separated"),
        more=("", "more flags of `outsize bench serve`, as one text"),
    )  # fmt: skip
    for figure in a.only.split(",") if a.only else FIGURES:
        run(figure, a.model, shlex.split(a.more), a.output)


if __name__ == "__main__":
    main()
