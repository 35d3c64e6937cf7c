"""LangChain's standard tests of a chat model, with its clients of three dialects. Run by langchain.sh."""

from __future__ import annotations

import os
from typing import Any

from langchain_anthropic import ChatAnthropic
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_ollama import ChatOllama
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

URL, MODEL = os.environ["URL"], os.environ["MODEL"]
MOST = 256  # tokens of a reply: a small model may find no end


class TestOpenAI(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": MODEL,
            "base_url": f"{URL}/v1",
            "api_key": "none",
            "temperature": 0,
            "max_tokens": MOST,
            "frequency_penalty": 0.5,
            "stream_usage": True,
        }

    @property
    def supports_json_mode(self) -> bool:
        return True


class TestOllama(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOllama

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": MODEL,
            "base_url": URL,
            "temperature": 0,
            "num_predict": MOST,
            "repeat_penalty": 1.2,
        }

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return False  # Ollama's dialect has no tool_choice


class TestAnthropic(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatAnthropic

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": MODEL,
            "base_url": URL,
            "api_key": "none",
            "temperature": 0,
            "max_tokens": MOST,
        }
