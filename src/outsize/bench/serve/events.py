"""What an event of a reply says, in any of the dialects: OpenAI's three, Anthropic's, Ollama's.

A server's answers are taken as they come: what is not of the expected shape says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

LAST = "message_stop", "response.completed", "response.incomplete"  # of `type`


def at(data: object, *path: str | int) -> object:
    """What is at a path of keys and indices; None where there is nothing."""
    for key in path:
        if isinstance(data, dict):
            data = data.get(key)
        elif isinstance(data, list) and isinstance(key, int) and key < len(data):
            data = data[key]
        else:
            return None
    return data


def text_of(data: object) -> str:
    """The text that came with an event, or all of an answer that is not a stream."""
    kind = at(data, "type")
    if kind == "response.output_text.delta":
        return _text(at(data, "delta"))
    if kind == "content_block_delta":
        return _text(at(data, "delta", "text"))
    return "".join(filter(None, map(_text, _places(data))))


def _places(data: object) -> Iterator[object]:
    for choice in _list(at(data, "choices")):
        yield at(choice, "text")
        for holder in ("delta", "message"):
            yield at(choice, holder, "reasoning_content")
            yield at(choice, holder, "content")
    if at(data, "object") == "response":
        for item in _list(at(data, "output")):
            yield from (at(part, "text") for part in _list(at(item, "content")))
    elif at(data, "type") == "message":
        yield from (at(part, "text") for part in _list(at(data, "content")))
    elif at(data, "done") is not None:
        yield at(data, "response")
        yield at(data, "message", "thinking")
        yield at(data, "message", "content")


def usage_of(data: object) -> tuple[int, int]:
    """Tokens of the prompt and of the reply; 0 where it does not say."""
    found = _usage(data)
    if found is None:
        return _number(at(data, "prompt_eval_count")), _number(at(data, "eval_count"))
    prompt = at(found, "prompt_tokens") or at(found, "input_tokens")
    return _number(prompt), _number(at(found, "completion_tokens") or at(found, "output_tokens"))


def cached_of(data: object) -> int:
    """Tokens of the prompt that were not computed again."""
    found = _usage(data)
    return _number(
        at(found, "prompt_tokens_details", "cached_tokens")
        or at(found, "input_tokens_details", "cached_tokens")
        or at(found, "cache_read_input_tokens")
    )


def finish_of(data: object) -> str:
    """Why a reply ended; empty: it has not."""
    return _text(at(data, "choices", 0, "finish_reason") or at(data, "done_reason"))


def error_of(data: object) -> str:
    """What went wrong in the middle of a stream; empty: nothing."""
    found = at(data, "error") or at(data, "response", "error")
    if not found:
        return ""
    return f"in the stream: {_text(at(found, 'type')) or _text(found) or 'error'}"


def is_last(data: object) -> bool:
    """Does a stream of its kind end with this? (OpenAI's older two end with a line of their own.)"""
    return at(data, "type") in LAST or at(data, "done") is True


def _usage(data: object) -> object:
    return at(data, "usage") or at(data, "response", "usage") or at(data, "message", "usage")


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0
