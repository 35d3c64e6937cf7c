"""Holds every figure in docs/results/ to its raw file: `python -m experiments.results.figures [FILE.md...]`.

A paragraph or table is followed by a comment that says, for each of its numbers in turn, where it is from:

    Decodes 1.25 times as fast (9 pairs).
    <!-- raw: nine.results[0].decode.ratio; given -->

An entry is an expression over raw files (below), which must round to the number as it is written; `given`: a
setting, a bar or a name, not measured; `unkept`: measured, but no raw file was kept (how many there may be is
fixed in tests/experiments/test_figures.py, and can only go down). `3 given` are three in a row. Of a table,
`each:` is
for every row, in which `n` is the row's number and `row` its first cell up to a bracket; a line `LABEL: ...`
is for the row whose first cell that is. Files are named once in a document, under experiments/results/:

    <!-- files: nine = epyc-2core/llamacpp-smollm2-9-pairs.json -->

Expressions are Python's, of few kinds: a .jsonl is the list of its objects; `f(run="a", n=1)` are those with
these values, one if there is one; `.key` and `[index]` go on, over each of a list; + joins lists;
median, mean, least, most, spread, count, total, last; `some(x)` is left out where x is 0, `range(xs)` where
there is one; `within(a, b, .2)` counts; `told(x, "at least ")` is a number in a message; `x := ...` names
something for the entries after it; c0, c1, ... are a row's cells. A number before % is 100 times its value.
Numbers in code and links, and those in names (`Zen 4`, `AVX-512`), are no figures. Of the README, what has
entries is checked.
"""

from __future__ import annotations

import ast
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RAW, DOCUMENTS = ROOT / "experiments" / "results", ROOT / "docs" / "results"
NAMES = re.compile(
    r"`[^`]*`|\]\([^)]*\)|<[^>]*>|\b\d{4}-\d\d-\d\d\b|\b[0-9a-f]{7}\b"
    r"|\b(?:Zen|Gemma|Llama|Python|torch|transformers|family|lm-eval|llama-cpp-python) \d[\d.]*\b"
    r"|[A-Za-z]-\d+"
)
NUMBER = re.compile(r"(?<![\w.])(\d{1,3}(?:,\d{3})+|\d+)?(\.\d+)?(?!\.?\d)(?:(?=x\b)|(?!\w))")
SHARE = re.compile(
    r"(?:(?:, [\d.]+)*(?: and| to| or) [\d.]+)?\s?%"
)  # also of 91 in "91, 97 and 99 %"
COMMENT = re.compile(r"<!--\s*(raw|files):(.*?)-->", re.DOTALL)


def _within(of: list[Any]) -> int:
    """How many of the second list are within a share of the first's."""
    return sum(abs(b / a - 1) <= of[2] for a, b in zip(of[0], of[1], strict=True))


def _ceiling(of: list[Any]) -> float:
    """Of a run of experiments/memory/paging.py: its share of what the disk, or the uncapped run, allows."""
    row, whole = of
    read_s = row["bytes_per_token"] / statistics.mean(row["disk_bytes_per_s"][1:])
    return float(max(read_s, 1 / whole["tokens_per_s"]) * row["tokens_per_s"])


FUNCTIONS: dict[str, Callable[[list[Any]], Any]] = {
    "median": statistics.median, "mean": statistics.mean, "least": min, "most": max, "count": len,
    "total": sum, "spread": lambda of: max(of) - min(of), "last": lambda of: of[-1],
    "some": lambda of: of[0] or None, "range": lambda of: max(of) - min(of) if of[1:] else None,
    "prompts": lambda of: sum(x["prompts"] for x in of) if "prompts" in of[0] else None,
    "within": _within, "ceiling": _ceiling,
    "told": lambda of: float(re.findall(re.escape(of[1]) + r"([\d.]+)", of[0])[0]),
}  # fmt: skip
OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b, ast.Div: lambda a, b: a / b, ast.FloorDiv: lambda a, b: a // b,
}  # fmt: skip
GIVEN, UNKEPT = "given", "unkept"


