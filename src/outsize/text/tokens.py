"""Between text and tokens: encoding, with or without control tokens, and decoding."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from functools import cached_property

from tokenizers import Tokenizer, normalizers

from outsize.checkpoint.tokenizer_json import refusing_panics
from outsize.errors import CheckpointError, OptionError
from outsize.text.token_bytes import of_tokenizer
from outsize.text.untrusted import BREAK, Marks

TAGS = (
    ("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"),
    ("<thinking>", "</thinking>"), ("<reasoning>", "</reasoning>"),
)  # fmt: skip
# Plain tokens of some vocabularies that mark calls of tools, as control tokens do in others.
TOOL_MARKS = (
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[/TOOL_CALLS]", "[ARGS]", "[CALL_ID]",
    "<start_function_call>", "<end_function_call>", "<escape>",
)  # fmt: skip
# Tokens of turns that some tokenizers do not call special (DeepSeek's distillations: <｜User｜>).
LOOKS = re.compile(r"<\|[^|]*\|>|<｜[^｜]*｜>")
MARKERS = frozenset([*TOOL_MARKS, *(tag for pair in TAGS for tag in pair)])
UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Tokens:
    """A pack's tokenizer with its start token."""

    def __init__(
        self, tokenizer: Tokenizer, bos: int | None, add_bos: bool, rows: int | None = None
    ) -> None:
        """`rows`: of the model's embedding; some tokenizers have tokens beyond it."""
        self._tokenizer, self._rows = _remembering_nothing(tokenizer), rows
        self.start = [bos] if add_bos and bos is not None else []
        added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        self._control = {
            i: t.content for i, t in added.items() if t.special or LOOKS.fullmatch(t.content)
        }
        # Those that the library looks for in normalized text; the unknown token it puts there by itself.
        unknown = getattr(tokenizer.model, "unk_token", None)
        self._normalized = frozenset(
            i for i, n in self._control.items() if added[i].normalized and n != unknown
        )
        self._late = bool(self._normalized)
        self.marks = Marks(list(self._control.values()))
        # What a model answered is split by templates at the tags of its reasoning.
        tags = {tag for pair in TAGS for tag in pair}
        self.answer_marks = Marks([c for c in self._control.values() if c not in tags])
        self._lock = threading.Lock()  # what the library is told before it encodes is told for all
        self._normalizer, self._was_broken = tokenizer.normalizer, False
        steps = [] if self._normalizer is None else [self._normalizer]
        self._unmarking = normalizers.Sequence([normalizers.Replace(BREAK, ""), *steps])

    def encode(self, text: str, start: bool = False, special: bool = False) -> list[int]:
        """Token ids of a text; the names of control tokens in it are text, unless `special`. `start` puts the
        model's own start token first, once, if it has one."""
        check_unicode(text)
        ids = self._encoded(text) if special else self._encoded_apart(text)
        return ids if not start or ids[: len(self.start)] == self.start else self.start + ids

    def _encoded(self, text: str, special: bool = True, broken: bool = False) -> list[int]:
        """`special`: the names of control tokens are control tokens; `broken`: marks in the text are left out
        after the search for those. Both are said anew each time, whatever the last call left."""
        with refusing_panics(_cannot_encode), self._lock:  # as for a word that it has no token for
            self._tokenizer.encode_special_tokens = not special
            if broken or self._was_broken:
                self._was_broken = True
                self._tokenizer.normalizer = self._unmarking if broken else self._normalizer
                self._was_broken = broken
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if ids and self._rows is not None and (largest := max(ids)) >= self._rows:
            raise OptionError(
                f"the text holds {self.piece(largest)[:80]!r}, token {largest:,} of the tokenizer, and the "
                f"model's embedding has {self._rows:,} rows; leave it out"
            )
        return ids

    def _encoded_apart(self, text: str) -> list[int]:
        """Without control tokens: those that the library calls special it leaves out, others are marked."""
        if not {self.control(name) for name in self.marks.names(text)} <= self._special:
            return self.encode_marked(str(self.marks.mark(text)))
        return self._encoded(text, special=False)

    def encode_marked(self, text: str) -> list[int]:
        """Token ids of a text made by a chat template from strings that `marks` marked."""
        check_unicode(text)
        text = self.marks.broken(text)
        if BREAK not in text and not self._late:
            return self._encoded(text)
        ids = self._encoded(text, broken=True)
        self._refuse_forged(text, ids)
        return ids

    def _refuse_forged(self, text: str, ids: Sequence[int]) -> None:
        """A few tokenizers look for control tokens in normalized text, where no mark is left."""
        if not self._late:
            return
        allowed = [name for part in text.split(BREAK) for name in self.marks.names(part)]
        made = [self._control[i] for i in ids if i in self._normalized]
        extra = [name for name in made if made.count(name) > allowed.count(name)]
        if extra:
            raise OptionError(
                f"a message contains {extra[0]!r}, which this model's tokenizer cannot read as plain text; "
                "leave it out"
            )

    def check(self, ids: Sequence[int]) -> None:
        """Raises OptionError for no tokens, or one that the model's embedding has no row for."""
        if not ids:
            raise OptionError("the prompt is empty; give at least one character")
        for id in (min(ids), max(ids)):
            if id < 0 or (self._rows is not None and id >= self._rows):
                name = self.piece(id) if 0 <= id < 1 << 31 else ""
                raise OptionError(
                    f"the prompt has the token {name!r}, number {id:,}, and the model's embedding has "
                    f"{self._rows or 0:,} rows: this model cannot read it; leave it out"
                )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without control tokens."""
        with refusing_panics(_cannot_decode), self._lock:
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def piece(self, token: int) -> str:
        """A token's own name, special or not."""
        return self._tokenizer.id_to_token(token) or ""

    def control(self, name: str) -> int | None:
        """The id of a control token, or None if there is none of that name."""
        check_unicode(name)
        token: int | None = self._tokenizer.token_to_id(name)
        return token if token in self._control else None

    def knows(self, name: str) -> bool:
        """Is this one token of the vocabulary?"""
        return self._tokenizer.token_to_id(name) is not None

    @property
    def count(self) -> int:
        """Ids that a model can give: rows of its embedding, or of the vocabulary."""
        found: int = self._tokenizer.get_vocab_size()
        return self._rows or found

    @cached_property
    def bytes_of(self) -> Callable[[int], bytes]:
        """What gives the bytes of a token id, of a control token its name's. Raises UnsupportedError."""
        return of_tokenizer(self._tokenizer)

    @cached_property
    def added(self) -> dict[int, str]:
        """Tokens that are found in a text as they stand, control tokens among them, by id."""
        return {i: t.content for i, t in self._tokenizer.get_added_tokens_decoder().items()}

    def is_marker(self, name: str) -> bool:
        """Is this a token that marks a part of a reply: a control token, or one of reasoning or tools?"""
        token = self._tokenizer.token_to_id(name)
        return token in self._control or (token in self.added and name in MARKERS)


def _cannot_encode(problem: str) -> OptionError:
    return OptionError(f"the model's tokenizer cannot encode this text: {problem}")


def _cannot_decode(problem: str) -> CheckpointError:
    return CheckpointError(
        f"the model's tokenizer cannot make text of its tokens: {problem}; fetch the model again, or another"
    )


def check_unicode(text: str) -> None:
    """Raises OptionError for text that is none, as bytes of another encoding become."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise OptionError(
            f"the text is no Unicode at character {e.start:,} ({text[e.start]!r}); save it as UTF-8"
        ) from None


def _remembering_nothing(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer without its cache of 10,000 pieces of texts, 8 KB each where a whole text is one piece:
    80 MB outside `--memory`, and no faster (with none of them 300,000 tokens/s here, with all 280,000)."""
    if (resize := getattr(tokenizer.model, "_resize_cache", None)) is not None:
        resize(0)
    return tokenizer
