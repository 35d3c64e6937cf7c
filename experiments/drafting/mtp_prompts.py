"""The prompts that the shipped mask drafter was trained on, from public texts and from the model itself.

    python -m experiments.drafting.mtp_prompts -o prompts.jsonl --gsm8k gsm8k-train.jsonl.gz \
        --nq nq-open.jsonl.gz --text wikitext2-valid.txt --exclude spec-bench-half.jsonl --own 16000

Own prompts: after the chat template's opening of a user's turn the model is let write what a user might say
(Magpie, arXiv 2406.08464), drawn at temperature 1. The last 500 questions of GSM8K are held out, and no
prompt holds a question of the excluded file.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from experiments.runs import arguments
from outsize.adapt.answers import answer, batches
from outsize.adapt.trainable import TrainableModel, matmul_type
from outsize.engine import open_tokens
from outsize.options import DEFAULT_MODEL
from outsize.pack import fetch
from outsize.progress import silent

HELD_OUT = 500
STARTS = (
    "", "", "", "", "Write", "Write a", "Explain", "How", "What", "Why", "Who", "Pretend", "Imagine",
    "Create", "Translate German to English: ", "Translate German to English: ", "Translate",
    "Summarize: ", "Extract", "Given", "Develop a Python", "Implement", "Discuss", "Describe", "If",
    "Compare", "You are", "Can you", "Evaluate", "A", "In",
)  # fmt: skip


def lines(path: Path) -> list[dict]:
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    return [json.loads(line) for line in text.splitlines()]


def about_facts(path: Path) -> Iterator[str]:
    for item in lines(path):
        question = item["question"].rstrip("?") + "?"
        yield question[0].upper() + question[1:]
        context = "\n\n".join(c["text"] for c in item["ctxs"][:3])
        yield f"{context[:3000]}\n\n{question[0].upper() + question[1:]}"


def about_text(path: Path) -> Iterator[str]:
    text = re.sub(r" @(.)@ ", r"\1", path.read_text()).replace("<unk>", "it")
    parts = [p.strip() for p in text.split("\n") if len(p) > 400]
    for i, part in enumerate(parts):
        yield f"Summarize: {part[:3000]}"
        first = part.split(" . ")[0] + "."
        if i % 2:
            yield f"Translate English to {('German', 'French')[i // 2 % 2]}: {first}"
        if i % 4 == 0:
            yield f"Extract all names of people and places, and all dates, from this text:\n{part[:1200]}"
        if i % 6 == 0:
            yield f"Rewrite this text in simple words:\n{part[:1000]}"
    for title in re.findall(r"\n = ([^=]+) = \n", text):
        yield f"Write a short article about {title}."


def own(model: str, count: int, seed: int, device: torch.device) -> list[str]:
    """What the model itself would ask."""
    made = fetch.pack(model, quiet=True)
    tokens = open_tokens.tokens(made)
    twin = TrainableModel(made, device, matmul_type(device), silent)
    opening = "<|im_start|>user\n"
    picked = [STARTS[i % len(STARTS)] for i in range(count)]
    prompts = [tokens.encode(opening + start, special=True) for start in picked]
    out: list[str] = []
    generator = torch.Generator(device).manual_seed(seed)
    at_once = 512 if device.type == "cuda" else 8

    for rows in batches(prompts, range(count), at_once):
        asked = answer(twin, [prompts[i] for i in rows], 120, frozenset(made.eos), generator)
        for row, text in zip(rows, asked, strict=True):
            if text[-1] in made.eos and len(text) > 3:
                out.append(picked[row] + tokens.decode(text))
    return out


def main() -> None:
    args = arguments(
        __doc__,
        model=DEFAULT_MODEL,
        gsm8k=Path,
        nq=Path,
        text=Path,
        exclude=Path,
        own=16000,
        seed=0,
    )
    asked = [q["question"] for q in lines(args.gsm8k)]
    first = [item["turns"][0] for item in lines(args.exclude)]
    known = {text.strip().lower() for text in first}
    parts = (part for text in first for part in re.split(r"\n+|(?<=[.?!]) ", text))
    known |= {part.strip().lower() for part in parts if len(part) > 20}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    groups = {
        "gsm8k": asked[:-HELD_OUT], "facts": about_facts(args.nq), "text": about_text(args.text),
        "own": own(args.model, args.own, args.seed, device),
    }  # fmt: skip
    rows = []
    for name, prompts in groups.items():
        all_of_them = list(dict.fromkeys(prompts))
        fresh = [p for p in all_of_them if not any(k in p.lower() for k in known)]
        print(f"{name}: {len(all_of_them)}, of which {len(fresh)} stay")
        rows += [{"prompt": p, "group": name} for p in fresh]
    random.Random(args.seed).shuffle(rows)
    held = [{"prompt": question} for question in asked[-HELD_OUT:]]
    for path, found in ((args.output, rows), (args.output.with_suffix(".held-out.jsonl"), held)):
        path.write_text("".join(json.dumps(row) + "\n" for row in found))


if __name__ == "__main__":
    main()