class FigureError(Exception):
    """A figure that is not its raw file's, or an entry that cannot be read."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A number as it is written, and what it says."""

    text: str
    at: int
    value: float
    tolerance: float
    is_share: bool

    def is_of(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        found = value * 100 if self.is_share else value
        return abs(found - self.value) <= self.tolerance * (1 + 1e-9) + 1e-12


def figures(text: str) -> list[Figure]:
    """The numbers of a text, in order."""
    text = NAMES.sub(lambda found: " " * len(found[0]), text)
    return [
        Figure(
            found[0], found.start(), float(found[0].replace(",", "")),
            0.5 * 10 ** (1 - len(found[2] or ".")), SHARE.match(text, found.end()) is not None,
        )
        for found in NUMBER.finditer(text) if found[0]
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Block:
    """A paragraph, or a row of a table, and the entries for its numbers."""

    text: str
    line: int
    entries: tuple[str, ...]
    names: dict[str, object]


def read(path: Path) -> object:
    text = path.read_text(encoding="utf-8")
    return (
        [json.loads(s) for s in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    )


def value_of(text: str, names: dict[str, object]) -> object:
    """What an expression says. Raises FigureError."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if not any(isinstance(n, ast.Name) and n.id in names for n in ast.walk(node)):
            raise ValueError("it reads no raw file")
        return _value(node, names)
    except (SyntaxError, LookupError, TypeError, ValueError, ArithmeticError) as e:
        raise FigureError(f"{text.strip()!r}: {type(e).__name__} {e}") from None


def _value(node: ast.expr, names: dict[str, object]) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return names[node.id]
        case ast.BinOp():
            return OPERATORS[type(node.op)](_value(node.left, names), _value(node.right, names))
        case ast.Attribute():
            return _key(_value(node.value, names), node.attr)
        case ast.Subscript(slice=ast.Slice(lower=lower, upper=upper)):
            ends = [None if end is None else _value(end, names) for end in (lower, upper)]
            return _value(node.value, names)[slice(*ends)]
        case ast.Subscript():
            return _value(node.value, names)[_value(node.slice, names)]
        case ast.Call(func=ast.Name(id=name)) if name in FUNCTIONS:
            values = [_value(a, names) for a in node.args]
            single = len(values) == 1 and isinstance(values[0], list)
            return FUNCTIONS[name](values[0] if single else values)
        case ast.Call():
            wanted = {str(k.arg): _value(k.value, names) for k in node.keywords}
            return _chosen(_value(node.func, names), wanted)
    raise ValueError(f"{type(node).__name__} is not known here")


def _key(value: Any, key: str) -> Any:
    return [_key(item, key) for item in value] if isinstance(value, list) else value[key]


def _chosen(items: Any, wanted: dict[str, object]) -> Any:
    """A model's name matches where it contains the text: `model="qwen"`."""

    def is_one(item: dict[str, Any]) -> bool:
        has = item.get("recipe", {}) | item
        return all(
            str(v) in has["model"] if k == "model" else k in has and has[k] == v
            for k, v in wanted.items()
        )

    found = [item for item in items if is_one(item)]
    if not found:
        raise LookupError(f"nothing has {wanted}")
    return found[0] if len(found) == 1 else found


def entries(text: str) -> tuple[str, ...]:
    """`3 given; a.b` -> given, given, given, a.b"""
    out: list[str] = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        times = re.fullmatch(rf"(\d+) ({GIVEN}|{UNKEPT})", part)
        out += [times[2]] * int(times[1]) if times else [part]
    return tuple(out)


def blocks(text: str) -> Iterator[Block]:
    """Paragraphs and rows with numbers in them. Raises FigureError."""
    names: dict[str, object] = {}
    for kind, body in COMMENT.findall(text):
        if kind == "files":
            for name, _, file in (p.strip().partition(" = ") for p in body.split(";")):
                names[name] = read(RAW / file.strip())
    at = 1
    for part in re.split(r"(\n\s*\n)", text):
        yield from _of_part(part, at, names)
        at += part.count("\n")


def _of_part(part: str, at: int, names: dict[str, object]) -> Iterator[Block]:
    told = " ;".join(body for kind, body in COMMENT.findall(part) if kind == "raw")
    shown = re.sub(r"<!--.*?-->", "", part, flags=re.DOTALL).rstrip()
    if shown.lstrip().startswith("#"):
        return
    if not shown.lstrip().startswith("|"):
        yield Block(shown, at, entries(told), names)
        return
    labelled = re.split(r"^\s*([^:;\n\"]+):\s", told, flags=re.MULTILINE)
    of_row = dict(zip(labelled[1::2], labelled[2::2], strict=True))
    lines = shown.strip().splitlines()
    for n, line in enumerate(lines[2:]):
        label = line.strip("| ").split("|")[0].strip()
        row, cells = re.split(r" \(", label)[0].strip("* "), line.strip("| ").split("|")
        known = names | {"n": n, "row": row}
        known |= {f"c{i}": _cell(cell.strip("* ")) for i, cell in enumerate(cells)}
        listed = entries(of_row.get(row, of_row.get("each", "")))
        yield Block(line, at + 2 + n, listed, known)


def _cell(text: str) -> object:
    """A cell, to choose records by: yes, no, a number or a text."""
    if text in ("yes", "no"):
        return text == "yes"
    return float(text) if re.fullmatch(r"[\d.]+", text) else text


def checked(block: Block) -> list[str]:
    """What each number is: given, unkept, or an expression that says the same. Raises FigureError."""
    found = figures(block.text)
    pairs: list[tuple[str, object]] = []
    names = dict(block.names)
    for entry in block.entries:
        name, is_name, text = entry.partition(" := ")
        if is_name:
            names[name] = value_of(text, names)
            continue
        value = entry if entry in (GIVEN, UNKEPT) else value_of(entry, names)
        if value is not None:
            pairs.append((entry, value))
    for figure, (entry, value) in zip(found, pairs, strict=False):
        if entry not in (GIVEN, UNKEPT) and not figure.is_of(value):
            raise FigureError(f"line {block.line}: {figure.text} is written, {entry} is {value}")
    if len(found) != len(pairs):
        shown = f"{len(found)} numbers ({', '.join(f.text for f in found)})"
        raise FigureError(f"line {block.line}: {shown} and {len(pairs)} entries")
    return [entry for entry, _ in pairs]


def problems(text: str, whole: bool = True) -> tuple[list[str], int, int]:
    """What is wrong, how many figures are backed, how many have no raw file. Not `whole`: of blocks with
    entries."""
    wrong, kinds = [], []
    for block in blocks(text):
        if not whole and not block.entries:
            continue
        try:
            kinds += checked(block)
        except FigureError as e:
            wrong.append(str(e))
    return wrong, sum(k not in (GIVEN, UNKEPT) for k in kinds), kinds.count(UNKEPT)


def main() -> int:
    status = 0
    for path in map(Path, sys.argv[1:] or [*sorted(DOCUMENTS.glob("*.md")), README]):
        whole = path.name != README.name
        wrong, backed, unkept = problems(path.read_text(encoding="utf-8"), whole)
        print(f"{path.name}: {backed} backed, {unkept} without a raw file, {len(wrong)} wrong")
        print("".join(f"  {line}\n" for line in wrong), end="")
        status |= bool(wrong)
    return status


if __name__ == "__main__":
    sys.exit(main())
