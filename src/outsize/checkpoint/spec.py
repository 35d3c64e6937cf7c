"""A model's name: a path, `hf:org/repo[:file, folder or quantization]`, or `package:name==version[:file]`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from outsize.errors import SourceError
from outsize.home import expanded

SHOWN = 80  # characters of a name that a message quotes
WEIGHTS = (".gguf", ".safetensors")


@dataclass(frozen=True, slots=True)
class Spec:
    """A model's name, understood."""

    kind: str  # "path", "hf" or "package"
    text: str  # as a user would write it again
    name: str  # path, org/repo, or package
    version: str = ""
    file: str = ""  # of hf: also a folder or a quantization
    sha256: str = ""


def names_model(text: str) -> bool:
    """Is this a model rather than a prompt?"""
    if text.startswith(("hf:", "package:")):
        return True
    try:
        return expanded(text).exists() and text.strip() != ""
    except (OSError, ValueError):
        return False


def holds_model(text: str) -> bool:
    """Is what a name names likely a model, and not a folder or file of another kind?"""
    path = expanded(text)
    if text.startswith(("hf:", "package:")) or not path.is_dir():
        return path.suffix in (*WEIGHTS, ".json") or not path.is_file() or _is_gguf(path)
    try:
        found = [*path.glob("*"), *(p for w in WEIGHTS for p in path.glob(f"*/*{w}"))]
    except OSError:
        return False
    return any(p.suffix in WEIGHTS or p.name in ("config.json", "pack.json") for p in found)


def _is_gguf(path: Path) -> bool:
    """By its first bytes: files of other programs' stores have no names of their own."""
    try:
        with open(path, "rb") as f:
            return f.read(4) == b"GGUF"
    except OSError:
        return False


def parse(text: str) -> Spec:
    """Understand a model's name. Raises SourceError."""
    body, _, sha256 = text.partition("#sha256=")
    if body.startswith("hf:"):
        return _parse_hub(text, body, sha256)
    if body.startswith("package:"):
        match = re.fullmatch(r"package:([A-Za-z0-9][\w.-]*)==([\w.!+-]+)(?::(.+))?", body)
        if not match:
            raise SourceError(f"{text!r}: write package:name==version or add :file.gguf")
        name, version, file = match.groups()
        return Spec("package", body, name, version, file or "", sha256)
    path = expanded(text)
    try:
        is_there, is_link = path.exists(), path.is_symlink()
    except (OSError, ValueError) as e:  # a name that is too long, or holds what no name may
        shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
        why = e.strerror if isinstance(e, OSError) else e
        raise SourceError(f"no such model: {shown!r} cannot be looked up ({why})") from None
    if is_link and not is_there:
        raise SourceError(
            f"{text!r} is a link to {os.readlink(path)}, which is not there; fetch the model again"
        )
    if not is_there:
        raise SourceError(
            f"no such model: {text!r} is neither a file nor a folder; a model is a .gguf file, a "
            "safetensors folder, hf:organisation/repository or package:name==version"
        )
    # A file keeps its own name and folder: the hub's cache holds links whose targets have neither.
    whole = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    return Spec("path", str(whole), str(whole))


def _parse_hub(text: str, body: str, sha256: str) -> Spec:
    name, colon, file = body[3:].partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or (colon and not file):
        raise SourceError(
            f"{text!r}: write hf:organisation/repository, or add a file, a folder or a quantization: "
            "hf:organisation/repository:Q4_K_M"
        )
    file = file.rstrip("/")
    if colon and not is_inside(file):
        raise SourceError(f"{text!r}: {file!r} is not a name inside the repository")
    return Spec("hf", body, name, "", file, sha256)


def is_inside(name: str) -> bool:
    """Does a relative name with / stay inside the folder that it is relative to?"""
    path = PurePosixPath(name)
    bad = path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name
    return not bad and bool(path.parts)
