"""LoRA adapters of a model that several ranks share: the leader sends the files, each rank reads its part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from outsize.checkpoint import lora
from outsize.engine.ranks.talk import Talk, field
from outsize.errors import PeerError
from outsize.home import expanded

MOST = 64  # adapters
Files = Mapping[str, Sequence[tuple[str, bytes]]]  # of each adapter: names, and what is in them


def read(adapters: Mapping[str, Path]) -> Files:
    """All that ranks are given. Raises AdapterError."""
    return {name: lora.files(expanded(path)) for name, path in adapters.items()}


def tell(files: Files) -> list[dict[str, object]]:
    """What ranks are told of them: names, and each file's name and size."""
    return [
        {"name": name, "files": [[file, len(data)] for file, data in some]}
        for name, some in files.items()
    ]


def give(talk: Talk, rank: int, files: Files) -> None:
    """In the order in which they were told of."""
    for some in files.values():
        for _, data in some:
            talk.give(rank, data)


@contextmanager
def taken(talk: Talk, told: Mapping[str, Any]) -> Iterator[dict[str, Path]]:
    """What the leader gives, as files that are there for a while, by the adapters' names. Raises
    PeerError."""
    found = field(told, "adapters", list, 0)
    if len(found) > MOST:
        raise PeerError(f"rank 0 sent {len(found)} adapters where at most {MOST} are read", 0)
    with TemporaryDirectory(prefix="outsize-") as folder:
        paths: dict[str, Path] = {}
        for number, one in enumerate(found):
            path = Path(folder) / str(number)
            path.mkdir()
            name, files = _named(one)
            for file, size in files:
                (path / file).write_bytes(talk.take(0, size))
            paths[name] = path if len(files) > 1 else path / files[0][0]
        yield paths


def _named(told: object) -> tuple[str, Sequence[tuple[str, int]]]:
    """Of one adapter: its name, and its files' names and sizes. Raises PeerError for any other file."""
    try:
        name, files = told["name"], told["files"]  # type: ignore[index]
        pairs = [(str(file), int(size)) for file, size in files]
    except (KeyError, TypeError, ValueError):
        pairs = []
    sound = pairs and all(f in lora.FILES and 0 <= size <= lora.LIMIT for f, size in pairs)
    if not sound or not isinstance(name, str):
        raise PeerError("rank 0 sent of an adapter what is no list of its files", 0)
    return name, pairs
