"""Does a budget hold, with all that is loaded?
`python -m experiments.memory.capped MODEL... [--wrap 'COMMAND {bytes}'] -o FILE`.

Each run is a process of its own that opens a model with adapters, a draft model, or several times, chats with
it, and tells the most memory it had. Budgets go from the least that its plan names to one that holds all;
with `--wrap` each run gets exactly its budget. One JSON object: every run, and whether none was killed and
none had more than its budget. Adapters are random; a model drafts for itself.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

import outsize
from experiments.runs import HIDDEN, WRAP, Row, arguments, fresh, good, told_all
from outsize.errors import BudgetError, OutsizeError
from outsize.options import LoadOptions
from outsize.pack import fetch
from outsize.plan import decide, probe
from outsize.plan.warmup import runtime_bytes
from outsize.system.memory import peak

SHARES = (0.0, 0.4, 1.1)  # of the weights, over the least budget
MARGIN = 0.02  # of the least budget: what a process takes differs so much from one to the next
RANK, CONTEXT, NEW, LIMIT_S = 128, 1024, 6, 1200
KEPT = "adapters", "draft"  # of a scenario: how a model is opened
TEXT = "Tell me about rivers, stones, clouds and lamps, and what they are for. " * 20


def scenarios(model: str, folder: Path) -> dict[str, Row]:
    """How to open it, by name."""
    one, draft = {"a0": str(folder)}, {"draft": f"model:{model}"}
    return {
        "plain": {}, "one adapter": {"adapters": one},
        "four adapters": {"adapters": {f"a{i}": str(folder) for i in range(4)}},
        "draft model": draft, "adapter and draft model": {"adapters": one, **draft},
        "adapter given later": {"later": one}, "opened three times": {"opens": 3},
    }  # fmt: skip


def least(model: str, how: Row) -> Row:
    """Of the plan; measured here, so run as a process of its own."""
    load_options = LoadOptions(
        context=CONTEXT, quiet=True, **{k: v for k, v in how.items() if k in KEPT}
    )
    runtime = runtime_bytes(decide.compiled(load_options))
    return {"least_bytes": decide.foresee(model, load_options, 1 << 40, runtime)[1].least}


def child(model: str, memory: int, how: Row) -> Row:
    """One run: what it had. What earlier models left may be too much for the least budget: a later one is
    then refused."""
    told: Row = {}
    for _ in range(how.get("opens", 1)):
        try:
            told = once(model, memory, how)
        except BudgetError as e:
            told |= {"refused": str(e)}
            if "new_tokens" not in told:
                raise
    return told | {"peak_bytes": peak()}


def once(model: str, memory: int, how: Row) -> Row:
    """Open, chat, close."""
    kept, tokens, refused = {k: v for k, v in how.items() if k in KEPT}, 0, ""
    with outsize.load(model, memory=memory, context=CONTEXT, quiet=True, **kept) as m:
        for name, path in how.get("later", {}).items():
            try:
                m.load_adapter(name, path)
            except OutsizeError as e:
                refused = str(e)
        for name in [*list(m.adapters)[-1:], None]:
            prompt = [{"role": "user", "content": TEXT}] if m.pack.chat_templates else TEXT
            (reply,) = m.generate([prompt], max_tokens=NEW, adapter=name)
            tokens += reply.new_tokens
        return {
            "new_tokens": tokens, "given_up_bytes": m.given_up, "refused": refused,
            "streamed_bytes": m.placement.streamed, "planned_bytes": m.placement.planned,
        }  # fmt: skip


def runs_of(model: str, folder: Path, wrap: str, only: list[str]) -> list[Row]:
    """Scenarios of a model, each in three budgets."""
    from tests.drafts import write_lora  # not in a child, which has what a user's process has

    pack, out = fetch.pack(model, quiet=True), []
    lora = write_lora(pack.description, folder / pack.path.name, 0, RANK)
    me = ["-m", "experiments.memory.capped", model]
    chosen = {n: how for n, how in scenarios(model, lora).items() if n in only or not any(only)}
    for name, how in chosen.items():
        told = json.dumps(how)
        low = int(good(fresh(*me, "--memory", "0", "--how", told))["least_bytes"] * (1 + MARGIN))
        for share in SHARES:
            memory = low + int(share * pack.size)
            found = fresh(
                *me, "--memory", str(memory), "--how", told, wrap=wrap, cap=memory, limit_s=LIMIT_S
            )
            row = {"model": pack.path.name, "scenario": name, "budget_bytes": memory, **found}
            row["good"] = row["status"] == 0 and row["peak_bytes"] <= memory
            print(row, file=sys.stderr, flush=True)
            out.append(row)
    return out


def main() -> None:
    a = arguments(
        __doc__, "models+", wrap=WRAP, scenario=[""], memory=(-1, HIDDEN[1]), how=("", HIDDEN[1])
    )
    if a.how:
        model, how = a.models[0], json.loads(a.how)
        print(json.dumps(child(model, a.memory, how) if a.memory else least(model, how)))
        return
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        for model in a.models:
            rows += runs_of(model, Path(name), a.wrap, a.scenario)
    names = " ".join(Path(m).name for m in a.models)
    result = {
        "command": f"python -m experiments.memory.capped {names} --wrap ...",
        "processor": probe.processor(), "torch": torch.__version__, "runs": len(rows),
        "killed": sum(r["status"] in (137, -9) for r in rows),
        "over_budget": sum(r["status"] == 0 and not r["good"] for r in rows),
        "failed": sum(r["status"] not in (0, 137, -9) for r in rows), "rows": rows,
    }  # fmt: skip
    told_all(result, a.output)
    sys.exit(not all(r["good"] for r in rows))


if __name__ == "__main__":
    main()
