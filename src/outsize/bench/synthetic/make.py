"""`outsize bench synthetic`: a model of any family and size with random weights, to measure real reads.

It is written as a GGUF (layers Q4_0, embedding and head Q8_0; or Q4_K_M's mix) with the gguf package, or as a
folder of safetensors (bf16), and then packed like any other: every engine can be timed on the same weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from outsize.bench.synthetic.folder import write_folder
from outsize.bench.synthetic.gguf import write
from outsize.bench.synthetic.shapes import SIZES
from outsize.errors import OptionError
from outsize.log import say
from outsize.pack import fetch


@dataclass(frozen=True, slots=True)
class What:
    """The model that is made up. `types`: of a GGUF's tensors, one of MIXES."""

    family: str
    size: str
    seed: int = 0
    types: str = "q4_0"


def show(path: Path, what: What, encoding: str, quiet: bool) -> None:
    """Write, pack, and print one JSON object."""
    family, size, seed = what.family, what.size, what.seed
    if size not in SIZES:
        raise OptionError(f"size {size!r} is not known; known are {', '.join(SIZES)}")
    if path.exists():
        raise OptionError(f"{path} is there already; give a new name, FILE.gguf or a folder's")
    if not quiet:
        say(f"writing a {family} of size {size} with random weights into {path}")
    if path.suffix == ".gguf":
        written = write(path, family, SIZES[size], seed, types=what.types)
    elif what.types != "q4_0":
        raise OptionError(f"a folder is written in bf16; for types {what.types} name FILE.gguf")
    else:
        written = write_folder(path, family, SIZES[size], seed)
    pack = fetch.pack(str(path), encoding=encoding, quiet=quiet)
    print(
        json.dumps({
            "model": str(path), "model_bytes": written, "pack": pack.path.name,
            "pack_bytes": pack.size, "encodings": pack.encodings, "family": family, "size": size,
            "seed": seed,
        })
    )  # fmt: skip
