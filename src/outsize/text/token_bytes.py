"""The bytes that each token of a vocabulary stands for: a token may be a part of a character."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from tokenizers import Tokenizer

from outsize.errors import UnsupportedError

SPACE = "▁"  # SentencePiece's
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def of_tokenizer(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """What gives the bytes of a token id; none for an id that is no token's. Added tokens, control tokens
    among them, stand for their names. Raises UnsupportedError for a vocabulary of neither known kind."""
    added = {i: t.content.encode() for i, t in tokenizer.get_added_tokens_decoder().items()}
    read, pieces = _reader(tokenizer), tokenizer.id_to_token

    def bytes_of(token: int) -> bytes:
        if token in added:
            return added[token]
        piece = pieces(token)
        return b"" if piece is None else read(piece)

    return bytes_of


def _reader(tokenizer: Tokenizer) -> Callable[[str], bytes]:
    """From a piece of the vocabulary to its bytes, by how the vocabulary is decoded."""
    steps = _steps(tokenizer)
    if "ByteLevel" in steps:
        return _of_byte_level
    if steps & {"ByteFallback", "Metaspace", "Replace"}:
        return _of_sentencepiece
    raise UnsupportedError(
        f"the bytes of this model's tokens are not known: its vocabulary is decoded by "
        f"{', '.join(sorted(steps)) or 'nothing'}; known are byte-level BPE and SentencePiece's kinds"
    )


def _steps(tokenizer: Tokenizer) -> set[str]:
    """The kinds of a decoder's steps."""
    if tokenizer.decoder is None:
        return set()
    state = json.loads(tokenizer.decoder.__getstate__())
    return {step["type"] for step in state.get("decoders", [state])}


def _alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones for themselves, the others from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


ALPHABET = _alphabet()


def _of_byte_level(piece: str) -> bytes:
    """A piece with a letter that is none of the alphabet's is decoded as it stands."""
    try:
        return bytes(map(ALPHABET.__getitem__, piece))
    except KeyError:
        return piece.encode()


def _of_sentencepiece(piece: str) -> bytes:
    if (byte := BYTE.fullmatch(piece)) is not None:
        return bytes([int(byte[1], 16)])
    return piece.replace(SPACE, " ").encode()
