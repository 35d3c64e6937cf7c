"""Trained tensors on disk: safetensors with what they belong to; written beside, then renamed, so that the
last good file survives whatever happens."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from outsize.checkpoint.lora import KEY
from outsize.errors import DiskFullError, OptionError


def find(path: Path) -> None:
    """Raise OptionError where there is nothing to go on from."""
    if not path.is_file():
        raise OptionError(f"there is no checkpoint {path} to resume; leave out --resume")


def check(resume: bool, path: Path, *others: Path) -> None:
    """Before anything is begun: raise OptionError where nothing is there to go on from, or where a forgotten
    --resume would begin anew over what has not ended. `others`: checkpoints of earlier parts of the same."""
    there = next((p for p in (path, *others) if p.exists()), None)
    if resume and there is None:
        find(path)
    if there is not None and not resume:
        raise OptionError(
            f"{there} is of a run that has not ended; go on with --resume, or remove it to begin anew"
        )


def save(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, object]) -> None:
    """Replace `path`, whole or not at all. Raises DiskFullError."""
    part = path.with_name(path.name + ".part")
    text = json.dumps(dict(about), sort_keys=True)
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        save_file(whole, part, {KEY: text})
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, SafetensorError) as e:
        part.unlink(missing_ok=True)
        size = sum(t.nbytes for t in whole.values())
        full = getattr(e, "errno", None) == errno.ENOSPC or "No space" in str(e)
        why = "the disk is full" if full else str(e)
        raise DiskFullError(
            f"{path} could not be written ({size / 1e6:,.1f} MB): {why}; what was there before is kept, "
            "free some room and go on with --resume"
        ) from None
