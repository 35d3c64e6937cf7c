"""The folder of this user where packs, compiled kernels, adapters and measurements are kept."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def expanded(path: str | Path) -> Path:
    """With ~ as the user's home; as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def home() -> Path:
    """OUTSIZE_HOME, else the user's cache folder."""
    chosen = os.environ.get("OUTSIZE_HOME")
    return expanded(chosen) if chosen else Path(platformdirs.user_cache_dir("outsize"))
