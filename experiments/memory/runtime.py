"""What a process takes before any model: `python -m experiments.memory.runtime [-o FILE.jsonl]`.

Run it in an environment with torch's CPU build and in one with its CUDA build: the difference is what the
CUDA libraries cost every run, with a GPU or without. One JSON object: bytes after `import torch`, bytes that
a plan counts with, and, where there is a GPU, bytes once something was put on it.
"""

from __future__ import annotations

import torch

from experiments.runs import Row, arguments, record
from outsize.plan.warmup import runtime_bytes
from outsize.system.memory import resident


def main() -> None:
    a = arguments(__doc__)
    row: Row = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "imported_bytes": resident(),
    }
    row["runtime_bytes"] = runtime_bytes()
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
        row |= {"gpu": torch.cuda.get_device_name(), "with_gpu_bytes": resident()}
    record(row, a.output)


if __name__ == "__main__":
    main()
