"""Prose to train on: `python -m experiments.memoryllm.passages NQ.jsonl.gz -o FILE.txt` writes the passages
of a file of questions with theirs (`ctxs`, as Natural Questions has them), each once: a line for its title,
one for its text."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from experiments.runs import arguments


def passages(path: Path) -> list[str]:
    """In the file's order."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found = {
        f"{one['title']}\n{one['text']}\n": None for row in rows for one in row.get("ctxs", ())
    }
    return list(found)


def main() -> None:
    told = arguments(__doc__, "questions")
    told.output.write_text("".join(passages(Path(told.questions))), encoding="utf-8")


if __name__ == "__main__":
    main()
