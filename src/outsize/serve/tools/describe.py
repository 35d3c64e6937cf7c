"""Tells a model of tools in words, where its chat template has none for them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from outsize.serve.ask import Tool
from outsize.text.template import Message, Messages

NO_SYSTEM = "System role not supported"  # Gemma 1 and 2


def prompt(
    template: str, messages: Messages, tools: Sequence[Tool], example: str
) -> tuple[Messages, Mapping[str, object]]:
    """The messages with the tools described in a system message, and no variables; or the messages as they
    are, and the tools as a variable, where the template uses that."""
    if re.search(r"\btools\b", template):
        return messages, {"tools": list(tools)}
    return with_text(template, messages, description(tools, example)), {}


def description(tools: Sequence[Tool], example: str) -> str:
    """`example`: how a call is written."""
    lines = "\n".join(json.dumps(tool.get("function"), ensure_ascii=False) for tool in tools)
    return (
        "You can call these functions, each described by a JSON object with its name, what it does, and the "
        f"JSON schema of its parameters:\n{lines}\n\nTo call one, write this, and nothing after it:\n"
        f"{example}\n\nOtherwise answer in plain text."
    )


def with_text(template: str, messages: Messages, text: str) -> Messages:
    """With more text in the system message, or in the first of the user's where there may be none."""
    said = list(messages)
    role = "user" if NO_SYSTEM in template else "system"
    at = next((i for i, message in enumerate(said) if message.get("role") == role), None)
    if at is None or (role == "system" and at > 0):
        return [{"role": role, "content": text}, *said]
    said[at] = {**said[at], "content": _joined(said[at], text, role == "user")}
    return said


def _joined(message: Message, text: str, before: bool) -> str:
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(str(part.get("text", "")) for part in content)
    parts = [text, str(content or "")] if before else [str(content or ""), text]
    return "\n\n".join(filter(None, parts))
