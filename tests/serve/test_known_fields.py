"""Every field that a client's own types have is known here: honoured, or accepted at its neutral value, or
said to be without effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic.types as theirs
import ollama
import ollama._types as ollamas
import openai.types.responses as openais
import pytest
from anthropic.types import beta, message_create_params
from anthropic.types.beta import message_count_tokens_params as beta_count
from anthropic.types.beta import message_create_params as beta_create
from openai.types.responses import response_create_params, response_input_item_param
from openai.types.shared_params import Reasoning

from outsize.serve import anthropic_schema as claude
from outsize.serve import ollama_schema as llama
from outsize.serve import responses_schema as responses
from outsize.serve.schema import Body

HEADERS = {"betas"}  # keywords of a client that it sends as a header
# What some of their types have that is a type of its own here, refused whole by name.
KINDS: list[tuple[type[Body], Any]] = [
    (claude.Create, message_create_params.MessageCreateParamsNonStreaming),
    (claude.Create, message_create_params.MessageCreateParamsStreaming),
    (claude.Create, beta_create.MessageCreateParamsNonStreaming),
    (claude.CountTokens, theirs.MessageCountTokensParams),
    (claude.CountTokens, beta_count.MessageCountTokensParams),
    (claude.Turn, theirs.UserMessageParam),
    (claude.Turn, theirs.AssistantMessageParam),
    (claude.Text, theirs.TextBlockParam),
    (claude.Text, beta.BetaTextBlockParam),
    (claude.Thinking, theirs.ThinkingBlockParam),
    (claude.Redacted, theirs.RedactedThinkingBlockParam),
    (claude.ToolUse, theirs.ToolUseBlockParam),
    (claude.ToolResult, theirs.ToolResultBlockParam),
    (claude.ToolDefinition, theirs.ToolParam),
    (claude.ToolChoice, theirs.ToolChoiceToolParam),
    (claude.ThinkingChoice, theirs.ThinkingConfigEnabledParam),
    (claude.ThinkingChoice, theirs.ThinkingConfigAdaptiveParam),
    (claude.OutputConfig, theirs.OutputConfigParam),
    (claude.Format, theirs.JSONOutputFormatParam),
    (responses.Create, response_create_params.ResponseCreateParamsNonStreaming),
    (responses.Create, response_create_params.ResponseCreateParamsStreaming),
    (responses.Message, openais.EasyInputMessageParam),
    (responses.Message, openais.ResponseOutputMessageParam),
    (responses.Message, response_input_item_param.Message),
    (responses.FunctionCall, openais.ResponseFunctionToolCallParam),
    (responses.FunctionOutput, response_input_item_param.FunctionCallOutput),
    (responses.Reasoning, openais.ResponseReasoningItemParam),
    (responses.Words, openais.ResponseInputTextParam),
    (responses.Words, openais.ResponseOutputTextParam),
    (responses.Refusal, openais.ResponseOutputRefusalParam),
    (responses.Tool, openais.FunctionToolParam),
    (responses.NamedTool, openais.ToolChoiceFunctionParam),
    (responses.AllowedTools, openais.ToolChoiceAllowedParam),
    (responses.TextConfig, openais.ResponseTextConfigParam),
    (responses.Format, openais.ResponseFormatTextJSONSchemaConfigParam),
    (responses.ReasoningConfig, Reasoning),
    (responses.StreamOptions, response_create_params.StreamOptions),
    (llama.Chat, ollamas.ChatRequest),
    (llama.Generate, ollamas.GenerateRequest),
    (llama.Settings, ollama.Options),
    (llama.Message, ollama.Message),
    (llama.ToolCall, ollama.Message.ToolCall),
    (llama.Function, ollama.Message.ToolCall.Function),
    (llama.Tool, ollama.Tool),
    (llama.FunctionDefinition, ollama.Tool.Function),
    (llama.Embed, ollamas.EmbedRequest),
    (llama.Embed, ollamas.EmbeddingsRequest),
    (llama.Named, ollamas.ShowRequest),
    (llama.Named, ollamas.PullRequest),
]


def names(theirs: Any) -> Iterator[str]:
    """Of a pydantic model, or of a TypedDict."""
    fields = getattr(theirs, "model_fields", None) or theirs.__annotations__
    yield from set(fields) - HEADERS


def known(ours: type[Body]) -> set[str]:
    return {field.alias or name for name, field in ours.model_fields.items()}


@pytest.mark.parametrize(
    ("ours", "name"),
    [(ours, name) for ours, theirs in KINDS for name in sorted(names(theirs))],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_field_is_known(ours: type[Body], name: str) -> None:
    assert name in known(ours)
