"""The measurements of experiments/ still import what they use, and the queue for a GPU is ready."""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "experiments").rglob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_they_import(path: Path) -> None:
    for needed, where in (
        ("matplotlib", "plot"),
        ("llama_cpp", "llamacpp"),
        ("transformers", "offload"),
        ("langchain_anthropic", "langchain_chat"),
    ):
        if path.stem == where:
            pytest.importorskip(needed)
    importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def test_the_queue_says_what_it_would_run() -> None:
    done = subprocess.run(
        [ROOT / "experiments" / "gpu" / "queue", "--dry-run"],
        capture_output=True,
        text=True,
        check=True,
    )
    steps = [line.split(",")[0] for line in done.stdout.splitlines() if line.startswith("# ")]
    trainings = ["# recover", "# distill", "# align", "# relu"]
    assert steps == ["# tests", "# memory", "# drafter", "# cut", "# held-out", *trainings]
    assert "adapt masks" in done.stdout
    assert not done.stderr
