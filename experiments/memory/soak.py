"""A long chat at half residency: `python -m experiments.memory.soak MODEL [--tokens 2000] [-o FILE]`.

Turns of chat until so many tokens were answered, with half of the weights read from disk at each token;
memory, threads and open files are noted after each turn. The first turn fills the context, since keys and
values take their memory as they are stored, and a long prompt its scratch: what comes later has no reason
to take more. One JSON object last (`grown_bytes`: the median of the last quarter's turns less that of the
first); exit status 1 if any grew.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from statistics import median

import outsize
from experiments.runs import arguments, told_all
from outsize.pack import fetch
from outsize.pack.outline import of_pack
from outsize.plan.place import least_bytes
from outsize.plan.warmup import runtime_bytes
from outsize.system.memory import peak, resident

CONTEXT, TURN = 1024, 100
GROWTH = 0.01  # of the budget: the allocator gives back and takes again a few MB from turn to turn
LONG = "Here is a list of words to think about: " + "river stone cloud lamp " * 200


def main() -> None:
    a = arguments(__doc__, "model", tokens=2000)
    outline = of_pack(fetch.pack(a.model, quiet=True))
    memory = least_bytes(outline, runtime_bytes(), 7 * outline.tokenizer_bytes, CONTEXT)
    memory += outline.size // 2
    turns: list[dict[str, int]] = []
    with outsize.load(a.model, memory=memory, context=CONTEXT, quiet=True) as model:
        share = 1 - model.placement.streamed / outline.size
        talk = model.conversation(max_tokens=TURN, temperature=1.0, seed=1, repeat_penalty=1.1)
        answered = 0
        while answered < a.tokens:
            if len(turns) == 1 or answered % 500 > 400:
                talk.reset()
            for _ in talk.say(f"Tell me more, number {len(turns)}." if turns else LONG):
                pass
            answered += talk.reply.new_tokens
            turns.append({
                "answered": answered, "resident": resident(), "threads": threading.active_count(),
                "files": len(os.listdir("/proc/self/fd")),
            })  # fmt: skip
            print(turns[-1], file=sys.stderr, flush=True)
        budget = model.placement.budget
    memory_at, quarter = [t["resident"] for t in turns[1:]], len(turns) // 4
    grown = int(median(memory_at[-quarter:]) - median(memory_at[:quarter]))
    leaks = any(t[key] != turns[0][key] for t in turns for key in ("threads", "files"))
    result = {
        "command": f"python -m experiments.memory.soak {Path(a.model).name} --tokens {a.tokens}",
        "held_share": round(share, 3), "tokens": answered, "turns": len(turns),
        "budget_bytes": budget, "peak_bytes": peak(), "grown_bytes": grown,
        "leaks": leaks, "good": grown <= GROWTH * budget and not leaks and peak() <= budget,
        "resident": [t["resident"] for t in turns],
    }  # fmt: skip
    told_all(result, a.output)
    sys.exit(not result["good"])


if __name__ == "__main__":
    main()
