"""Ours and llama.cpp in turn on the same files: `python bench/compare.py MODEL.gguf... [-o FILE]`.

Each pair is two fresh processes, ours and theirs, right after one another, since a shared machine's speed
drifts. Reports the median of each, and of the ratios pair by pair. One JSON object last.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

PEER = Path(__file__).parent / "peers" / "llamacpp.py"
KEYS = ("prefill_tokens_per_s", "decode_tokens_per_s")


def last_json(*command: str) -> dict[str, float]:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def pair(model: str, threads: int) -> tuple[dict[str, float], dict[str, float]]:
    ours = last_json(
        sys.executable, "-c", "from outsize.cli import main; main()", "bench", "speed", model,
        "--repeats", "1", "--threads", str(threads), "-q",
    )  # fmt: skip
    theirs = last_json(sys.executable, str(PEER), model, "--threads", str(threads))
    return ours, theirs


def compare(model: str, pairs: int, threads: int) -> dict[str, object]:
    runs = [pair(model, threads) for _ in range(pairs)]
    out: dict[str, object] = {"model": Path(model).name, "pairs": pairs, "threads": threads}
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
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("-o", "--output", type=Path)
    a = p.parse_args()
    result = {
        "command": "python bench/compare.py " + " ".join(Path(m).name for m in a.models),
        "machine": platform.machine(),
        "results": [compare(m, a.pairs, a.threads) for m in a.models],
    }
    if a.output is not None:
        a.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
