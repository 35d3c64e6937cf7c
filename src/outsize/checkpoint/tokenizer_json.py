"""What a tokenizer.json states, and whether the tokenizers library would take it at its word.

The library counts added tokens on from the vocabulary in the order of the file, whatever ids the file
states: where there are holes or disorder, an id would silently be another. Such a file is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from tokenizers import AddedToken, Tokenizer

from outsize.errors import CheckpointError, UnsupportedError

MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")
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


def _bad(problem: str) -> CheckpointError:
    return CheckpointError(f"tokenizer.json is not usable: {problem}; fetch it again")


def made(text: str) -> Tokenizer:
    """The library's tokenizer. Raises CheckpointError."""
    try:
        return Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as e:  # the library raises bare Exception, and panics
        raise _bad(str(e)[:200]) from None


def parse(text: str) -> dict[str, object]:
    """Raises CheckpointError, or UnsupportedError for a model that the library does not know."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise _bad(str(e)[:200]) from None
    model = whole.get("model") if isinstance(whole, dict) else None
    if not isinstance(model, dict):
        raise _bad("it has no 'model'")
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
        raise _bad("'added_tokens' is not a list")
    return [_added(entry) for entry in listed]


def _added(entry: object) -> Added:
    known = entry if isinstance(entry, dict) else {}
    id, content = known.get("id"), known.get("content")
    flags = {k: known.get(k, k == "normalized" and not known.get("special")) for k in _FLAGS}
    sound = isinstance(id, int) and isinstance(content, str) and content
    if not sound or not all(isinstance(v, bool) for v in flags.values()):
        raise _bad(f"added token {str(entry)[:80]} has no id, no content or no true or false")
    return Added(cast(int, id), cast(str, content), cast("dict[str, bool]", flags))


def overrides(config: Mapping[str, object], stated: Sequence[Added]) -> list[Added]:
    """The added tokens of a tokenizer_config.json, by id, that differ from those of the file beside it:
    one of the same text takes new flags and keeps its id, as in transformers. Raises CheckpointError."""
    known = {a.content: a for a in stated}
    more = []
    for id, entry in config.items():
        if not id.isdecimal() or len(id) > 9 or not isinstance(entry, dict):
            raise _bad(
                f"added token {id[:80]!r} of tokenizer_config.json is not an id with a token"
            )
        token = _added(entry | {"id": int(id)})
        if before := known.get(token.content):
            token = replace(token, id=before.id)
        if token != before:
            more.append(token)
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


def check(text: str, config: Mapping[str, object]) -> None:
    """Refuses what building from the text would refuse, but for faults inside of the vocabulary and the
    merges. Raises CheckpointError or UnsupportedError."""
    whole = parse(text)
    stated = added(whole)
    stated += overrides(config, stated)
    compare(stated, counted(stated, _vocab(cast("dict[str, object]", whole["model"]))).get)
    bare = {"type": "BPE", "vocab": {}, "merges": []}
    made(json.dumps(whole | {"model": bare}))


def _vocab(model: dict[str, object]) -> dict[str, int]:
    pieces = model.get("vocab")
    if isinstance(pieces, list) and all(isinstance(p, list) and len(p) == 2 for p in pieces):
        return {str(p[0]): i for i, p in enumerate(pieces)}
    if not isinstance(pieces, dict) or not all(isinstance(v, int) for v in pieces.values()):
        raise _bad("its 'vocab' is neither pieces with ids nor pieces with scores")
    return pieces


def counted(stated: Sequence[Added], vocab: dict[str, int]) -> dict[str, int]:
    """The ids that the library gives to added tokens: those of the vocabulary, then one by one."""
    new: dict[str, int] = {}
    for token in stated:
        if token.content not in vocab:
            new.setdefault(token.content, len(vocab) + len(new))
    return {t.content: vocab.get(t.content, new.get(t.content, -1)) for t in stated}
