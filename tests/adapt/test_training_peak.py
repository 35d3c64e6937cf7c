"""Memory of trainings: none takes more than it says before it begins, of a model whose numbers outweigh the
interpreter. (What is too little is refused: tests/adapt/test_adapt.py, test_distill.py.)"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from outsize.adapt import calibration
from outsize.adapt.repack import BitsOptions, repack
from outsize.bench.synthetic.folder import write_folder
from outsize.bench.synthetic.shapes import Size
from outsize.pack import fetch
from outsize.pack.format import Pack
from tests.command import outsize as outsize_here

SHORT = ("--steps", "2", "--batch", "4", "--length", "128")
ALONE = ("--steps", "2", "--batch", "1", "--length", "256")  # less than what is judged at once
ANSWERED = ("--steps", "2", "--batch", "1", "--length", "112")
# Runs the command line; says what it was to take, and what it took.
SCRIPT = """
import sys
from outsize.adapt import training_peak
from outsize.cli.main import main
from outsize.system.memory import peak

check = training_peak.check

def told(packs, work, options, beside=0):
    print("said", max(training_peak.peak_bytes(packs, work), beside), file=sys.stderr)
    check(packs, work, options, beside)

training_peak.check = told
try:
    main()
finally:
    print("took", peak(), file=sys.stderr)
"""
KINDS = {
    "recover": SHORT,
    "recover --rank 8 --begin zero": SHORT,
    "recover --rank 8": SHORT,
    "feature --rank 8 --given-answers": SHORT,
    "prune --ffn 2/3 --by soft --mask-steps 2": SHORT,
    "share-kv --layers 3": SHORT,
    "feature --rank 8 --given-answers --seed 1": ALONE,
    "feature --rank 8 --at-once 32 -n 8": ANSWERED,
    "prune --ffn .9 --by magnitude": ("--steps", "2", "--batch", "1", "--length", "16"),
    "mtp --given-answers": SHORT,
    "mtp --given-answers --anchors 4": ALONE,
    "mtp --at-once 32 -n 8 --anchors 4": ANSWERED,
    "align --max-tokens 16 --method mdloo": ("--steps", "2", "--batch", "2", "--length", "64"),
}


class Made(NamedTuple):
    base: Pack
    few: Pack
    text: Path
    prompts: Path
    task: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Made:
    """A model of 59 million numbers, in three bits, too; and what to train it on."""
    folder = tmp_path_factory.mktemp("peaks")
    text, prompts, task = (folder / name for name in ("words.txt", "asked.jsonl", "task.json"))
    text.write_text("\n".join(f"line {i} of {i * i % 97} words, {i % 7}" for i in range(9000)))
    rows = [{"prompt": f"{'what is ' * 8}{i}", "answer": "it is so " * 6} for i in range(160)]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    asked = [{"prompt": f"say {i}", "check": {"kind": "most_words", "count": 3}} for i in range(12)]
    task.write_text(json.dumps({"name": "short", "prompts": asked}))
    write_folder(folder / "large", "llama", Size(8, 768, 2048, 12, 4, 4096, 1024), 5)
    base = fetch.pack(str(folder / "large"), quiet=True)
    with mock.patch.multiple(calibration, TIMES=1, HELD_OUT=512):
        few = repack(base, BitsOptions(3.0, calibrate=text, quiet=True)).pack
    return Made(base, few, text, prompts, task)


def words_of(made: Made, kind: str, output: Path) -> list[str]:
    command, *flags = kind.split()
    model = made.few if command == "recover" else made.base
    data = made.prompts if {"--given-answers", "--at-once"} & {*flags} else made.text
    given = ["--task", str(made.task)] if command == "align" else ["--data", str(data)]
    return [
        "adapt", command, str(model.path), *given, "-o", str(output), "-t", "1", "-q", *flags,
        *KINDS[kind],
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_takes_what_it_said(made: Made, kind: str, tmp_path: Path) -> None:
    words = words_of(made, kind, tmp_path / "a.safetensors")
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    said, took = (int(ran.stderr.split(word)[1].split()[0]) for word in ("said", "took"))
    assert 0.4 * said < took <= said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize(
    "words", ["relu --steps 2 --batch 4 --length 128", "nested --tune 2 --steps 2"]
)
def test_whole_feed_forwards_take_what_is_said(made: Made, words: str) -> None:
    command, *flags = words.split()
    said_by = ["adapt", command, str(made.base.path), "--data", str(made.text), "-t", "1", "-q"]
    refused = outsize_here(*said_by, *flags, "--memory", "400MB")
    found = re.search(r"takes about ([\d,]+) MB of memory, and 400 MB may be used", refused.stderr)
    assert refused.returncode == 2
    assert found is not None, refused.stderr
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, *said_by, *flags],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    said, took = 10**6 * int(found[1].replace(",", "")), int(ran.stderr.split("took")[1].split()[0])
    assert 0.4 * said < took <= said
