"""What OpenAI's endpoints share: from their fields to options, and from a reply's account to `usage`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from outsize.engine.model import Model
from outsize.engine.reply import Reply
from outsize.errors import OptionError
from outsize.forward.prune import parse_prefill
from outsize.model.width import parse_width
from outsize.serve import errors
from outsize.serve.errors import ApiError, invalid
from outsize.serve.openai_schema import Common
from outsize.serve.sse import COMMENT, DONE, SSE, data
from outsize.version import __version__

TEMPERATURE = 1.0  # OpenAI's default, as top_p's
SAME_NAMES = (
    "min_p",
    "repeat_last_n",
    "presence_penalty",
    "frequency_penalty",
    "ignore_eos",
    "prefill",
    "width",
)


@dataclass(frozen=True, slots=True)
class Head:
    """What every answer and every chunk of it begins with."""

    kind: str  # "chat.completion", ...
    model: str
    fingerprint: str
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, kind: str, name: str, model: Model) -> Head:
        """llama.cpp's fingerprints begin with b, and clients look at that."""
        id = f"{'chatcmpl' if kind.startswith('chat') else 'cmpl'}-{secrets.token_hex(12)}"
        return cls(kind, name, f"b{__version__}-{model.pack.tokenizer_crc:08x}", id)

    def with_choices(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> dict[str, Any]:
        begin = {"id": self.id, "object": self.kind, "created": self.created, "model": self.model}
        end = {"system_fingerprint": self.fingerprint, "service_tier": "default"}
        return {**begin, "choices": choices, **end, **more}


class StreamWriter:
    """What the streams of chat and text completions share: chunks, usage where it is asked for, the end."""

    media_type = SSE

    def __init__(self, head: Head, model: Model, prompt_tokens: int, wants_usage: bool) -> None:
        self.model, self.replies = model, list[Reply]()
        self.head, self.prompt_tokens, self._wants_usage = head, prompt_tokens, wants_usage

    def chunk(self, choices: list[dict[str, Any]], used: object = None) -> bytes:
        more = {"usage": used} if self._wants_usage else {}
        return data(self.head.with_choices(choices, more))

    def silence(self) -> bytes:
        return COMMENT

    def end(self) -> bytes:
        if not self._wants_usage:
            return DONE
        return self.chunk([], usage(self.replies, self.prompt_tokens, self.model)) + DONE

    def failed(self, error: ApiError) -> bytes:
        return data(errors.body(error, errors.OPENAI, "")) + DONE


def sampling(body: Common, model: Model) -> dict[str, Any]:
    """Fields of Options that are said the same way by chat and text completions. Raises ApiError."""
    made: dict[str, Any] = {
        "temperature": TEMPERATURE if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
    }
    made |= {n: getattr(body, n) for n in SAME_NAMES if getattr(body, n) is not None}
    for name, parse in (("prefill", parse_prefill), ("width", parse_width)):
        try:
            if name in made:
                parse(made[name])
        except OptionError as e:
            raise invalid(str(e), name) from None
    if body.top_k is not None:
        made["top_k"] = max(0, body.top_k)
    if body.seed is not None:
        made["seed"] = body.seed % (1 << 63)
    if body.stop:
        made["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.logit_bias:
        made["logit_bias"] = _biases(body.logit_bias, model)
    penalties = {body.repeat_penalty, body.repetition_penalty} - {None}
    if len(penalties) > 1:
        raise invalid(
            "repeat_penalty and repetition_penalty are two names of one thing; give one",
            "repetition_penalty",
        )
    if penalties:
        made["repeat_penalty"] = penalties.pop()
    if body.stream_options is not None and not body.stream:
        raise invalid(
            "stream_options is for a stream; leave it out, or set stream", "stream_options"
        )
    return made


def _biases(given: Mapping[str, float], model: Model) -> dict[int, float]:
    """By token id. Raises ApiError."""
    rows = model.pack.description.vocab_size
    for name in given:
        if not (name.isascii() and name.isdecimal() and len(name) < 10 and int(name) < rows):
            raise invalid(
                f"logit_bias names the token {name[:80]!r}; ids of this model are 0 to {rows - 1:,}",
                "logit_bias",
            )
    return {int(name): bias for name, bias in given.items()}


def usage(replies: Iterable[Reply], prompt_tokens: int, model: Model) -> dict[str, Any]:
    """Tokens of all choices, and what they took."""
    each = list(replies)
    new = sum(reply.new_tokens for reply in each)
    thought = sum(len(model.tokens.encode(r.reasoning)) for r in each if r.reasoning)
    accepted, drafted = sum(r.accepted for r in each), sum(r.drafted for r in each)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new,
        "total_tokens": prompt_tokens + new,
        "prompt_tokens_details": {"cached_tokens": each[0].reused_tokens if each else 0},
        "completion_tokens_details": {
            "reasoning_tokens": thought,
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
        "outsize": account(each),
    }


def account(replies: list[Reply]) -> dict[str, Any]:
    """Where the time went: of the first reply, and of all that can be added up."""
    first = replies[0]
    return {
        "bytes_read": first.bytes_per_token * max(0, first.new_tokens - 1),
        "hit_rate": first.hit_rate,
        "waited_s": first.waited_s,
        "first_token_s": first.first_token_s,
        "tokens_per_s": first.tokens_per_s,
        "drafted": sum(r.drafted for r in replies),
        "accepted": sum(r.accepted for r in replies),
        "lossy": first.lossy,
        "computed_share": first.computed_share,
        "width": first.width,
        "width_cost": first.options.get("width_cost", ""),
    }
