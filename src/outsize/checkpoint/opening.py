"""Open the model at a path: a folder, a .gguf or a .safetensors file of a folder."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from outsize.checkpoint import gguf, safetensors
from outsize.checkpoint.bounded import open_regular, refuse_dangling
from outsize.checkpoint.checkpoint import Checkpoint
from outsize.checkpoint.choose import Choice, Place, choose, refuse_cut
from outsize.checkpoint.read_json import read_json
from outsize.errors import CheckpointError, SourceError, UserError


def local_place(folder: Path, text: str, hint: str, depth: int = 1) -> Place:
    """A folder and its folders, `depth` levels down, to choose from."""
    return Place(
        text,
        tuple(_names(folder, depth)),
        lambda name: read_json(folder / name),
        hint,
        lambda name: gguf.general_type(folder / name),
    )


def _names(folder: Path, depth: int) -> list[str]:
    out: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):  # a link that leads to itself, a folder that may not be read
                if entry.is_file():
                    out.append(entry.name)
                elif (
                    depth and not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
                ):
                    below = _names(Path(entry.path), depth - 1)
                    out += [f"{entry.name}/{name}" for name in below]
    return out


def chosen_in(folder: Path, place: Place, wish: str) -> Choice:
    """The model of a folder. Raises UserError; where there is none, and a link leads nowhere, of that."""
    try:
        return choose(place, wish)
    except UserError:
        refuse_dangling(folder)
        raise


def open_checkpoint(path: Path) -> Checkpoint:
    """Parse what is at a path. Raises UserError if it is not a model that outsize can read."""
    if path.is_dir():
        choice = chosen_in(path, local_place(path, str(path), "give the path of one"), "")
        chosen = path / choice.at
        return safetensors.load(chosen) if chosen.is_dir() else gguf.load(chosen)
    if path.name.endswith(".safetensors"):
        return _open_safetensors(path)
    with open_regular(path, SourceError) as f:
        magic = f.read(4)
    if magic != b"GGUF":
        refuse_cut(str(path.parent), path.name, os.listdir(path.parent))
        raise SourceError(
            f"{path} is not a model: it begins with {magic!r}, a GGUF begins with b'GGUF'; "
            "give a .gguf file or a folder with config.json and .safetensors"
        )
    try:
        return gguf.load(path)
    except CheckpointError:  # of a cut file, only the first piece begins like a GGUF
        refuse_cut(str(path.parent), path.name, os.listdir(path.parent))
        raise


def _open_safetensors(path: Path) -> Checkpoint:
    """What lies beside a file decides; of a link to one, beside the link, else beside the file itself."""
    for one in (path, path.resolve()):
        if (one.parent / "config.json").is_file():
            return safetensors.load(one.parent, one.name)
    raise SourceError(
        f"{path} alone is not a model: config.json and tokenizer.json are missing beside it; give the "
        "folder that has all of them"
    )
