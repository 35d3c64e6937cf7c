"""Ours and what people would pick, in turn, in too little memory:
`python -m experiments.memory.against MODEL.gguf --wrap 'COMMAND {bytes}' [--shares .75,.6,.5]
[-o FILE.jsonl]`.

`--wrap` as in paging.py: caps memory, page cache included, and empties the page cache. Caps are shares of the
file. llama.cpp runs twice: as it comes (it copies some types into another layout, outside the
file's mapping), and with `--no-repack`, where the weights stay in the mapped file and can be dropped. A
safetensors folder is run against transformers with accelerate's offload to disk. One JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from experiments.memory.paging import record

PEERS = Path(__file__).parents[1] / "peers"
OURS = "-m", "experiments.memory.paging"
LLAMA, ACCELERATE = PEERS / "llamacpp.py", PEERS / "offload.py"
LIMIT_S = 1800


def timed(wrap: str, cap: int, *command: str) -> dict[str, object]:
    """What a capped process says, or how it ended."""
    prefix = shlex.split(wrap.format(bytes=cap))
    try:
        done = subprocess.run(
            [*prefix, sys.executable, *command], capture_output=True, text=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return {"ended": f"not done after {LIMIT_S} s"}
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if last.startswith("{"):
        found: dict[str, object] = json.loads(last)
        return found
    return {"ended": "killed" if done.returncode == 137 else done.stderr.strip()[-300:]}


def ours(wrap: str, cap: int, model: str, new: int) -> dict[str, object]:
    found = timed(wrap, cap, *OURS, model, "--worker", "--memory", str(cap), "--new", str(new))
    if "tokens_per_s" in found:
        found["prefill_tokens_per_s"] = round(512 / float(str(found["first_token_s"])), 2)
        found["decode_tokens_per_s"] = found["tokens_per_s"]
    return {k: v for k, v in found.items() if k != "tokens"}


def theirs(wrap: str, cap: int, model: str, new: int, *flags: str) -> dict[str, object]:
    if Path(model).is_dir():
        return timed(wrap, cap, str(ACCELERATE), model, "--cap", str(cap), "--new-tokens", str(new))
    return timed(wrap, cap, str(LLAMA), model, "--cold", "--new-tokens", str(new), *flags)


def size_of(model: Path) -> int:
    files = model.glob("*.safetensors") if model.is_dir() else [model]
    return sum(f.stat().st_size for f in files)


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("models", nargs="+")
    p.add_argument("--wrap", required=True)
    p.add_argument("--shares", default="0.75,0.6,0.5")
    p.add_argument("--least", type=int, default=0, help="caps are never below this many bytes")
    p.add_argument("--pairs", type=int, default=3)
    p.add_argument("--new", type=int, default=12)
    p.add_argument("-o", "--output", type=Path)
    a = p.parse_args()
    for model in a.models:
        for share in (float(s) for s in a.shares.split(",")):
            cap = max(a.least, int(size_of(Path(model)) * share))
            rows = []
            flags = () if Path(model).is_dir() else ("--no-repack",)
            for _ in range(a.pairs):
                rows.append(
                    (ours(a.wrap, cap, model, a.new), theirs(a.wrap, cap, model, a.new, *flags))
                )
            row: dict[str, object] = {"model": Path(model).name, "share": share, "cap": cap}
            for key in ("decode_tokens_per_s", "prefill_tokens_per_s"):
                pairs = [
                    (float(str(o[key])), float(str(t[key])))
                    for o, t in rows
                    if key in o and key in t
                ]
                row[key] = {
                    "ours": [o for o, _ in pairs] or [o.get(key) for o, _ in rows],
                    "theirs": [t for _, t in pairs],
                    "ratio": round(statistics.median(o / t for o, t in pairs), 3)
                    if pairs
                    else None,
                }
            row["theirs_ended"] = [t["ended"] for _, t in rows if "ended" in t]
            if flags:
                row["theirs_as_it_comes"] = theirs(a.wrap, cap, model, a.new)
            row["ours"] = [o for o, _ in rows]
            record(row, a.output)


if __name__ == "__main__":
    main()
