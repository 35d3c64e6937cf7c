"""Matrices that are packed some rows at a time, so that packing takes little memory, are the whole ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from outsize.checkpoint.opening import open_checkpoint
from outsize.pack import encode, write
from outsize.version import __version__


def records(source: Path, encoding: str, folder: Path) -> dict[str, bytes]:
    how = write.PackOptions(str(source), encoding, True, __version__)
    made = write.write(
        open_checkpoint(source), how, folder, lambda *_: None, lambda _: None, lambda _: None
    )
    return {t.name: (made.path / t.file).read_bytes() for t in made.tables}


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("encoding", ["q4_0", "int8", "bf16", "int4", "auto"])
def test_slices_are_the_whole(
    family: str,
    encoding: str,
    folder_of: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = folder_of(family)
    whole = records(source, encoding, tmp_path / "whole")
    calls: list[int] = []
    one = encode.encode

    def counted(piece: encode.Piece, num_rows: int) -> object:
        calls.append(num_rows)
        return one(piece, num_rows)

    monkeypatch.setattr(write, "encode", counted)
    assert records(source, encoding, tmp_path / "few") == whole
    least, calls[:] = len(calls), []
    monkeypatch.setattr(encode, "SLICE", 1)
    assert records(source, encoding, tmp_path / "many") == whole
    assert len(calls) > least or encoding == "int4"
