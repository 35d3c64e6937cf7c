"""Ours and llama.cpp in turn on the same files:
`python -m experiments.engine.compare MODEL.gguf... [-o FILE]`.

Each pair is two fresh processes, ours and theirs, right after one another, since a shared machine's speed
drifts. Reports the median of each, and of the ratios pair by pair. With `--loops 0,1` each pair is run alone
and beside so many busy programs, in turn, and both shares of the own idle rate are reported. One JSON object
last.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PEER = Path(__file__).parents[1] / "peers" / "llamacpp.py"
KEYS = ("prefill_tokens_per_s", "decode_tokens_per_s")
LOOP = "while True: pass"


def last_json(*command: str) -> dict[str, float]:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """Beside so many programs that want a core each."""
    running = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(loops)]
    try:
        yield
    finally:
        for loop in running:
            loop.kill()
            loop.wait()


def pair(
    model: str, a: argparse.Namespace, loops: int
) -> tuple[dict[str, float], dict[str, float]]:
    own = [] if a.threads is None else ["--threads", str(a.threads)]
    with busy(loops):
        ours = last_json(
            sys.executable, "-c", "from outsize.cli import main; main()", "bench", "speed", model,
            "--repeats", "1", "-q", *own,
        )  # fmt: skip
        theirs = last_json(
            a.peer, str(PEER), model, "--threads", str(a.threads or os.cpu_count()),
            *(["--no-repack"] if a.no_repack else []),
        )  # fmt: skip
    return ours, theirs


def compare(model: str, a: argparse.Namespace) -> list[dict[str, object]]:
    runs = [[pair(model, a, loops) for loops in a.loops] for _ in range(a.pairs)]
    out = [report(model, a, loops, [run[i] for run in runs]) for i, loops in enumerate(a.loops)]
    for i, loops in enumerate(a.loops):
        if loops and a.loops[0] == 0:
            kept = [
                [
                    run[i][who]["decode_tokens_per_s"] / run[0][who]["decode_tokens_per_s"]
                    for run in runs
                ]
                for who in (0, 1)
            ]
            names = zip(("outsize_kept", "llamacpp_kept"), kept, strict=True)
            shares = {name: round(statistics.median(found), 3) for name, found in names}
            out[i] |= shares | {"kept_all": [[round(k, 3) for k in found] for found in kept]}
            print(f"{out[i]['model']:>36} beside {loops}: {shares}", flush=True)
    return out


def report(
    model: str,
    a: argparse.Namespace,
    loops: int,
    runs: list[tuple[dict[str, float], dict[str, float]]],
) -> dict[str, object]:
    out: dict[str, object] = {
        "model": Path(model).name, "pairs": a.pairs, "threads": a.threads, "beside": loops,
    }  # fmt: skip
    for key in KEYS:
        ours, theirs = [o[key] for o, _ in runs], [t[key] for _, t in runs]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        name = key.removesuffix("_tokens_per_s")
        out[name] = {
            "outsize": round(statistics.median(ours), 1),
            "llamacpp": round(statistics.median(theirs), 1),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_min": round(min(ratios), 3),
            "ratio_max": round(max(ratios), 3),
            "outsize_all": ours,
            "llamacpp_all": theirs,
        }
        print(f"{out['model']:>36} {name:>8}: {out[name]}", flush=True)
    return out


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("models", nargs="+")
    p.add_argument("--pairs", type=int, default=5)
    p.add_argument("--threads", type=int, help="else what each takes; llama.cpp one a core")
    p.add_argument("--loops", type=lambda v: [int(n) for n in v.split(",")], default=[0])
    p.add_argument("--peer", default=sys.executable, help="the Python that has llama-cpp-python")
    p.add_argument(
        "--no-repack", action="store_true", help="llama.cpp's weights stay as in the file"
    )
    p.add_argument("-o", "--output", type=Path)
    a = p.parse_args()
    result = {
        "command": "python -m experiments.engine.compare "
        + " ".join(Path(m).name for m in a.models),
        "machine": platform.machine(),
        "results": [found for m in a.models for found in compare(m, a)],
    }
    if a.output is not None:
        a.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
