"""What a tokenizer.json states, and whether the tokenizers library would take it at its word.

The library counts added tokens on from the vocabulary in the order of the file, whatever ids the file
states: where there are holes or disorder, an id would silently be another. Such a file is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

from tokenizers import AddedToken, Tokenizer

from outsize.checkpoint.read_json import loads
from outsize.errors import CheckpointError, OutsizeError, UnsupportedError

MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")
MAX_TOKENS = 1 << 19  # of a vocabulary; the largest of the hub have 262,208
MAX_NAMES = 1 << 18  # characters of all added tokens; Gemma's 6,415 have 77,000
MAX_VALUES = 4_000_000  # commas in a file; the largest of the hub have 1.3 million
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_MERGE = rb"(?:%b|\[\s*+%b\s*+,\s*+%b\s*+\])" % (_STRING, _STRING, _STRING)
_MERGES = re.compile(rb'"merges"\s*+:\s*+(\[(?:\s*+%b\s*+,?+)*+\s*+\])' % _MERGE, re.DOTALL)
Text = str | bytes
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class Added:
    """An added token with the id that the file states."""

    id: int
    content: str
    flags: dict[str, bool]

    @property
    def token(self) -> AddedToken:
        return AddedToken(self.content, **self.flags)


def bad(problem: str) -> CheckpointError:
    return CheckpointError(f"tokenizer.json is not usable: {problem}; fetch it again")


def made(text: Text) -> Tokenizer:
    """The library's tokenizer. Raises CheckpointError."""
    with refusing_panics(bad):
        return Tokenizer.from_buffer(as_bytes(text))


def as_bytes(text: Text) -> bytes:
    return text.encode() if isinstance(text, str) else text


@contextmanager
def refusing_panics(error: Callable[[str], OutsizeError]) -> Iterator[None]:
    """What the library raises, bare Exceptions and panics, as the error that `error` makes of its words."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, OutsizeError):
        raise
    except BaseException as e:
        raise error(str(e)[:200]) from None


def refuse_long_names(names: Iterable[str]) -> None:
    """Added tokens are looked for in every text, by a pattern of all of them. Raises CheckpointError."""
    if (total := sum(map(len, names))) > MAX_NAMES:
        raise CheckpointError(
            f"the tokenizer's special tokens have {total:,} characters together, at most {MAX_NAMES:,} are "
            "known; is the file sound?"
        )


def without_merges(raw: bytes) -> bytes:
    """A tokenizer.json with an empty list of merges, which are most of it, and only the library's matter."""
    found = _MERGES.search(raw)
    return raw[: found.start(1)] + b"[]" + raw[found.end(1) :] if found else raw


def parse(text: Text) -> dict[str, object]:
    """All of it but the merges. Raises CheckpointError, or UnsupportedError for a model that the library does
    not know."""
    raw = as_bytes(text)
    if (values := raw.count(b",")) > MAX_VALUES:
        raise bad(f"{values:,} values, at most {MAX_VALUES:,} are read")
    try:
        whole = loads(without_merges(raw))
    except ValueError as e:
        raise bad(str(e)[:200]) from None
    model = whole.get("model") if isinstance(whole, dict) else None
    if not isinstance(model, dict):
        raise bad("it has no 'model'")
    kind = model.get("type", MODELS[0])
    if kind not in MODELS:
        raise UnsupportedError(
            f"tokenizer.json: model {kind!r} is not known; known are {', '.join(MODELS)}"
        )
    return cast("dict[str, object]", whole)


def added(whole: dict[str, object]) -> list[Added]:
    """The added tokens in the order of the file. Raises CheckpointError."""
    listed = whole.get("added_tokens") or []
    if not isinstance(listed, list):
        raise bad("'added_tokens' is not a list")
    return [_added(entry) for entry in listed]


def _added(entry: object) -> Added:
    known = entry if isinstance(entry, dict) else {}
    id, content = known.get("id"), known.get("content")
    flags = {k: known.get(k, k == "normalized" and not known.get("special")) for k in _FLAGS}
    sound = isinstance(id, int) and isinstance(content, str) and content
    if not sound or not all(isinstance(v, bool) for v in flags.values()):
        raise bad(f"added token {str(entry)[:80]} has no id, no content or no true or false")
    return Added(cast(int, id), cast(str, content), cast("dict[str, bool]", flags))


def overrides(config: Mapping[str, object], stated: Sequence[Added]) -> list[Added]:
    """The added tokens of a tokenizer_config.json, by id, that differ from those of the file beside it:
    one of the same text takes new flags and keeps its id, as in transformers. Raises CheckpointError."""
    known = {a.content: a for a in stated}
    more = []
    for id, entry in config.items():
        if not id.isdecimal() or len(id) > 9 or not isinstance(entry, dict):
            raise bad(f"added token {id[:80]!r} of tokenizer_config.json is not an id with a token")
        token = _added(entry | {"id": int(id)})
        if before := known.get(token.content):
            token = replace(token, id=before.id)
        if token != before:
            more.append(token)
    refuse_long_names(a.content for a in (*stated, *more))
    return sorted(more, key=lambda a: a.id)


def compare(stated: Sequence[Added], ids: Callable[[str], int | None]) -> None:
    """Raises CheckpointError for the first added token that would get another id than it states."""
    for token in stated:
        if (id := ids(token.content)) != token.id:
            raise CheckpointError(
                f"tokenizer.json: added token {token.content[:80]!r} is stated as {token.id} but would "
                f"be read as {id}, as there are holes, disorder or doubles in the added tokens; number "
                "them on from the vocabulary without holes and in order"
            )


def check(text: Text, config: Mapping[str, object]) -> None:
    """Refuses what building from the text would refuse, but for faults inside of the vocabulary and the
    merges. Raises CheckpointError or UnsupportedError."""
    whole = parse(text)
    stated = added(whole)
    stated += overrides(config, stated)
    compare(stated, counted(stated, _vocab(cast("dict[str, object]", whole["model"]))).get)
    bare = {"type": "BPE", "vocab": {}, "merges": []}
    made(json.dumps(whole | {"model": bare}).encode())


def _vocab(model: dict[str, object]) -> dict[str, int]:
    pieces = model.get("vocab")
    if isinstance(pieces, list) and all(isinstance(p, list) and len(p) == 2 for p in pieces):
        return {str(p[0]): i for i, p in enumerate(pieces)}
    if not isinstance(pieces, dict) or not all(isinstance(v, int) for v in pieces.values()):
        raise bad("its 'vocab' is neither pieces with ids nor pieces with scores")
    return pieces


def counted(stated: Sequence[Added], vocab: dict[str, int]) -> dict[str, int]:
    """The ids that the library gives to added tokens: those of the vocabulary, then one by one."""
    new: dict[str, int] = {}
    for token in stated:
        if token.content not in vocab:
            new.setdefault(token.content, len(vocab) + len(new))
    return {t.content: vocab.get(t.content, new.get(t.content, -1)) for t in stated}
