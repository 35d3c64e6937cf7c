"""Tiny models with a chat template that has tools, as Qwen's: of random weights, or that say what they are
told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.numpy import save_file

from tests import scripted
from tests.golden import tiny

TURNS, THOUGHT = ["<|im_start|>", "<|im_end|>"], ["<think>", "</think>"]
CALL = ["<tool_call>", "</tool_call>"]
TEMPLATE = """{%- if tools %}
    {{- '<|im_start|>system\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools>\\n<tool_call>\\n{"name": <function-name>, ' }}
    {{- '"arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson }}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def random(folder: Path, context: int = 8192) -> Path:
    """Random weights, a vocabulary of bytes and control tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    named = [*TURNS, *CALL]
    named += [f"<extra{i}>" for i in range(tiny.VOCAB - 256 - len(named))]
    tokenizer = scripted.byte_tokenizer(named)
    end = tokenizer.token_to_id("<|im_end|>")
    settings = tiny.config("qwen2") | {"max_position_embeddings": context, "eos_token_id": end}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    save_file(tiny.weights("qwen2"), folder / "model.safetensors")
    return folder


def saying(folder: Path, words: Sequence[str]) -> Path:
    """Answers each prompt with these words, which are tokens of its own, and ends."""
    plain = [word for word in words if word not in (*TURNS, *THOUGHT, *CALL)]
    tokenizer = scripted.byte_tokenizer(TURNS, [*THOUGHT, *CALL, *plain])
    chain = [*words, "<|im_end|>"]
    end = tokenizer.token_to_id("<|im_end|>")
    return scripted.write(folder, tokenizer, chain, TEMPLATE, eos_token_id=end)
