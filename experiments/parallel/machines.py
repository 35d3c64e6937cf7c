"""What the simulator (parallel/des.py) says of the ways that were measured with two ranks, and what 4 and 8
machines would do: a simulation, fed with measured times.

    python -m experiments.parallel.machines WAYS.jsonl --models FOLDER [--call 1.7e-5] [-o FILE]

WAYS: rows of experiments.parallel.ways of tensor parallelism with sums, of models that are in FOLDER. A
rank's own time of a token is what the leader did not wait, less its head; the simulator adds links, messages
and waiting, and is held to the token's time as measured. `--call`: seconds that sending or receiving costs a
rank, half of what an exchange of a token's sum takes over sockets, as measured (the tenth part,
experiments/parallel/latency.py). With more ranks a rank's own time is a + b / ranks, where one rank's (way
`alone`) and two ranks' say a and b.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from experiments.runs import arguments, record, recorded
from outsize.kernels.turned import row_bytes
from outsize.model_config import Description
from outsize.pack import fetch
from outsize.parallel.des import Compute, Op, Receive, Send, simulate
from outsize.parallel.points import parse_dropped
from outsize.parallel.programs import Layer, Tensor
from outsize.parallel.slow import parse_link
from outsize.parallel.spec import parse_parallel

FRAME = 512  # bytes that tell the others of a step
WORLDS = 2, 4, 8


def token_s(row: dict[str, Any], d: Description, own_s: float, world: int, call_s: float) -> float:
    """Seconds of a token, simulated. `own_s`: of a rank, without the head."""
    spec = parse_parallel(row["way"])
    each = Layer(own_s / d.num_layers / 3, 2 * own_s / d.num_layers / 3)
    size = 2 * d.width if spec.bits == 16 else row_bytes(d.width, spec.bits)
    dropped = parse_dropped(spec.drop)
    tensor = Tensor(d.num_layers, each, size, spec.way.attention == "whole", dropped)
    lead: list[Op] = [*(Send(r, FRAME) for r in range(1, world)), *tensor.program(0, world)]
    follow = [[Receive(0, FRAME), *tensor.program(r, world)] for r in range(1, world)]
    programs = [[*lead, Compute(row["head_s"])], *follow]
    return simulate(programs, parse_link(row["link"]), call_s)[0].end


def foretold(
    row: dict[str, Any], one: dict[str, Any] | None, model: str, call_s: float
) -> dict[str, Any]:
    """`one`: the same model's row with one rank."""
    pack = fetch.find(model)
    assert pack is not None
    d, own_s = pack.description, row["token_s"] - row["waited_s"] - row["head_s"]
    found: dict[str, Any] = {"simulation": True, "own_s": round(own_s, 6)}
    for world in WORLDS:
        of_rank = own_s
        if world > 2:
            if one is None:
                continue
            alone_s = one["token_s"] - one["head_s"]
            part = 2 * (alone_s - own_s)
            of_rank = alone_s - part + part / world
        found[f"ranks_{world}_s"] = round(token_s(row, d, of_rank, world, call_s), 6)
    found["error"] = round(found["ranks_2_s"] / row["token_s"] - 1, 4)
    names = "model", "way", "link", "encoding", "memory", "disk", "prompt", "token_s"
    return {**{name: row[name] for name in names}, **found}


def main() -> int:
    args = arguments(__doc__, "ways", models=".", call=1.7e-5)
    rows = recorded(Path(args.ways))
    single = {(r["model"], r["encoding"]): r for r in rows if r.get("way") == "alone"}
    for row in rows:
        if not row.get("way", "").startswith("tensor:") or row["prompt"] > 256:
            continue
        spec = parse_parallel(row["way"])
        if spec.way.cut != "sum" or row["link"] == "loopback":
            continue
        model = str(Path(args.models) / f"{row['model']}.gguf")
        if not Path(model).exists():
            continue
        one = single.get((row["model"], row["encoding"]))
        record(foretold(row, one, model, args.call), args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
