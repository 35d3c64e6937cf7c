"""Which format a chat template writes calls of tools in."""

from __future__ import annotations

from outsize.serve.tools.format import ToolFormat


def format_of(template: str) -> ToolFormat | None:
    """None: it says nothing of tools, or in a format that is not known."""
    return None
