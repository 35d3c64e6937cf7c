"""`outsize adapt sync` to the end, in several ways: what each makes of every layer, and what is chosen.

    python -m experiments.parallel.adapted MODEL.gguf TEXT.txt [--ranks 2] [--tokens 12288] [-o FILE]

A row for each of: closed form alone, as `adapt sync` is by default; with heads grouped (--group); with
corrections distilled (--distill). `dropped`, `corrected`, `distilled`: rises of the loss, in nats, by each
layer dropped alone; `perplexity` and its interval: of what was chosen for the link within the gate, on text
held out. Rows that FILE has are not measured again; runs that were stopped go on.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from experiments.runs import arguments, record, recorded
from outsize.adapt.sync.run import SyncOptions, run

VARIANTS: dict[str, dict[str, Any]] = {
    "closed form": {}, "grouped": {"group": True}, "distilled": {"distill": 40},
}  # fmt: skip


def row(options: SyncOptions) -> dict[str, Any]:
    made = run(options)
    about, rises = made.about.to_json(), made.rises
    named = {
        n: [round(x, 6) for x in getattr(rises, n)] for n in ("dropped", "corrected", "distilled")
    }
    kept = "perplexity_before", "perplexity", "change_low", "change_high", "wire", "wire_before"
    found = {"chosen": list(made.about.dropped), "held_out": made.about.tokens}
    found |= {name: about[name] for name in kept}
    short = {"short": dict(made.about.bits), "used": list(made.about.corrected)}
    orders = [list(order) for order in made.about.key_orders]
    bits = {f"{place} {b}": round(n, 6) for (place, b), n in rises.bits.items()}
    return {**named, **found, **short, "orders": orders, "bits": bits, "of": made.about.text}


def main() -> int:
    args = arguments(
        __doc__, "model", "text", ranks=2, tokens=12288, length=256, sweep=3, gate=1.0,
        link="100Mbit/s,0.1ms", variants=";".join(VARIANTS), kept=".",
    )  # fmt: skip
    about = {n: getattr(args, n) for n in ("ranks", "tokens", "length", "sweep", "gate", "link")}
    about["model"] = Path(args.model).stem
    known = {row["variant"] for row in recorded(args.output, about)}
    for variant in (v for v in args.variants.split(";") if v not in known):
        name, start = f"{about['model']}-{variant.replace(' ', '-')}.safetensors", time.monotonic()
        file = Path(args.kept) / name
        options = SyncOptions(
            args.model, (Path(args.text),), file, args.ranks, args.link, args.gate, tokens=args.tokens,
            length=args.length, sweep=args.sweep, allow=True, quiet=True,
            resume=file.with_name(f"{name}.checkpoint").exists(), **VARIANTS[variant],
        )  # fmt: skip
        found = {**about, "variant": variant, **row(options)}
        found |= {"seconds": round(time.monotonic() - start)}
        record(found, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
