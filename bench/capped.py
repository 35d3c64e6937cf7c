"""Does a budget hold, with all that is loaded? `python bench/capped.py MODEL... [--wrapper CMD] -o FILE`.

Each run is a process of its own that opens a model with adapters, a draft model, or several times, chats with
it, and tells the most memory it had. Budgets go from the least that its plan names to one that holds all.
`--wrapper` is a command that runs another one under a hard memory cap, `CMD BYTES COMMAND...`, and ends with
status 137 if the kernel killed it: each run gets exactly its budget. One JSON object: every run, and whether
none was killed and none had more than its budget. Adapters are random; a model drafts for itself.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import outsize
from outsize.engine import load as loading
from outsize.errors import BudgetError, OutsizeError
from outsize.model.lora import widths
from outsize.pack import fetch
from outsize.pack.format import Pack
from outsize.plan import probe
from outsize.plan.load_options import LoadOptions
from outsize.plan.warmup import runtime_bytes
from outsize.system.memory import peak

SHARES = (0.0, 0.4, 1.1)  # of the weights, over the least budget
MARGIN = 0.02  # of the least budget: what a process takes differs so much from one to the next
RANK, CONTEXT, NEW = 128, 1024, 6
TEXT = "Tell me about rivers, stones, clouds and lamps, and what they are for. " * 20
PEFT = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn",
        "gate": "mlp", "up": "mlp", "down": "mlp"}  # fmt: skip


def scenarios(model: str, folder: Path) -> dict[str, dict[str, object]]:
    """How to open it, by name."""
    files = {f"a{i}": str(folder) for i in range(4)}
    one = {"a0": str(folder)}
    draft = {"draft": f"model:{model}"}
    return {
        "plain": {}, "one adapter": {"adapters": one}, "four adapters": {"adapters": files},
        "draft model": draft, "adapter and draft model": {"adapters": one, **draft},
        "adapter given later": {"later": one}, "opened three times": {"opens": 3},
    }  # fmt: skip


def write_adapter(pack: Pack, folder: Path) -> None:
    """Random factors for every projection, as PEFT saves them."""
    folder.mkdir()
    d, made = pack.description, {}
    for layer in range(d.num_layers):
        for part, block in PEFT.items():
            rows, width = widths(d)[part]
            stem = f"base_model.model.model.layers.{layer}.{block}.{part}_proj"
            made[f"{stem}.lora_A.weight"] = torch.randn(RANK, width) / width
            made[f"{stem}.lora_B.weight"] = torch.randn(rows, RANK) * 0.01
    save_file(made, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def load_options_of(how: dict[str, object]) -> LoadOptions:
    named = {k: v for k, v in how.items() if k in ("adapters", "draft")}
    return LoadOptions(context=CONTEXT, quiet=True, **named)  # type: ignore[arg-type]


def least(model: str, how: dict[str, object]) -> int:
    """Of the plan; measured here, so run as a process of its own."""
    load_options = load_options_of(how)
    runtime = runtime_bytes(loading.compiled(load_options))
    return loading.foresee(model, load_options, 1 << 40, runtime)[1].least


def child(model: str, memory: int, how: dict[str, object]) -> dict[str, object]:
    """One run: what it had. What earlier models left may be too much for the least budget: a later one is
    then refused."""
    told: dict[str, object] = {}
    for _ in range(int(str(how.get("opens", 1)))):
        try:
            told = once(model, memory, how)
        except BudgetError as e:
            told |= {"refused": str(e)}
            if "new_tokens" not in told:
                raise
    return told | {"peak_bytes": peak()}


def once(model: str, memory: int, how: dict[str, object]) -> dict[str, object]:
    """Open, chat, close."""
    load_options, tokens, refused = load_options_of(how), 0, ""
    with outsize.load(
        model,
        memory=memory,
        context=CONTEXT,
        quiet=True,
        draft=load_options.draft,
        adapters=load_options.adapters,
    ) as m:
        for name, path in dict(how.get("later", {})).items():  # type: ignore[call-overload]
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


def asked(arguments: list[str]) -> tuple[int, str, str]:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=1200)
    return done.returncode, done.stdout, done.stderr


def runs_of(
    model: str, folder: Path, wrapper: list[str], only: list[str]
) -> list[dict[str, object]]:
    """Scenarios of a model, each in three budgets."""
    pack, out = fetch.pack(model, quiet=True), list[dict[str, object]]()
    lora = folder / pack.path.name
    write_adapter(pack, lora)
    me = [sys.executable, __file__, "--child"]
    chosen = {n: how for n, how in scenarios(model, lora).items() if not only or n in only}
    for name, how in chosen.items():
        told = json.dumps(how)
        status, text, error = asked([*me, model, "0", told])
        assert status == 0, error
        low = int(int(text) * (1 + MARGIN))
        for share in SHARES:
            memory = low + int(share * pack.size)
            command = [*wrapper, str(memory)] if wrapper else []
            status, text, error = asked([*command, *me, model, str(memory), told])
            found = json.loads(text) if status == 0 else {"error": error.strip()[-300:]}
            row = {"model": pack.path.name, "scenario": name, "budget_bytes": memory,
                   "status": status, **found}  # fmt: skip
            row["good"] = status == 0 and found["peak_bytes"] <= memory
            row["cap"] = error.strip().splitlines()[-1] if wrapper and error.strip() else ""
            print(row, file=sys.stderr, flush=True)
            out.append(row)
    return out


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("models", nargs="*")
    p.add_argument("--wrapper", default="")
    p.add_argument("--scenario", action="append", default=[], help="all if none is named")
    p.add_argument("-o", "--output", type=Path)
    p.add_argument("--child", nargs=3)
    a = p.parse_args()
    if a.child:
        model, memory, how = a.child[0], int(a.child[1]), json.loads(a.child[2])
        print(json.dumps(child(model, memory, how)) if memory else least(model, how))
        return
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        for model in a.models:
            rows += runs_of(model, Path(name), shlex.split(a.wrapper), a.scenario)
    result = {
        "command": f"python bench/capped.py {' '.join(Path(m).name for m in a.models)} --wrapper ...",
        "processor": probe.processor(), "torch": torch.__version__, "runs": len(rows),
        "killed": sum(r["status"] in (137, -9) for r in rows),
        "over_budget": sum(r["status"] == 0 and not r["good"] for r in rows),
        "failed": sum(r["status"] not in (0, 137, -9) for r in rows), "rows": rows,
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    if a.output is not None:
        a.output.write_text(text + "\n")
    print(text)
    sys.exit(not all(r["good"] for r in rows))


if __name__ == "__main__":
    main()
