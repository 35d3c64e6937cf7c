"""The text of a request's grammar: its schema or its Lark grammar, after what the model thinks.

What a model thinks before it answers is free, wherever its replies are divided (`text/channels.py`): in a
block between tags, or in channels of their own. A grammar that names those tags itself rules the whole reply.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from outsize.errors import OptionError
from outsize.options import Options
from outsize.text.channels import Format
from outsize.text.tokens import Tokens, check_unicode

MAX_TEXT = 1 << 18  # characters of a schema, or of a grammar
MAX_PARTS = 10_000  # values of a schema
MOST_PROPERTIES, MOST_SQUARES = 900, 1_000_000  # of an object; of all objects, their squares: 0.5 s
# Of a schema in which texts may have to obey several patterns at once: each more takes 2.5 times as long.
MOST_PATTERNS = 16
# How JSON is spaced: as Python's json.dumps does. Spaces anywhere would let a model write them for ever.
STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ANSWER = "@answer"
WORDS = "GAP: /[ \\t\\r\\n]{0,8}/\nTHOUGHT: /(.|\\n)*/\n"
HARMONY = (
    'start: (<|channel|> "analysis" <|message|> THOUGHT <|end|> <|start|> "assistant")* '
    '<|channel|> "final" (/ ?/ <|constrain|> "json")? <|message|> ' + ANSWER + "\n" + WORDS
)


def source(options: Options, form: Format, tokens: Tokens) -> str | None:
    """What llguidance is given for a request's options; None: anything goes. Raises OptionError."""
    if options.schema is not None:
        answer = {"json_schema": json.loads(schema_text(options.schema))}
    elif options.grammar is not None:
        _check_size("grammar", options.grammar)
        answer = {"lark_grammar": options.grammar}
    else:
        return None
    whole = None if _rules_all(options.grammar or "", form) else _before(form, tokens)
    grammars: list[Mapping[str, object]] = [answer]
    if whole is not None:
        grammars = [{"lark_grammar": whole}, {"name": ANSWER[1:], **answer}]
    return json.dumps({"grammars": grammars})


def schema_text(
    schema: Mapping[str, object], name: str = "schema", more: Mapping[str, object] | None = None
) -> str:
    """A schema as JSON, within limits, to be spaced in our style. `more`: of llguidance's options for
    schemas. Raises OptionError."""
    style = {**STYLE, **(more or {})}
    try:
        text = json.dumps({**schema, "x-guidance": style}, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise OptionError(f"the {name} is nested too deeply") from None
    except (TypeError, ValueError) as e:
        raise OptionError(f"the {name} is not JSON: {e}") from None
    _check_size(name, text)
    _check_parts(name, schema)
    return text


def _check_parts(name: str, schema: Mapping[str, object]) -> None:
    """Raise OptionError for a schema that would take long to compile, or could not be followed: any property
    may come after any before it, so an object's cost is the square of their number."""
    left, parts, squares = list[object]([schema]), 0, 0
    patterns, joins = 0, False
    while left:
        value = left.pop()
        parts += 1
        if isinstance(value, Mapping):
            properties = value.get("properties")
            count = len(properties) if isinstance(properties, Mapping) else 0
            own = sum(isinstance(value.get(key), str) for key in ("pattern", "format"))
            patterns, joins = (
                patterns + own,
                joins or "allOf" in value or ("$ref" in value and own > 0),
            )
            squares += count * count
            if count > MOST_PROPERTIES or squares > MOST_SQUARES:
                raise OptionError(
                    f"the {name} has an object of {count:,} properties; at most {MOST_PROPERTIES:,} are "
                    "taken, and few such objects"
                )
        if parts > MAX_PARTS:
            raise OptionError(f"the {name} has more than {MAX_PARTS:,} parts")
        left += value.values() if isinstance(value, Mapping) else []
        left += value if isinstance(value, list | tuple) else []
    if joins and patterns > MOST_PATTERNS:
        raise OptionError(
            f"the {name} has {patterns} patterns and formats, and parts that must hold together (allOf, or "
            f"$ref beside a pattern); at most {MOST_PATTERNS} are taken then"
        )


def _check_size(name: str, text: str) -> None:
    """Raises OptionError."""
    check_unicode(text)
    if len(text) > MAX_TEXT:
        raise OptionError(
            f"the {name} has {len(text):,} characters; at most {MAX_TEXT:,} are taken"
        )


def _rules_all(grammar: str, form: Format) -> bool:
    """Does a grammar speak of what the model thinks, so that it rules all of the reply?"""
    names = form.tags or (("<|channel|>",) if form.harmony else ())
    return any(name in grammar for name in names)


def _before(form: Format, tokens: Tokens) -> str | None:
    """A Lark grammar of a whole reply with ANSWER in it; None: the reply is the answer."""
    if form.harmony:
        return HARMONY if form.opened else None
    if form.tags is None:
        return None
    opening, closing = form.tags
    if all(tokens.is_marker(tag) for tag in form.tags):
        begins, thinks = special_name(opening), f"THOUGHT {special_name(closing)}"
        rules = WORDS
    else:  # tags that are letters among others: the first closing one counts
        begins, thinks = json.dumps(opening), "thinks"
        closed = re.escape(closing).replace("/", "\\/")
        rules = f"thinks[lazy]: /(.|\\n)*{closed}/\n{WORDS}"
    block = f"{thinks} GAP" if form.opened else f"({begins} {thinks} GAP)?"
    return f"start: {block} {ANSWER}\n{rules}"


def special_name(name: str) -> str:
    """A special token's name as grammars write it: `<|im_end|>` as it is, `[TOOL_CALLS]` as <TOOL_CALLS>."""
    fits = re.fullmatch(r"<[^<>\s\[\]]+>", name) is not None
    return name if fits else "<" + re.sub(r"[<>\[\]\s]", "", name) + ">"
