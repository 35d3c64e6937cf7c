"""The user's cache folder: packs, compiled kernels, adapters and measurements (OUTSIZE_HOME)."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def expanded(path: str | Path) -> Path:
    """The path with ~ expanded; as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def home() -> Path:
    """OUTSIZE_HOME, else the user's cache folder."""
    chosen = os.environ.get("OUTSIZE_HOME")
    return expanded(chosen) if chosen else Path(platformdirs.user_cache_dir("outsize"))
