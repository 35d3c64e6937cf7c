"""A suite's row for the raw results: `record.py SUITE VERSION MODEL COMMIT SECONDS OUTPUT >>FILE.jsonl`.

The counts are read from what the suite printed at its end.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

KINDS = {
    "passed": "passed",
    "failed": "failed",
    "skipped": "skipped",
    "left out": "skipped",
    "refused": "refused",  # in words, as it should be
    "xfailed": "refused",  # refused_fields.py: a field is refused by name, the rest is answered
    "deselected": "deselected",
}
ESCAPES = re.compile(r"\x1b\[[\d;]*m")


def counts(text: str) -> dict[str, Any]:
    """Of each kind how many, as the last line that says it; and what else the suite measured."""
    row: dict[str, Any] = {"passed": 0, "failed": 0, "refused": 0, "skipped": 0}
    if found := re.findall(r"(\d+) log-likelihoods compared, largest difference (\S+)", text):
        compared, worst = found[-1]
        row |= {"largest_difference": float(worst)}
        row["passed" if float(worst) <= 1e-4 else "failed"] = int(compared)
        return row
    if found := re.findall(r"(\d+) generated, (\d+) passed", text):
        generated, passed = map(int, found[-1])
        return row | {"passed": passed, "failed": generated - passed}
    lines = [line for line in text.splitlines() if re.search(r"\d+ (passed|failed)", line)]
    for count, kind in re.findall(rf"(\d+) ({'|'.join(KINDS)})", lines[-1]):
        row[KINDS[kind]] = int(count)
    return row


def reasons(text: str) -> dict[str, int]:
    """Why tests were left out or fields were refused, as pytest's summary (-rsx) has it."""
    found: dict[str, int] = {}
    for many, reason in re.findall(r"^SKIPPED \[(\d+)\] \S+ (.+)$", text, re.MULTILINE):
        found[reason] = found.get(reason, 0) + int(many)
    for name, reason in re.findall(r"^XFAIL \S+::(\w+)\S* - (.+)$", text, re.MULTILINE):
        found[f"{name}: {reason}"] = found.get(f"{name}: {reason}", 0) + 1
    return found


def main() -> None:
    suite, version, model, commit, seconds, output = sys.argv[1:]
    text = ESCAPES.sub("", Path(output).read_text(errors="replace"))
    row = {"suite": suite, "version": version, "model": model, "commit": commit}
    row |= counts(text) | {"seconds": int(seconds), "reasons": reasons(text)}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
