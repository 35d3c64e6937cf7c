"""outsize runs language models that outsize the memory you have, and answers fast.

    import outsize
    with outsize.load("model.gguf") as m:
        for piece in m.stream("Why is the sky blue?"):
            print(piece, end="")

Importing this is cheap; torch is imported by `load`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from outsize import errors
from outsize.options import Options
from outsize.version import __version__ as __version__

if TYPE_CHECKING:
    from outsize.engine.conversation import Conversation
    from outsize.engine.load import load
    from outsize.engine.model import Model
    from outsize.engine.reply import Reply, Score
    from outsize.plan.placement import Placement

__all__ = ["Conversation", "Model", "Options", "Placement", "Reply", "Score", "errors", "load"]

HOME = {
    "Conversation": "outsize.engine.conversation",
    "Model": "outsize.engine.model",
    "Placement": "outsize.plan.placement",
    "Reply": "outsize.engine.reply",
    "Score": "outsize.engine.reply",
    "load": "outsize.engine.load",
}  # where what is not imported yet lives


def __getattr__(name: str) -> object:
    if name not in HOME:
        raise AttributeError(f"module 'outsize' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(HOME[name]), name)


def __dir__() -> list[str]:
    """With what is not imported yet: consoles and notebooks complete names from this."""
    return sorted({*globals(), *__all__})
