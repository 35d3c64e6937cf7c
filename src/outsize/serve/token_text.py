"""A token as bytes and as text."""

from __future__ import annotations

from outsize.engine.model import Model


def token_bytes(model: Model, token: int) -> bytes:
    """What a token adds to a reply's text: nothing, if it is a control token."""
    return b"" if token in model.tokens.added else model.tokens.bytes_of(token)


def token_text(model: Model, token: int) -> str:
    """As OpenAI writes tokens: a control token by its name, a part of a character as `bytes:\\xf0\\x9f`."""
    if token in model.tokens.added:
        return model.tokens.added[token]
    raw = model.tokens.bytes_of(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
