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

if TYPE_CHECKING:
    from outsize.api import Model, load
    from outsize.conversation import Conversation
    from outsize.reply import Reply, Score

__version__ = "0.1.0"
__all__ = ["Conversation", "Model", "Options", "Reply", "Score", "errors", "load"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'outsize' has no attribute {name!r}")
    from outsize import api

    return getattr(api, name)
