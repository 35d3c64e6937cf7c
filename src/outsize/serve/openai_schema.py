"""The bodies of OpenAI's chat and text completions, field by field, with some that vLLM and llama.cpp add."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from outsize.serve.schema import Body, Neutral, NoEffect, few

ABSENT = Neutral(())  # no value but null
TEXT_ONLY = Neutral((), "this model reads text alone")
MOST_MESSAGES, MOST_TOOLS, MOST_STOP = 50_000, 256, 1024
Text = Annotated[str, Field(max_length=1000)]
Stop = Annotated[str, Field(max_length=MOST_STOP)]


class StreamOptions(Body):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: Annotated[
        bool | None, Neutral((False,), "usage is told once, at the end")
    ] = None
    include_obfuscation: Annotated[bool | None, Neutral((False,), "chunks are not padded")] = None


class Common(Body):
    """What chat and text completions share."""

    model: Text | None = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, le=1 << 24)] = None  # 0 or -1: off
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    repeat_penalty: Annotated[float | None, Field(ge=0.01, le=100)] = None
    repetition_penalty: Annotated[float | None, Field(ge=0.01, le=100)] = None
    repeat_last_n: Annotated[int | None, Field(ge=-1, le=1 << 24)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    logit_bias: Annotated[
        dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, BeforeValidator(few)
    ] = None
    seed: Annotated[int | None, Field(ge=-(1 << 63), lt=1 << 63)] = None
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=16)] | None = None
    n: Annotated[int | None, Field(ge=1, le=16)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    prefill: Text | None = None
    width: Annotated[float, Field(gt=0, le=1)] | Text | None = None
    user: Annotated[str | None, NoEffect()] = None
    metadata: Annotated[dict[str, Any] | None, NoEffect()] = None
    service_tier: Annotated[str | None, Neutral(("auto", "default"))] = None
    store: Annotated[Any, Neutral((False,), "outsize keeps no replies")] = None

    @property
    def wants_usage(self) -> bool:
        """In a stream."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class Part(Body):
    """A part of a message's content. `type` is "text"; others are refused in words."""

    type: Text
    text: str | None = None
    refusal: Annotated[Any, ABSENT] = None
    image_url: Annotated[Any, TEXT_ONLY] = None
    input_audio: Annotated[Any, TEXT_ONLY] = None
    file: Annotated[Any, TEXT_ONLY] = None
    cache_control: Annotated[Any, NoEffect()] = None
    prompt_cache_breakpoint: Annotated[Any, NoEffect()] = None


class CalledFunction(Body):
    """A function and its arguments, a text of JSON."""

    name: Text
    arguments: str


class ToolCall(Body):
    """A call that the assistant made."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Annotated[int | None, NoEffect()] = None


class Message(Body):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: Text | None = None
    tool_calls: Annotated[list[ToolCall] | None, Field(fail_fast=True, max_length=MOST_TOOLS)] = (
        None
    )
    tool_call_id: Text | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: Annotated[Any, ABSENT] = None
    audio: Annotated[Any, TEXT_ONLY] = None
    function_call: Annotated[Any, Neutral((), "outsize reads `tool_calls`")] = None
    annotations: Annotated[Any, NoEffect()] = None


class FunctionSpec(Body):
    """A function that may be called; `parameters` is a JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSpec(Body):
    """A tool that may be called."""

    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(Body):
    """A function by its name."""

    name: Text


class ToolChoice(Body):
    """The one tool that is to be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    """A schema that the reply obeys."""

    name: Text | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """What a reply looks like. llama.cpp gives a json_object its schema here, too."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class ChatBody(Common):
    """POST /v1/chat/completions."""

    messages: Annotated[
        list[Message], Field(fail_fast=True, min_length=1, max_length=MOST_MESSAGES)
    ]
    max_tokens: Annotated[int | None, Field(ge=1, le=1 << 24)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=1 << 24)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    tools: Annotated[list[ToolSpec] | None, Field(fail_fast=True, max_length=MOST_TOOLS)] = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Text | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    safety_identifier: Annotated[str | None, NoEffect()] = None
    prompt_cache_key: Annotated[str | None, NoEffect()] = None
    prompt_cache_retention: Annotated[str | None, NoEffect()] = None
    prompt_cache_options: Annotated[dict[str, Any] | None, NoEffect()] = None
    audio: Annotated[Any, TEXT_ONLY] = None
    modalities: Annotated[
        list[Text] | None,
        Field(fail_fast=True),
        Neutral((["text"],), "outsize writes text alone"),
    ] = None
    prediction: Annotated[Any, ABSENT] = None
    web_search_options: Annotated[Any, ABSENT] = None
    moderation: Annotated[Any, ABSENT] = None
    functions: Annotated[Any, Neutral(([],), "outsize reads `tools`")] = None
    function_call: Annotated[Any, Neutral(("none",), "outsize reads `tool_choice`")] = None
    verbosity: Annotated[Text | None, Neutral(("medium",))] = None


MOST_PROMPTS, MOST_IDS = 2048, 1 << 20
TokenIds = Annotated[list[int], Field(fail_fast=True, max_length=MOST_IDS)]
Texts = Annotated[list[str], Field(fail_fast=True, max_length=MOST_PROMPTS)]
Several = Annotated[list[TokenIds], Field(fail_fast=True, max_length=MOST_PROMPTS)]


class TextBody(Common):
    """POST /v1/completions."""

    prompt: str | TokenIds | Texts | Several
    max_tokens: Annotated[int | None, Field(ge=0, le=1 << 24)] = None
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    echo: bool | None = None
    best_of: Annotated[int | None, Field(ge=1, le=16)] = None  # as `n`: all are returned
    suffix: Annotated[str | None, Neutral(("",), "outsize does not fill in between two texts")] = (
        None
    )
