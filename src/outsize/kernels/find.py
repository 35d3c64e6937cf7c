"""Picks the backend of this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from outsize.home import home
from outsize.kernels.backend import Backend
from outsize.kernels.build import built
from outsize.kernels.native import Native
from outsize.kernels.plain import PLAIN


def find(native: bool = True, tell: Callable[[str], None] | None = None) -> Backend:
    """The C one, compiled into the user's folder; the plain one without a C compiler, or if no other is
    wished for."""
    return (native_in(home() / "native", tell) if native else None) or PLAIN


def native_in(folder: Path, tell: Callable[[str], None] | None = None) -> Native | None:
    """The C one, compiled into `folder` at the first call on a machine; None without a compiler. `tell` is
    told why there is none, or why it could not be kept."""
    found = built(folder)
    if found.note and tell is not None:
        tell(found.note)
    return None if found.library is None else Native(found.library)
