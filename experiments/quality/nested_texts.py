"""Three texts, each cut in one to learn from and one to test on, and three tasks whose answers are checked:
WikiText (the last 30 % is tested; the task: a name that the passage has had before), GSM8K problems with
solutions, and questions of NQ with a passage that answers them (of both, the last 20 %). Files of plain text,
and a JSON line an item of a task.

    python -m experiments.quality.nested_texts wikitext2.txt gsm8k-train.jsonl.gz nq.jsonl.gz -o FOLDER"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path

from experiments.runs import arguments

PASSAGE = 500  # characters
ITEMS = 200  # of a task
BEFORE, LONGEST = 60, 150  # words


def solved(row: dict[str, str]) -> tuple[str, str]:
    """A problem with its solution, up to the answer; and the answer."""
    steps, _, answer = row["answer"].rpartition("\n#### ")
    steps = re.sub(r"<<[^>]*>>", "", steps)
    return f"Question: {row['question']}\nAnswer: {steps}\nThe answer is", f" {answer}"


def answered(row: dict[str, object]) -> tuple[str, str] | None:
    """A passage and a question, and what answers it, where the passage has that early enough."""
    passage = str(row["ctxs"][0]["text"])[:PASSAGE]  # type: ignore[index]
    answer = next((a for a in row["answers"] if a in passage), None)  # type: ignore[attr-defined]
    if answer is None:
        return None
    return f"{passage}\nQuestion: {row['question']}?\nAnswer:", f" {answer}"


def recalled(passage: str) -> tuple[str, str] | None:
    """A passage up to its last name that it has had well before; and that name."""
    words = passage.split()
    for at in range(len(words) - 1, BEFORE, -1):
        word, seen = words[at], words[max(0, at - LONGEST) : at]
        if len(word) > 3 and word.isalpha() and word[0].isupper() and word in seen[:-10]:
            return " ".join(seen), f" {word}"
    return None


def rows(path: str) -> list[dict[str, object]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def put(folder: Path, name: str, items: Sequence[tuple[str, str]], part: float) -> None:
    cut = round(part * len(items))
    for which, some in (("train", items[:cut]), ("test", items[cut:])):
        text = "\n\n".join(a + b for a, b in some)
        (folder / f"{name}-{which}.txt").write_text(text + "\n", encoding="utf-8")
    put_task(folder, name, items[cut:])


def put_task(folder: Path, name: str, items: Sequence[tuple[str, str]]) -> None:
    lines = [json.dumps({"prompt": a, "answer": b}) for a, b in items[:ITEMS]]
    (folder / f"{name}-task.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    args = arguments(__doc__, "wikitext", "gsm8k", "nq")
    args.output.mkdir(parents=True, exist_ok=True)
    text = Path(args.wikitext).read_text(encoding="utf-8")
    cut = text.index("\n = ", int(0.7 * len(text)))  # where an article begins
    for which, part in (("train", text[:cut]), ("test", text[cut:])):
        (args.output / f"wiki-{which}.txt").write_text(part, encoding="utf-8")
    names = [made for passage in text[cut:].splitlines() if (made := recalled(passage)) is not None]
    put_task(args.output, "wiki", names)
    put(args.output, "gsm8k", [solved(row) for row in rows(args.gsm8k)], 0.8)  # type: ignore[arg-type]
    found = [made for row in rows(args.nq) if (made := answered(row)) is not None]
    put(args.output, "nq", found, 0.8)


if __name__ == "__main__":
    main()
