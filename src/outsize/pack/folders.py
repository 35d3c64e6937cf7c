"""A pack's folder: its name, and how it comes to be there whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path

MOST = 80  # bytes of a model's name


def safe(name: str) -> str:
    """For a folder's name, which an identity and hidden endings may follow: file systems take 255 bytes,
    or 143 where names are encrypted."""
    kept = "".join(c if c.isalnum() or c in "-._" else "-" for c in name).lstrip(".-")
    return kept.encode()[:MOST].decode(errors="ignore") or "model"


def rename(folder: Path, final: Path) -> bool:
    """False if another process was first. Raises OSError."""
    try:
        os.rename(folder, final)
    except OSError as e:
        if e.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return False
    return True


def sync(folder: Path) -> None:
    """Everything on disk before the rename can be."""
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
