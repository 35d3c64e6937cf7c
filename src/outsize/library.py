"""Fetch and pack a model, or find the pack that is there."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from outsize import __version__
from outsize.bars import Progress, bars
from outsize.checkpoint import source
from outsize.errors import OptionError
from outsize.native.kernels import kernels
from outsize.options import DEFAULT_MODEL, DEFAULT_MODEL_SHA256
from outsize.pack import store, write
from outsize.pack.format import Pack, read_header

ENCODINGS = ("auto", "bf16", "fp32", "int8", "int4")


def pack(model: str = DEFAULT_MODEL, *, encoding: str = "auto", quiet: bool = False) -> Pack:
    """Fetch and pack a model, or find the pack that is there. Raises OutsizeError."""
    if encoding not in ENCODINGS:
        raise OptionError(f"encoding {encoding!r} is not known; known are {', '.join(ENCODINGS)}")
    with bars(quiet) as progress:
        return _pack(source.parse(model), encoding, quiet, progress)


def _pack(spec: source.Spec, encoding: str, quiet: bool, progress: Progress) -> Pack:
    folder = store.home() / "packs"
    if (Path(spec.name) / "pack.json").is_file():
        return read_header(Path(spec.name))
    found = store.find(folder, spec.text, encoding, spec.kind == "path")
    if found is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(".fetch", ".", folder) as scratch_name:
        scratch = Path(scratch_name)
        path = source.fetch(spec, scratch, quiet, progress)
        if spec.text == DEFAULT_MODEL:
            source.check_hash(path, DEFAULT_MODEL_SHA256, progress)
        checkpoint = source.open_checkpoint(path)
        grouped = kernels(store.home() / "native") is not None
        how = write.How(spec.text, encoding, grouped, __version__)
        return write.write(checkpoint, how, folder, progress, warn, silent if quiet else say)


def say(text: str) -> None:
    print(text, file=sys.stderr)


def silent(text: str) -> None:
    """Quiet."""


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
