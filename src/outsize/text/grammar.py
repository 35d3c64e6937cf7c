"""Grammars that a reply obeys, as constraints on tokens: a JSON schema, or a Lark grammar of llguidance's.

llguidance (https://github.com/guidance-ai/llguidance) knows the grammars; the bytes of tokens and how a text
is encoded it has from our tokenizer. Its tables (a tree of all tokens, and one of those that strings of JSON
are made of) are made with the first grammar: 60 to 180 bytes a token of the vocabulary stay.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from outsize.errors import OptionError
from outsize.log import warn
from outsize.options import Options
from outsize.text.channels import Format
from outsize.text.grammar_source import source, special_name
from outsize.text.tokens import Tokens

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Strings of JSON: tokens that are wholly of one are found in a tree of their own. Of llguidance's four slices
# this one alone makes masks as fast as all, at half of the memory.
SLICE = r'[^"\\\x00-\x1F\x7F]{1,30}'
# Of what a grammar may become: so that no schema takes a second to compile, or tens of megabytes to follow.
MAX_GRAMMAR, MAX_STATES = 100_000, 20_000
# What may stand before a text, so that it is encoded as within a longer one; and tokens that it may be.
LEADS, MOST_LEAD = ("", "\n", "\x02"), 3


class Grammars:
    """Makes the constraints of one opened model's replies."""

    def __init__(self, tokens: Tokens, ends: Sequence[int]) -> None:
        """`ends`: tokens that end a text."""
        self._tokens, self._ends = tokens, sorted({i for i in ends if 0 <= i < tokens.count})
        self._made: LLTokenizer | None = None
        self._lock = threading.Lock()

    def constraint(self, options: Options, form: Format) -> GrammarConstraint | None:
        """What the reply of a request must obey, if anything; what a model thinks before it answers, by
        `form`, is free. Raises OptionError for what is no schema or grammar, or too large a one."""
        text = source(options, form, self._tokens)
        if text is None:
            return None
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_grammar_size=MAX_GRAMMAR, max_lexer_states=MAX_STATES)
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=limits)
        name = "grammar" if options.schema is None else "schema"
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise OptionError(f"the {name} cannot be used: {_told(matcher.get_error())}")
        return GrammarConstraint(matcher, [] if options.ignore_eos else self._ends)

    @property
    def _tokenizer(self) -> LLTokenizer:
        """Raises UnsupportedError."""
        with self._lock:
            if self._made is None:
                self._made = _made(self._tokens)
            return self._made


def schema_problem(text: str) -> str:
    """What is wrong with a schema, by its JSON; empty: it can be followed."""
    from llguidance import LLMatcher

    grammar = json.dumps({"grammars": [{"json_schema": json.loads(text)}]})
    is_error, said = LLMatcher.validate_grammar_with_warnings(grammar)
    return _told(said[0]) if is_error else ""


def _told(error: str) -> str:
    """llguidance's words, without the state that it adds to them."""
    first = error.strip().split("\n<state>")[0].splitlines() or [""]
    if first[0].startswith("NoExtension"):
        return "it allows no text at all"
    return first[0][:300].rstrip(".:; ")


def _made(tokens: Tokens) -> LLTokenizer:
    """What llguidance wants to know of a vocabulary. A token of its own, after the last, ends texts for it:
    which of the model's tokens do is ours to say."""
    from llguidance import LLTokenizer

    read = Vocabulary(tokens)
    made = LLTokenizer(read, n_vocab=len(read.tokens), eos_token=tokens.count, slices=[SLICE])  # type: ignore[arg-type]
    read.tokens, read.otherwise = [], made.greedy_tokenize
    return made


class Vocabulary:
    """A vocabulary as llguidance reads it: the attributes of its TokenizerWrapper."""

    is_tokenizer_wrapper, bos_token_id = True, None

    def __init__(self, tokens: Tokens) -> None:
        self._tokens, self.eos_token_id = tokens, tokens.count
        self.tokens = [tokens.bytes_of(i) for i in range(tokens.count)]
        self._markers = {i for i, name in tokens.added.items() if tokens.is_marker(name)}
        for i in self._markers:
            if i < tokens.count:
                self.tokens[i] = special_name(tokens.added[i]).encode()
        self.special_token_ids = [*(i for i in self._markers if i < tokens.count), tokens.count]
        self.tokens.append(b"<end of text>")
        self.otherwise = _none  # how to encode what the tokenizer would write as other bytes

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text within a longer one."""
        wanted, bytes_of = text.encode(), self._tokens.bytes_of
        for lead in LEADS:
            ids = self._tokens.encode(lead + text)
            pieces = [bytes_of(i) for i in ids]
            for cut in range(min(MOST_LEAD, len(ids))):
                if b"".join(pieces[cut:]) == wanted and self._markers.isdisjoint(ids[cut:]):
                    return ids[cut:]
        return self.otherwise(text)


def _none(text: str) -> list[int]:
    return []


class GrammarConstraint:
    """A grammar on its way through a reply."""

    def __init__(self, matcher: LLMatcher, ends: Sequence[int]) -> None:
        self._matcher, self._ended = matcher, False
        self._ends = list(ends)
        self.problem = ""

    @property
    def is_stopped(self) -> bool:
        return self._ended or self._matcher.is_stopped()

    def mask(self, logits_V: Tensor) -> Tensor:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._look()
        allowed_V = np.unpackbits(bits, count=len(logits_V), bitorder="little").view(np.bool_)
        allowed_V[self._ends] = self.is_stopped or self._matcher.is_accepting()
        if self.problem and not self._ends:
            return logits_V
        return torch.where(torch.from_numpy(allowed_V), logits_V, -torch.inf)

    def advance(self, token: int) -> None:
        if token in self._ends:
            self._ended = True
        elif not self.is_stopped:
            self._matcher.consume_token(token)
            self._look()

    def forced(self) -> Sequence[int]:
        return [] if self.is_stopped else self._matcher.compute_ff_tokens()

    def fitting(self, tokens: Sequence[int]) -> int:
        return 0 if self.is_stopped else self._matcher.validate_tokens(list(tokens))

    def _look(self) -> None:
        """Note, once, if the grammar broke down: it became too large to follow."""
        if not self.problem and self._matcher.is_error():
            self.problem = _told(self._matcher.get_error())
            warn(f"a reply was cut, for its grammar cannot be followed further: {self.problem}")
